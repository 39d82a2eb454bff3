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


def overlap(data: str, weights: str) -> str:
    """Of weights from elsewhere, on data whose test part was chosen here."""
    return (
        f"{data} has no test part, so a tenth of it is one; if {weights} was trained on these files, it knows that "
        f"tenth, and what is measured on it flatters: lay files apart as {data}/train, valid and test"
    )
