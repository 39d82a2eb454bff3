"""``python -m src.report`` is ``bitfront report``."""

from bitfront.commands import start

if __name__ == "__main__":
    start("report")
