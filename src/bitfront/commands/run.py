"""The command ``run``: a single cell, the grid of a command line or of a recipe, or a search."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

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
    """Check the command line, then run what it asks for."""
    words, flags = _parted(words)
    if folder := flags.pop("--config-dir", ""):
        os.environ[compose.OWN] = str(_own(folder))
    asked, swept = flags.pop("--cfg", ""), flags.pop("-m", None) is not None
    if flags:
        raise BitfrontError(f"there is no {next(iter(flags))}; flags: -m, --cfg job, --config-dir <folder>, --help")
    lines = _lines(words)
    for line in lines:
        check(line)
    several = swept or any(word.partition("=")[0] in (*compose.SWEEP, RECIPE) for word in words)
    if asked and several:
        raise BitfrontError("a sweep takes no --cfg; leave it, or -m, out")
    if asked:
        CONSOLE.print(yaml.safe_dump(Cell(words).config.values, sort_keys=False, allow_unicode=True).rstrip())
    elif several:
        _sweep(lines, words)
    else:
        _single(words)


def _single(words: list[str]) -> None:
    if any(compose.names(word, "hydra") for word in words):
        raise BitfrontError("hydra.* are options of a sweep's cluster=; add -m")
    Cell(words).execute()


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


def _parted(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Words that set options, and flags with their values."""
    flags: dict[str, str] = {}
    plain: list[str] = []
    for before, word in itertools.pairwise(["", *words]):
        if before in ("--cfg", "--config-dir"):
            flags[before] = word
        elif word.startswith("-"):
            name, _, value = word.partition("=")
            flags["-m" if name == "--multirun" else name] = value
        else:
            plain.append(word)
    return plain, flags


def _lines(words: list[str]) -> list[list[str]]:
    """The command lines that together make the cells: one, or those of a recipe, each with all other words."""
    recipe = [word.partition("=")[2] for word in words if compose.names(word, RECIPE)]
    if not recipe:
        return [words]
    from bitfront.sweeps.recipes import lines

    return [[*line, *(word for word in words if not compose.names(word, RECIPE))] for line in lines(recipe[-1])]


def _own(folder: str) -> Path:
    path = Path(folder).resolve()
    if not any((path / group).is_dir() for group in compose.CELL):
        raise BitfrontError(f"--config-dir={folder}: no folder with task/ or quant/ in it")
    return path
