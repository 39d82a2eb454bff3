"""Published numbers, and which of them belong beside a cell of ours."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from bitfront.cells.record import Record
from bitfront.errors import BitfrontError
from bitfront.shipped import shipped

RECIPES = shipped("recipes")
# How a batch is shared out, over devices or in turn, is no part of what a paper's number is of.
SHARED_OUT = ("trainer.devices=", "trainer.accumulate_grad_batches=")
CERTAINTY = {  # from most to least, and how tables mark it
    "quoted": "",
    "computed": "†",
    "recalled": "‡",
    "unsure": "?",
}


@dataclass(frozen=True)
class Published:
    """A published number: a line of ``recipes/<paper>/paper.csv``.

    Attributes:
        task, method, setting: of the comparable cell, as in its record.
        value: of the metric, None where unknown.
        size: in bytes, None where unknown.
        certainty: a key of ``CERTAINTY``.
    """

    paper: str
    table: str
    model: str
    task: str
    method: str
    setting: str
    metric: str
    value: float | None
    size: float | None
    certainty: str
    source: str
    note: str

    @property
    def differs(self) -> bool:
        """Whether it is of another thing, of quantized activations, say; the note tells."""
        return self.note.startswith("differs: ")

    @property
    def mark(self) -> str:
        """What stands behind the number in tables."""
        return CERTAINTY[self.certainty] + "≠" * self.differs


def published(folder: Path = RECIPES) -> list[Published]:
    """The numbers of every ``<folder>/<paper>/paper.csv`` that belong to a task.

    Raises:
        BitfrontError: a line does not fit, naming it.
    """
    found = []
    for path in sorted(folder.glob("*/paper.csv")):
        with open(path, newline="") as file:
            lines = csv.DictReader(file, restval="")
            for line in lines:
                try:
                    found.append(_published(path.parent.name, line))
                except KeyError as column:
                    raise BitfrontError(f"'{path}' has no column {column}") from None
                except ValueError as error:
                    raise BitfrontError(f"'{path}', line {lines.line_num}: {error}") from None
    return [number for number in found if number.task]


def _published(paper: str, line: dict[str, str]) -> Published:
    texts = {f.name: line[f.name].strip() for f in fields(Published) if f.name not in ("paper", "value", "size")}
    if texts["certainty"] not in CERTAINTY:
        raise ValueError(f"certainty is one of {', '.join(CERTAINTY)}, not '{texts['certainty']}'")
    value, size = (float(line[key]) if line[key].strip() else None for key in ("value", "size"))
    return Published(paper=paper, value=value, size=size and size * 2**20, **texts)  # the file has MiB


def comparable(record: Record, papers: Sequence[Published]) -> list[Published]:
    """What we measure, too: the primary metric first, of the same thing, by the method's authors, the most certain.

    Args:
        record: of a run of the cell.
        papers: numbers of the same cell.
    """

    def distance(p: Published) -> tuple[bool, bool, bool, int, str]:
        sure = list(CERTAINTY).index(p.certainty)
        return p.metric != record.primary.name, p.differs, p.paper != record.method, sure, p.paper

    return sorted((p for p in papers if p.metric in record.metrics["test"]), key=distance)


def words(setting: str) -> list[str]:
    """The options of a setting."""
    return re.split(r" (?=[\w.]+=)", setting) if setting else []


def spelled(setting: str, without: tuple[str, ...] = ()) -> str:
    """A setting with one spelling for what is the same: ``a=2 b=5.0 c=True`` and ``c=true b=5 a=2``.

    Args:
        setting: as in a record.
        without: words that begin so are left out.
    """

    def word(text: str) -> str:
        key, _, value = text.replace(" ", "").partition("=")
        if re.fullmatch(r"[-+]?\d+\.?\d*(e[-+]?\d+)?", value, re.IGNORECASE):
            value = f"{float(value):g}"
        return f"{key}={value.lower() if value in ('True', 'False') else value}"

    return " ".join(sorted(word(text) for text in words(setting) if not text.startswith(without)))
