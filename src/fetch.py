"""``python -m src.fetch`` is ``bitfront fetch``."""

from bitfront.commands import start

if __name__ == "__main__":
    start("fetch")
