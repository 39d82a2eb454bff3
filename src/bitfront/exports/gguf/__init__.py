"""Networks in GGUF, whose package is an extra."""

from bitfront.errors import BitfrontError

try:
    import gguf  # noqa: F401
except ImportError:
    raise BitfrontError("GGUF needs gguf: pip install 'bitfront[hf]'") from None
