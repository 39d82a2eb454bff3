"""Networks in ONNX, whose packages are an extra."""

from bitfront.errors import BitfrontError

try:
    import onnx_ir  # noqa: F401
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401  (for torch's exporter)
except ImportError as _error:
    raise BitfrontError(f"ONNX needs {_error.name}: pip install 'bitfront[onnx]'") from None
