"""``python -m src.quantize`` is ``bitfront quantize``."""

from bitfront.commands import start

if __name__ == "__main__":
    start("quantize")
