"""``python -m src.dashboard`` is ``bitfront dashboard``."""

from bitfront.commands import start

if __name__ == "__main__":
    start("dashboard")
