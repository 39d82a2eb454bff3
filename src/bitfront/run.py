"""``python -m bitfront.run`` is ``bitfront run``."""

from bitfront.commands import start

if __name__ == "__main__":
    start("run")
