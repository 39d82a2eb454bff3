"""Which method to take at a size: by the validation split, with the test split's metric and how sure that is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from bitfront.reports.rows import MIB, Row

SURE = 2.0  # standard errors of a difference beyond which two methods are told apart


def answer(table: Sequence[Row], size: float) -> list[str]:
    """In lines, for one task.

    Of each method the setting that is best in validation counts. Its standard error is that of the mean over seeds, by
    its own spread, or that of the task's rows where it has one seed alone, and for accuracy also that of a share of so
    many samples, which is never less.

    Args:
        table: rows of a task.
        size: MiB that a file may have.
    """
    fitting = [row for row in table if row.size <= size * MIB and row.valid is not None and math.isfinite(row.valid)]
    if not fitting:
        smallest = min((row.size for row in table), default=0) / MIB
        task = table[0].task
        return [f"{task}: no run of at most {size:g} MiB with a validation metric; the smallest has {smallest:.4g}"]
    usual = _usual(table)
    best: dict[str, Row] = {}
    for row in sorted(fitting, key=_goodness, reverse=True):
        best.setdefault(row.method, row)
    first, *others = best.values()
    alike = [row for row in others if not apart(first, row, usual)]
    worse = [row for row in others if apart(first, row, usual)]
    lines = [f"{first.task}, at most {size:g} MiB: take {_told(first, usual)}"]
    if alike:
        lines.append(f"  cannot be told apart from it: {'; '.join(_told(row, usual) for row in alike)}")
    if worse:
        lines.append(f"  behind it: {'; '.join(_told(row, usual) for row in worse)}")
    return lines


def apart(a: Row, b: Row, usual: float | None) -> bool:
    """Whether two rows' validation metrics differ by more than chance. A row of which nothing tells that is taken to be
    as sure as the other; if nothing does of either, they may not."""
    errors = [error for row in (a, b) if (error := standard_error(row, "valid", usual)) is not None]
    assert a.valid is not None and b.valid is not None
    return bool(errors) and abs(a.valid - b.valid) > SURE * math.hypot(errors[0], errors[-1])


def standard_error(row: Row, split: str, usual: float | None) -> float | None:
    """Of a row's mean metric on a split; None where nothing tells it.

    Args:
        row: of any number of seeds.
        split: "valid" or "test".
        usual: the spread over seeds that rows of the task have.
    """
    values = row.validated if split == "valid" else row.values
    spread = statistics.stdev(values) if len(values) > 1 else usual
    seeds = None if spread is None else spread / math.sqrt(len(values))
    n = min((r.samples.get(split, 0) for r in row.records), default=0)
    if row.metric != "top1" or not n:
        return seeds
    share = min(max(statistics.mean(values) / 100, 0.5 / n), 1 - 0.5 / n)
    return max(seeds or 0.0, 100 * math.sqrt(share * (1 - share) / n))


def _usual(table: Sequence[Row]) -> float | None:
    """The spread of the validation metric over seeds, over the rows that have several."""
    variances = [statistics.variance(row.validated) for row in table if len(row.validated) > 1]
    return math.sqrt(statistics.mean(variances)) if variances else None


def _goodness(row: Row) -> float:
    assert row.valid is not None
    return row.better(row.valid)


def _told(row: Row, usual: float | None) -> str:
    error = standard_error(row, "test", usual)
    sure = "" if error is None else f" ± {SURE * error:.2g}"
    seeds = f"{len(row.records)} seeds" if len(row.records) > 1 else "1 seed"
    return (
        f"{row.method} ({row.own_setting or 'as it is'}): test {row.metric} {row.value:.4g}{sure}, validation "
        f"{row.valid:.4g}, {row.size / MIB:.4g} MiB, {seeds}"
    )
