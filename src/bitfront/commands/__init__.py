"""The commands: parse, call, print. ``bitfront <name>``, in a checkout also ``python -m src.<name>``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from bitfront.console import CONSOLE
from bitfront.errors import BitfrontError

COMMANDS = ("run", "evaluate", "report", "dashboard", "fetch")


def start(name: str, words: Sequence[str] | None = None) -> None:
    """Run a command; what the user can mend ends in one line and a status that is not 0.

    Args:
        name: one of ``COMMANDS``, whose module has ``usage()`` and ``main(words)``.
        words: of its command line; those of this process if there are none.
    """
    words = sys.argv[1:] if words is None else list(words)
    command = import_module(f"bitfront.commands.{name}")
    try:
        if {"-h", "--help"} & set(words):
            CONSOLE.print(command.usage())
        else:
            command.main(words)
    except BitfrontError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
