"""``python -m src.export`` is ``bitfront export``."""

from bitfront.commands import start

if __name__ == "__main__":
    start("export")
