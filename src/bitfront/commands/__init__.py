"""The commands: parse, call, print. ``bitfront <name>``, in a checkout also ``python -m src.<name>``."""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from bitfront.errors import BitfrontError
from bitfront.processes import rank

FLAG = "--config-dir"
STOPS = (signal.SIGTERM, signal.SIGUSR1)  # of schedulers; SLURM warns with the second, by --signal=USR1@<seconds>
COMMANDS = ("run", "quantize", "evaluate", "export", "report", "dashboard", "fetch")


def start(name: str, words: Sequence[str] | None = None) -> None:
    """Run a command; what the user can mend ends in one line and a status that is not 0, and so does an interrupt.

    Args:
        name: one of ``COMMANDS``, whose module has ``usage()`` and ``main(words)``.
        words: of its command line; those of this process if there are none.
    """
    received = [signal.SIGINT]
    try:
        with _terminable(received):
            _run(name, _own(sys.argv[1:] if words is None else words))
    except BitfrontError as error:
        _clear()
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends what is still tidying up
        _clear()
        if rank() == 0:
            kept = stop.args[0] if stop.args else "from the beginning"
            newline = "\n" * sys.stderr.isatty()  # behind the terminal's ^C
            sys.stderr.write(f"{newline}interrupted; the same command goes on {kept}\n")
        sys.exit(128 + received[-1])


def _run(name: str, words: Sequence[str]) -> None:
    command = import_module(f"bitfront.commands.{name}")
    if {"-h", "--help"} & set(words):
        from bitfront.console import CONSOLE
        from bitfront.shipped import module

        CONSOLE.print(re.sub(r"python -m src\.(\w+)", lambda found: module(found[1]), command.usage()))
    else:
        command.main(words)


@contextmanager
def _terminable(received: list[signal.Signals]) -> Iterator[None]:
    """Have ``STOPS``, which else end a process without a word, do what Ctrl-C does; note which came."""

    def stop(number: int, _: Any) -> None:
        received.append(signal.Signals(number))
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _clear() -> None:
    """Take the bars off the terminal, if there may be some."""
    if progress := sys.modules.get("bitfront.progress"):
        progress.clear()


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
