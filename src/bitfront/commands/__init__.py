"""The commands: parse, call, print. ``bitfront <name>``, in a checkout also ``python -m src.<name>``."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib import import_module

from bitfront.console import CONSOLE
from bitfront.errors import BitfrontError
from bitfront.shipped import module

FLAG = "--config-dir"
COMMANDS = ("run", "evaluate", "report", "dashboard", "fetch")


def start(name: str, words: Sequence[str] | None = None) -> None:
    """Run a command; what the user can mend ends in one line and a status that is not 0.

    Args:
        name: one of ``COMMANDS``, whose module has ``usage()`` and ``main(words)``.
        words: of its command line; those of this process if there are none.
    """
    command = import_module(f"bitfront.commands.{name}")
    try:
        words = _own(sys.argv[1:] if words is None else words)
        if {"-h", "--help"} & set(words):
            CONSOLE.print(re.sub(r"python -m src\.(\w+)", lambda found: module(found[1]), command.usage()))
        else:
            command.main(words)
    except BitfrontError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")


def _own(words: Sequence[str]) -> list[str]:
    """The words without ``--config-dir <folder>``, which has tasks and methods of the user's own."""
    found, words = [word for word in words if word.partition("=")[0] == FLAG], list(words)
    if found:
        from bitfront.cells.compose import use

        at = words.index(found[-1])
        folder = found[-1].partition("=")[2] or "".join(words[at + 1 : at + 2])
        use(folder)
        del words[at : at + (1 if "=" in found[-1] else 2)]
    return words
