"""The command ``run``: a single cell, the grid of a command line or of a recipe, or a search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import yaml

from bitfront.cells import compose
from bitfront.cells.cell import Cell
from bitfront.cells.check import check
from bitfront.cells.usage import usage
from bitfront.console import CONSOLE
from bitfront.errors import BitfrontError
from bitfront.sweeps.beforehand import refuse
from bitfront.sweeps.forecast import forecast
from bitfront.sweeps.grid import grid

if TYPE_CHECKING:
    from bitfront.sweeps.sweep import Attempt, Sweep

__all__ = ["main", "usage"]
RECIPE, DRY = "recipe", "dry_run"


def main(words: list[str]) -> None:
    """Check the command line, then run what it asks for.

    Raises:
        BitfrontError: with what the user can do.
        KeyboardInterrupt: with where the same command goes on.
    """
    words, swept, asked = _parted(words)
    words, dry = _dry(words)
    lines = _lines(words)
    for line in lines:
        check(line)
    several = swept or any(compose.names(word, *compose.SWEEP, RECIPE) for word in words)
    if asked and (several or dry):
        raise BitfrontError(f"a {'sweep' if several else 'dry run'} takes no --cfg; leave one of them out")
    if several:
        _sweep(lines, words, dry)
        return
    for override in compose.parse(words):
        if override.is_sweep_override():
            raise BitfrontError(f"'{override.input_line}' has several values; add -m for a sweep")
        if compose.names(override.key_or_group, "hydra"):
            raise BitfrontError("hydra.* are options of a sweep's cluster=; add -m")
    cell = Cell(words)
    if asked:
        CONSOLE.print(yaml.safe_dump(cell.config.values, sort_keys=False, allow_unicode=True).rstrip())
        return
    refuse([cell])
    if dry:
        forecast([cell])
        return
    try:
        cell.execute()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_kept(cell)) from None


def _kept(cell: Cell) -> str:
    """Where the same command goes on after an interrupt."""
    for one, of in ((cell, ""), (cell.start, " of its float start")):
        run = one.run() if one else None
        if run and (begun := run.begun()):
            return f"after {begun}{of}"
    return "after its float start" if cell.start and cell.start.record() else "from the beginning"


def _sweep(lines: list[list[str]], words: Sequence[str], dry: bool) -> None:
    """Run all cells, and list what failed with its command.

    Raises:
        BitfrontError: cells cannot run, some failed, or the cluster does not start them.
        KeyboardInterrupt: with what is left.
    """
    from bitfront.sweeps.sweep import opened

    own = [[word for word in line if not compose.names(word, *compose.SWEEP, "hydra")] for line in lines]
    with opened(words) as sweep:
        attempts = (_searched if "trials" in sweep.config.sweeper else _completed)(sweep, own, dry)
    failed = {tuple(attempt.cell.words): attempt.error for attempt in attempts if attempt.error}
    if failed:
        listed = "".join(f"\n{error}\n  {compose.command(line)}" for line, error in failed.items())
        raise BitfrontError(
            f"{len(failed)} of {len(attempts)} cells failed; the same command runs only those again:{listed}"
        )


def _completed(sweep: Sweep, lines: list[list[str]], dry: bool) -> list[Attempt]:
    """Of a grid's cells."""
    cells = grid(lines)
    refuse(cells)
    if dry:
        forecast(cells, sweep.config.cluster.workers)
        return []
    try:
        return sweep.complete(cells)
    except KeyboardInterrupt:
        left = sum(cell.record() is None for cell in cells)
        raise KeyboardInterrupt(f"with the {left} of {len(cells)} cells that are not finished") from None


def _searched(sweep: Sweep, lines: list[list[str]], dry: bool) -> list[Attempt]:
    """Of a search's trials."""
    from bitfront.sweeps.search import ends, search

    if len(lines) > 1 or dry:
        others = "dry_run=, which is for a grid" if dry else "recipe="
        raise BitfrontError(f"sweeper=optuna searches the options of one task, as it goes; leave out {others}")
    refuse(ends(lines[0]))
    try:
        return search(sweep, lines[0])
    except KeyboardInterrupt:
        raise KeyboardInterrupt("with the trials that are not finished") from None


def _dry(words: list[str]) -> tuple[list[str], bool]:
    """Words without ``dry_run=``, and whether that is true."""
    given = [word.partition("=")[2] for word in words if compose.names(word, DRY)]
    if wrong := [text for text in given if text not in ("true", "false")]:
        raise BitfrontError(f"{DRY} takes true or false, got '{wrong[0]}'")
    return [word for word in words if not compose.names(word, DRY)], given[-1:] == ["true"]


def _parted(words: Sequence[str]) -> tuple[list[str], bool, bool]:
    """Words that set options; whether they are a sweep, by ``-m``; whether only to show the cell, by ``--cfg job``."""
    plain = [compose.quoted(word) for word in words if word not in ("-m", "--multirun")]
    asked = "--cfg" in plain
    if asked:
        at = plain.index("--cfg")
        if plain[at + 1 : at + 2] != ["job"]:
            raise BitfrontError("--cfg takes one word: --cfg job")
        del plain[at : at + 2]
    if flags := [word for word in plain if word.startswith("-")]:
        raise BitfrontError(f"there is no {flags[0]}; flags: -m, --cfg job, --config-dir <folder>, --help")
    return plain, len(plain) + 2 * asked < len(words), asked


def _lines(words: list[str]) -> list[list[str]]:
    """The command lines that together make the cells: one, or those of a recipe, each with all other words."""
    recipe = [word.partition("=")[2] for word in words if compose.names(word, RECIPE)]
    if not recipe:
        return [words]
    from bitfront.sweeps.recipes import lines

    return [[*line, *(word for word in words if not compose.names(word, RECIPE))] for line in lines(recipe[-1])]
