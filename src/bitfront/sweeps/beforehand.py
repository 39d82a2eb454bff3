"""What of a sweep cannot work, found before anything of it starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from bitfront.cells import compose
from bitfront.cells.cell import Cell
from bitfront.cells.check import check_values
from bitfront.cells.compose import Config
from bitfront.errors import BitfrontError
from bitfront.progress import phase

SHOWN = 5  # refused cells in a message
TASK = ("task", "train", "init_from", "data_root", "seed")  # of a configuration, what a task is built of


def refuse(cells: Sequence[Cell]) -> None:
    """Refuse cells with values out of range, else those with missing files, else those whose method or task cannot be
    built; torch is imported only for the last, and only if some cell is not finished.

    Raises:
        BitfrontError: naming the first of them.
    """
    _refuse_by(lambda cell: check_values(compose.load(cell.words)), cells)
    _refuse_by(Cell.record, cells)
    if all(cell.record() for cell in cells):
        return
    with phase("loading PyTorch"):
        from bitfront.cells.flow import build_method, build_task
    method = _once(build_method, lambda config: [config.method, config.values["quant"]])
    task = _once(build_task, lambda config: [config.task, *(config.values[key] for key in TASK)])

    def built(cell: Cell) -> None:
        for one in (cell, cell.start):
            if one and one.record() is None:
                method(one.config)
                task(one.config)

    _refuse_by(built, cells)


def _refuse_by(tried: Callable[[Cell], Any], cells: Sequence[Cell]) -> None:
    errors: dict[Cell, str] = {}
    for cell in cells:
        try:
            tried(cell)
        except BitfrontError as error:
            if len(cells) == 1:
                raise
            errors[cell] = str(error)
    if errors:
        listed = [f"{error}\n  {compose.command(cell.words)}" for cell, error in list(errors.items())[:SHOWN]]
        more = [f"and {len(errors) - SHOWN} more"] if len(errors) > SHOWN else []
        told = "\n".join([*listed, *more])
        raise BitfrontError(f"{len(errors)} of {len(cells)} cells cannot run, so none was started:\n{told}")


def _once(build: Callable[[Config], Any], key: Callable[[Config], Any]) -> Callable[[Config], None]:
    """Build for the first of all configurations that are alike; the others fare as it does."""
    known: dict[str, str] = {}

    def tried(config: Config) -> None:
        told = json.dumps(key(config))
        if told not in known:
            known[told] = ""
            try:
                build(config)
            except BitfrontError as error:
                known[told] = str(error)
        if known[told]:
            raise BitfrontError(known[told])

    return tried
