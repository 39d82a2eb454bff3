"""The terminal that commands and cells talk to."""

from __future__ import annotations

import os
import sys

from rich.console import Console


class Terminal(Console):
    """Goes on in silence where nobody reads any more, as in ``| head``: files are still to be written."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


CONSOLE = Terminal(highlight=False, soft_wrap=True, markup=False, emoji=False)
ERRORS = Console(highlight=False, soft_wrap=True, markup=False, emoji=False, stderr=True)
