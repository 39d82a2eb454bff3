"""``bitfront <command> ...``, also as ``python -m bitfront``."""

from __future__ import annotations

import sys

from bitfront.commands import COMMANDS, start
from bitfront.console import CONSOLE


def main() -> None:
    """Start the command that the first word names."""
    name, *words = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        start(name, words)
    elif name in ("-h", "--help"):
        CONSOLE.print("\n".join(f"  bitfront {command} --help" for command in COMMANDS))
    else:
        sys.exit(f"error: there is no command '{name}'; commands: {', '.join(COMMANDS)}")


if __name__ == "__main__":
    main()
