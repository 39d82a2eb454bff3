"""``python -m src.evaluate`` is ``bitfront evaluate``."""

from bitfront.commands import start

if __name__ == "__main__":
    start("evaluate")
