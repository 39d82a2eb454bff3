"""The columns of the tables: headings, and the text of each row's cell."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bitfront.reports.rows import MIB, Row, spread


@dataclass(frozen=True)
class Column:
    """A column of the tables.

    Attributes:
        text: a row's cell.
        words: aligned to the left.
        optional: only in tables in which a row has it.
        narrow: in README, too.
    """

    heading: str
    text: Callable[[Row], str]
    words: bool = False
    optional: bool = False
    narrow: bool = True


def number(value: float) -> str:
    """A metric's value."""
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4g}"


def over_seeds(values: Sequence[float]) -> str:
    """Mean and, of several, standard deviation; empty of none."""
    if not values:
        return ""
    mean = statistics.mean(values)
    return number(mean) + plus_minus(values, mean)


def plus_minus(values: Sequence[float], metric: float) -> str:
    """The standard deviation of several, in as many digits as the metric has."""
    return f" ± {spread(values):.{digits(metric)}f}" if len(values) > 1 else ""


def digits(metric: float) -> int:
    """After the point."""
    return 2 if abs(metric) >= 10 else 3


def metric(row: Row) -> str:
    """On the test split."""
    return over_seeds(row.values)


def change(row: Row) -> str:
    """Less the start's metric, with its sign."""
    if row.change is None:
        return ""
    return f"{row.change:+.{digits(row.value)}f}" + plus_minus(row.changes, row.value)


def minutes(row: Row) -> str:
    """Of calibration and training, by the kind of device."""
    times = (f"{s / 60:.{1 if s >= 60 else 2}f}{' GPU' * (device != 'cpu')}" for device, s in row.seconds.items())
    return ", ".join(times)


def memory(row: Row) -> str:
    """GiB, of the GPU where there was one."""
    if row.gpu_memory:
        return f"{row.gpu_memory / 2**30:.2f} GPU"
    return f"{row.memory / 2**30:.2f}" if row.memory else ""


def paper_size(row: Row) -> str:
    """MiB with the certainty's mark."""
    p = row.paper_file
    return f"{p.size / MIB:.4g}{p.mark}" if p and p.size else ""


def paper_metric(row: Row) -> str:
    """Value with the certainty's mark, and the metric's name where it is not the table's."""
    p = row.paper
    if p is None or p.value is None:
        return ""
    return f"{number(p.value)}{p.mark}" + (f" {p.metric}" if p.metric != row.metric else "")


def difference(row: Row) -> str:
    """With its sign."""
    return "" if row.difference is None else f"{row.difference:+.2f}"


METRIC = "metric"  # its heading is made from the table's rows
SETTING, RUNS = "setting", "runs"
COLUMNS = (
    Column("", lambda row: "*" * row.best + "!" * row.dirty, words=True),
    Column("method", lambda row: row.method, words=True),
    Column(SETTING, lambda row: row.own_setting, words=True),
    Column("MiB", lambda row: f"{row.size / MIB:.3f}"),
    Column("ratio", lambda row: f"{row.ratio:.2f}"),
    Column("bits/w", lambda row: f"{row.bits:.2f}"),
    Column(METRIC, metric),
    Column("Δ start", change, optional=True),
    Column("valid", lambda row: over_seeds(row.validated)),
    Column("paper MiB", paper_size, optional=True, narrow=False),
    Column("paper", paper_metric, optional=True),
    Column("difference", difference, optional=True),
    Column("seeds", lambda row: str(len(row.values))),
    Column("minutes", minutes),
    Column("peak GiB", memory, narrow=False),
    Column(RUNS, lambda row: " ".join(row.runs)),
)


def columns(table: Sequence[Row], narrow: bool = False) -> list[Column]:
    """Those that this table has."""
    there = [c for c in COLUMNS if not c.optional or any(c.text(row) for row in table)]
    return [c for c in there if c.narrow or not narrow]


def headings(table: Sequence[Row], chosen: Sequence[Column]) -> list[str]:
    """Of some columns; that of the metric says which is better, more or less."""
    return [f"test {table[0].metric} {arrow(table[0])}" if c.heading == METRIC else c.heading for c in chosen]


def arrow(row: Row) -> str:
    """Where the better values are."""
    return "↑" if row.higher_is_better else "↓"
