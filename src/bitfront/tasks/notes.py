"""What a task has to say of the user's data."""

from __future__ import annotations

import functools
import sys

from bitfront.processes import rank


@functools.cache
def say(note: str) -> None:
    """Tell the user, once in a process, and in the first of several alone."""
    if rank() == 0:
        sys.stderr.write(f"{note}\n")
