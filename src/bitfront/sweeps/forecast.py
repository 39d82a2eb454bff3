"""What a command line would do: which cells, what of them is finished, and how long the others take."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from bitfront.cells.cell import Cell
from bitfront.cells.compose import Config
from bitfront.cells.identity import calibrated, trains
from bitfront.cells.record import Record, read_all
from bitfront.cells.runs import Run
from bitfront.console import CONSOLE

FINISHED = "finished"


@dataclass
class Planned:
    """A cell, as it is now.

    Attributes:
        users: of a float start, the cells that begin with it.
        state: "finished", or what is left to do.
        left: share of its training that is to be done.
        seconds: that it still takes; None if nothing is known of its kind.
    """

    cell: Cell
    users: int
    state: str
    left: float
    seconds: float | None


def forecast(cells: Sequence[Cell], workers: int = 1) -> None:
    """Print a table of cells, of the float networks that they start from, and of the minutes that are left.

    Args:
        cells: none of which is started.
        workers: cells that run at once.
    """
    users: dict[Path, list[Cell]] = {}
    for cell in cells:
        if cell.start:
            users.setdefault(_place(cell.start), []).append(cell)
    records = [record for root in {cell.config.values["root"] for cell in cells} for record in read_all(Path(root))]
    own = {_place(cell) for cell in cells}
    before = [planned(some[0].start, records, len(some)) for place, some in users.items() if place not in own]
    table = [planned(cell, records, len(users.get(_place(cell), []))) for cell in cells]
    _show([*before, *table])
    tasks = {part.cell.config.task for part in table}
    for text in summary(before, table, workers, sorted({r.device for r in records if r.task in tasks})):
        CONSOLE.print(text, soft_wrap=False)


def _place(cell: Cell) -> Path:
    """Where its run is; nowhere as long as its start, which says where, is not finished."""
    run = cell.run()
    return run.path if run else Path()


def planned(cell: Cell | None, records: Sequence[Record], users: int) -> Planned:
    """How far a cell is.

    Args:
        cell: any.
        records: of finished runs, by which time is estimated.
        users: cells that start from it.
    """
    assert cell is not None
    run, left = cell.run(), 1.0
    if run is None:
        state = "to do"
    elif run.finished():
        state, left = FINISHED, 0.0
    elif run.held():
        state = "is running"
    else:
        state, left = interrupted(run, cell.config.values["train"]["epochs"])
    seconds = estimate(cell.config, records, left) if left else 0.0
    return Planned(cell, users, state, left, seconds)


def interrupted(run: Run, epochs: int) -> tuple[str, float]:
    """The state of a run that is not finished and not running, and the share of its training that is left."""
    if run.checkpoint.is_file():
        from bitfront.saved import DamagedError, load_saved

        try:
            done = len(load_saved(run.checkpoint)["bitfront"]["history"])
        except (DamagedError, LookupError, TypeError):
            return "starts over: what it has left is damaged", 1.0
        return f"goes on after epoch {done} of {epochs}", 1 - done / max(epochs, 1)
    if begun := run.begun():
        return f"goes on after {begun}", 1.0
    return (f"is run again: {spoilt}" if (spoilt := run.spoilt()) else "to do"), 1.0


def estimate(config: Config, records: Sequence[Record], left: float = 1.0) -> float | None:
    """Seconds that a cell takes: the median over finished runs of its task and method; of other methods, if there are
    none, that train or calibrate as it does. Training counts by the epoch.

    Args:
        config: of the cell.
        records: finished runs.
        left: share of the training that is to be done.
    """
    alike = [r for r in records if (r.task, r.smoke) == (config.task, config.values["smoke"])]
    kind = (calibrated(config.values), trains(config.values))
    ours = [r for r in alike if r.method == config.method]
    epochs = config.values["train"]["epochs"]
    times = [
        sum(
            stage["seconds"] * (left * epochs / max(record.config["train"]["epochs"], 1) if name == "train" else 1)
            for name, stage in record.stages.items()
        )
        for record in ours or [r for r in alike if (calibrated(r.config), trains(r.config)) == kind]
    ]
    return statistics.median(times) if times else None


def together(parts: Sequence[Planned], workers: int) -> float:
    """Seconds that cells of known duration take on some workers at least."""
    times = [part.seconds for part in parts if part.seconds]
    return max(sum(times) / workers, max(times, default=0.0))


def summary(before: Sequence[Planned], table: Sequence[Planned], workers: int, devices: Sequence[str]) -> list[str]:
    """What is to be done, and in which time, in lines.

    Args:
        before: float networks that are trained before the cells.
        table: the cells.
        workers: of them at once.
        devices: of the finished runs by which time is estimated.
    """
    unfinished = [part for part in (*before, *table) if part.state != FINISHED]
    unknown = sum(part.seconds is None for part in unfinished)
    minutes = (together(before, workers) + together(table, workers)) / 60
    finished = sum(part.state == FINISHED for part in table)
    lines = [f"{_cells(len(table))}, {finished} finished; nothing was started"]
    if unfinished and unknown < len(unfinished):
        on = f", {workers} cells at once" if workers > 1 else ""
        lines.append(f"about {_spoken(minutes)} minutes by what finished runs took on {', '.join(devices)}{on}")
    if unknown:
        lines.append(f"{'and ' * (len(lines) > 1)}{_cells(unknown)} of unknown time: no run of that kind is finished")
    return lines


def _cells(number: int) -> str:
    return f"{number} cell{'s' * (number != 1)}"


def _spoken(minutes: float) -> str:
    return f"{minutes:.{0 if minutes >= 10 else 1 if minutes >= 1 else 2}f}"


def _show(parts: Sequence[Planned]) -> None:
    """Print the table."""
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("task", "method", "setting", "state", "minutes"):
        grid.add_column(heading, justify="right" if heading == "minutes" else "left", overflow="fold")
    for part in parts:
        config = part.cell.config
        setting = f"{config.setting} {f'seed={seed}' if (seed := config.values['seed']) else ''}".strip()
        users = f", the start of {_cells(part.users)}" if part.users else ""
        minutes = "" if part.state == FINISHED else "unknown" if part.seconds is None else _spoken(part.seconds / 60)
        grid.add_row(config.task, config.method, setting, part.state + users, minutes)
    CONSOLE.print(grid, soft_wrap=False)
