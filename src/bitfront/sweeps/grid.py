"""The cells of a command line: every combination of its values, and of a recipe those of all its lines."""

from __future__ import annotations

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

from bitfront.cells.cell import Cell
from bitfront.cells.compose import parse
from bitfront.errors import BitfrontError


def grid(lines: Sequence[Sequence[str]]) -> list[Cell]:
    """The cells of some command lines together, each once.

    Args:
        lines: words that make cells.

    Raises:
        BitfrontError: a word has no end of values.
    """
    found: dict[tuple[str, ...], None] = {}
    for words in lines:
        overrides = parse(words)
        if any(o.is_sweep_override() and not o.is_discrete_sweep() for o in overrides):
            raise BitfrontError("an interval has no end of values; add sweeper=optuna to search it")
        found |= dict.fromkeys(tuple(point) for point in BasicSweeper.split_arguments(overrides, None)[0])
    return [Cell(words) for words in found]
