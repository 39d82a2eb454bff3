"""The terminal that commands and cells talk to."""

from __future__ import annotations

from rich.console import Console

CONSOLE = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
ERRORS = Console(highlight=False, soft_wrap=True, markup=False, emoji=False, stderr=True)
