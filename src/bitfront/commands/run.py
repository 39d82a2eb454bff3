"""The command ``run``: a single cell, the grid of a command line or of a recipe, or a search."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from bitfront.cells import compose
from bitfront.cells.cell import Cell
from bitfront.cells.check import check
from bitfront.cells.usage import usage
from bitfront.console import CONSOLE
from bitfront.errors import BitfrontError

__all__ = ["main", "usage"]
RECIPE = "recipe"


def main(words: list[str]) -> None:
    """Check the command line, then run what it asks for.

    Raises:
        BitfrontError: with what the user can do.
    """
    words, swept, asked = _parted(words)
    lines = _lines(words)
    for line in lines:
        check(line)
    several = swept or any(word.partition("=")[0] in (*compose.SWEEP, RECIPE) for word in words)
    if asked and several:
        raise BitfrontError("a sweep takes no --cfg; leave it, or -m, out")
    if several:
        _sweep(lines, words)
        return
    for override in compose.parse(words):
        if override.is_sweep_override():
            raise BitfrontError(f"'{override.input_line}' has several values; add -m for a sweep")
        if compose.names(override.key_or_group, "hydra"):
            raise BitfrontError("hydra.* are options of a sweep's cluster=; add -m")
    cell = Cell(words)
    if asked:
        CONSOLE.print(yaml.safe_dump(cell.config.values, sort_keys=False, allow_unicode=True).rstrip())
    else:
        cell.execute()


def _sweep(lines: list[list[str]], words: Sequence[str]) -> None:
    """Run all cells, and list what failed with its command.

    Raises:
        BitfrontError: some cells failed, or the cluster does not start them.
    """
    from bitfront.sweeps.grid import grid
    from bitfront.sweeps.sweep import opened

    own = [[word for word in line if not compose.names(word, *compose.SWEEP, "hydra")] for line in lines]
    with opened(words) as sweep:
        if "trials" in sweep.config.sweeper:
            from bitfront.sweeps.search import search

            if len(own) > 1:
                raise BitfrontError("sweeper=optuna searches the options of one task; leave out recipe=")
            attempts = search(sweep, own[0])
        else:
            attempts = sweep.complete(grid(own))
    failed = {tuple(attempt.cell.words): attempt.error for attempt in attempts if attempt.error}
    if failed:
        listed = "".join(f"\n{error}\n  {compose.command(line)}" for line, error in failed.items())
        raise BitfrontError(
            f"{len(failed)} of {len(attempts)} cells failed; the same command runs only those again:{listed}"
        )


def _parted(words: Sequence[str]) -> tuple[list[str], bool, bool]:
    """Words that set options; whether they are a sweep, by ``-m``; whether only to show the cell, by ``--cfg job``."""
    plain = [word for word in words if word not in ("-m", "--multirun")]
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
