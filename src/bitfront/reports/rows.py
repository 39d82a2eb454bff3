"""Rows of the report: finished runs grouped over seeds, beside what papers published for the same cell."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf, isfinite
from pathlib import Path

from bitfront.cells.identity import FINGERPRINT, identity
from bitfront.cells.record import Record
from bitfront.reports.papers import SHARED_OUT, Published, comparable, spelled, words

MIB = 2**20


@dataclass
class Row:
    """One method and setting on one task, over its seeds.

    Attributes:
        records: its runs, by seed.
        papers: published numbers of this cell, the closest first; their metrics are among the row's.
        changes: the primary metric less that of the network that a run starts from, on the test split, of the seeds
            whose start is among the records.
        best: not beaten in both size and validation metric by any other row of its task.
        shared: the words of its setting about network, data or trainer that all rows of its task have.
    """

    records: list[Record]
    papers: list[Published] = field(default_factory=list)
    changes: list[float] = field(default_factory=list)
    best: bool = False
    shared: frozenset[str] = frozenset()

    @cached_property
    def task(self) -> str:
        """Smoke runs are a task of their own, and so is each of the user's data: by name and four digits."""
        first = self.records[0]
        own = first.config["task"].get(FINGERPRINT)
        data = f"-{Path(first.config['task']['data']).name}-{own[:4]}" if own else ""
        return first.task + data + "-smoke" * first.smoke

    @property
    def published(self) -> str:
        """The task's name beside published numbers, whose cells say by their settings which data they are on."""
        return self.records[0].task + "-smoke" * self.records[0].smoke

    @cached_property
    def method(self) -> str:
        """Its name, as in ``quant=``."""
        return self.records[0].method

    @cached_property
    def setting(self) -> str:
        """As in the record, but a start given by its path is the run's directory, or the file's name."""
        runs = re.sub(r"(init_from=)\S*?([^/\s]+)/model\.safetensors(?!\S)", r"\1\2", self.records[0].setting)
        return re.sub(r"(init_from=)\S*/([^/\s]+)(?!\S)", r"\1\2", runs)

    @property
    def own_setting(self) -> str:
        """The setting without what all rows of its task share."""
        return " ".join(word for word in words(self.setting) if word not in self.shared)

    @cached_property
    def metric(self) -> str:
        """Name of the task's primary metric."""
        return self.records[0].primary.name

    @cached_property
    def higher_is_better(self) -> bool:
        """Of the primary metric."""
        return self.records[0].primary.higher_is_better

    def better(self, value: float) -> float:
        """A value of the primary metric such that more is better."""
        return self.records[0].primary.better(value)

    @cached_property
    def size(self) -> float:
        """Of the file in bytes, mean over seeds."""
        return statistics.mean(r.sizes.file for r in self.records)

    @cached_property
    def ratio(self) -> float:
        """How many times smaller than the float network."""
        return self.records[0].sizes.float / self.size

    @cached_property
    def bits(self) -> float:
        """Bits of the file per parameter."""
        return 8 * self.size / self.records[0].sizes.parameters

    @cached_property
    def values(self) -> list[float]:
        """The primary metric on the test split, by seed."""
        return [r.primary.value for r in self.records]

    @cached_property
    def value(self) -> float:
        """Mean of the primary metric."""
        return statistics.mean(self.values)

    @cached_property
    def spread(self) -> float:
        """Standard deviation of the metric over seeds; 0 for one seed."""
        return spread(self.values)

    @property
    def change(self) -> float | None:
        """Mean of ``changes``; its standard deviation is often much smaller than that of the metric."""
        return statistics.mean(self.changes) if self.changes else None

    @property
    def error(self) -> float:
        """The standard deviation to compare rows by: of the changes, which that of the starts is not in; where a seed
        has no start, of the metric.
        """
        return spread(self.changes) if len(self.changes) == len(self.values) else self.spread

    @cached_property
    def validated(self) -> list[float]:
        """The primary metric on the validation split, by seed; empty where a record lacks it."""
        values = [value for r in self.records if (value := r.metric("valid")) is not None]
        return values if len(values) == len(self.records) else []

    @property
    def valid(self) -> float | None:
        """Mean of the primary metric on the validation split, by which settings may be chosen; None where unknown."""
        return statistics.mean(self.validated) if self.validated else None

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Of calibration and training on each device, "cpu" or a GPU by its name, mean over the seeds that ran there;
        evaluation does not count.
        """
        found: dict[str, list[float]] = {}
        for r in self.records:
            found.setdefault(r.device, []).append(r.seconds)
        return {device: statistics.mean(found[device]) for device in sorted(found, key=lambda d: (d != "cpu", d))}

    @cached_property
    def memory(self) -> float | None:
        """Most bytes of main memory that any stage of any seed held; None in records that lack it."""
        return self._peak("peak_memory")

    @cached_property
    def gpu_memory(self) -> float | None:
        """The same of the GPU's memory; None without a GPU."""
        return self._peak("peak_gpu_memory")

    def _peak(self, kind: str) -> float | None:
        return max((s[kind] for r in self.records for s in r.stages.values() if kind in s), default=None)

    @cached_property
    def dirty(self) -> bool:
        """Whether code that git does not have made any of the runs."""
        return any(r.environment["dirty"] for r in self.records)

    @cached_property
    def data(self) -> set[str]:
        """What tells the data of its runs from others of the same name, see ``identified.outline``."""
        return {str(r.environment["data"]) for r in self.records if "data" in r.environment}

    @cached_property
    def runs(self) -> list[str]:
        """Ids, by seed."""
        return [r.id for r in self.records]

    @property
    def paper(self) -> Published | None:
        """The published metric that the row is compared with."""
        return next((p for p in self.papers if p.value is not None), None)

    @property
    def paper_file(self) -> Published | None:
        """The published size that the row is compared with."""
        return next((p for p in self.papers if p.size is not None), None)

    @property
    def difference(self) -> float | None:
        """Ours less the paper's, in the paper's metric."""
        if self.paper is None or self.paper.value is None:
            return None
        return statistics.mean(r.metrics["test"][self.paper.metric] for r in self.records) - self.paper.value


def spread(values: Sequence[float]) -> float:
    """Standard deviation of a sample; 0 of one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def rows(records: Iterable[Record], papers: Sequence[Published] = ()) -> list[Row]:
    """Records grouped over seeds, sorted by task and size, with published numbers, changes from their starts, and the
    best marked.
    """
    distinct = list({r.id: r for r in records}.values())
    starts = {(r.task, _float_of(r)): r.primary.value for r in distinct}
    cells: dict[tuple[str, str, str], list[Published]] = {}
    for number in papers:
        cells.setdefault((number.task, number.method, spelled(number.setting, SHARED_OUT)), []).append(number)
    table = [Row(group) for group in _over_seeds(distinct)]
    for row in table:
        first = row.records[0]
        begun = [(r.primary.value, starts.get((r.task, r.init_sha256))) for r in row.records]
        row.changes = [value - start for value, start in begun if start is not None]
        row.papers = comparable(first, cells.get((row.published, row.method, spelled(first.setting, SHARED_OUT)), []))
    table.sort(key=lambda row: (row.task, row.size, row.method, row.setting))
    for task in {row.task for row in table}:
        own = [row for row in table if row.task == task]
        for row in front(own):
            row.best = True
        share(own)
    return table


def _float_of(r: Record) -> str | None:
    """The file that runs start from which start from this one: its own, or where it only measured one, that."""
    measured = r.method == "float" and not r.history
    return r.init_sha256 if measured and r.init_sha256 else r.artifact_sha256


def _over_seeds(records: Iterable[Record]) -> list[list[Record]]:
    """The runs of each cell, by seed; a start counts by its name, as each seed has a start of its own."""
    groups: dict[str, list[Record]] = {}
    for r in records:
        seedless = identity(r.task, r.method, r.config | {"seed": 0}, str(r.config["init_from"]))
        groups.setdefault(seedless, []).append(r)
    return [sorted(group, key=lambda r: (r.seed, r.id)) for group in groups.values()]


def share(table: Sequence[Row]) -> None:
    """Tell the rows of a table what they share, if there are several."""
    common = frozenset.intersection(*(frozenset(words(row.setting)) for row in table))
    if len(table) > 1:
        for row in table:
            row.shared = frozenset(word for word in common if re.match(r"trainer\.|task\.|model=|data=", word))


def front(table: Iterable[Row]) -> list[Row]:
    """The rows that no other one beats in both size and metric, from the smallest up; a diverged one is none.

    By the validation split, as the test split is to choose nothing; where it is not known of all, by that.
    """
    table = [row for row in table if isfinite(row.value)]
    known = [row.valid for row in table if row.valid is not None and isfinite(row.valid)]
    chosen_by = known if len(known) == len(table) else [row.value for row in table]
    goodness = {id(row): row.better(value) for row, value in zip(table, chosen_by, strict=True)}
    found: list[Row] = []
    for row in sorted(table, key=lambda row: (row.size, -goodness[id(row)])):
        last = found[-1] if found else row
        if goodness[id(row)] > goodness[id(last)] or (row.size, goodness[id(row)]) == (last.size, goodness[id(last)]):
            found.append(row)
    return found


def limit(table: Sequence[Row], papers: Iterable[Published]) -> float:
    """The goodness below which rows lie on a figure's edge, as the others could not be told apart beside them.

    Such rows are below the front, which may be a single row, and the better half of all by more than eight times the
    spread of these, by 5 % at least, and below all published numbers; if there are none, it is minus infinity.
    """
    values = sorted((row.better(row.value) for row in table if isfinite(row.value)), reverse=True)
    good = [row.better(row.value) for row in table if row.best]
    if not good:
        return -inf
    good += values[: len(values) // 2]
    best, worst = max(good), min(good)
    theirs = [table[0].better(p.value) for p in papers if p.metric == table[0].metric and p.value and p.size]
    lowest = min([worst - max(8 * (best - worst), 0.05 * abs(best)), *theirs])
    if min(values) >= lowest:
        return -inf
    kept = min([value for value in values if value >= lowest] + theirs)
    return kept - max(0.1 * (best - kept), 0.01 * abs(best))


def learned_bits(record: Record) -> dict[str, float]:
    """Mean bits per weight of each tensor in the network's order, where widths differ within a tensor; else empty."""
    widths = {name: counts for name, counts in record.widths.items() if sum(counts)}
    if not any(sum(map(bool, counts)) > 1 for counts in widths.values()):
        return {}
    return {name: sum(b * n for b, n in enumerate(counts)) / sum(counts) for name, counts in widths.items()}


def layer_losses(record: Record) -> dict[str, float]:
    """Relative loss of each layer's output after post-training quantization, in the network's order; else empty."""
    return {e["name"]: e["loss"] for e in record.calibration.get("layers", []) if "loss" in e}
