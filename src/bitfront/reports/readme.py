"""The blocks of README files that are made from rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from math import isfinite
from pathlib import Path

from bitfront.cells import compose
from bitfront.errors import BitfrontError
from bitfront.files import write_atomically
from bitfront.reports.columns import arrow, metric
from bitfront.reports.papers import spelled
from bitfront.reports.rows import MIB, Row, share
from bitfront.reports.tables import markdown, notes, piped


def fill(path: Path, tables: dict[str, list[Row]]) -> None:
    """Replace the blocks of a Markdown file, each until ``<!-- end -->``; those of tasks without rows stay.

    ``<!-- table:TASK -->``             the task's rows
    ``<!-- sizes:TASK 0.1,0.2 -->``     methods against the largest size that a file may have, in MiB
    ``<!-- overview:TASK,TASK -->``     methods against tasks
    ``<!-- matrix: -->``                how many runs each cell has

    Raises:
        BitfrontError: a block names no task, or sizes that are no numbers.
    """

    def block(match: re.Match[str]) -> str:
        tasks = [task for task in match[3].split(",") if task]
        if not all(task in tables for task in tasks):
            return match[0]
        make: dict[str, Callable[[], str]] = {
            "table": lambda: markdown(tables[tasks[0]], narrow=True),
            "sizes": lambda: at_most(tables[tasks[0]], [float(limit) for limit in match[4].split(",")]),
            "overview": lambda: overview(tables, tasks),
            "matrix": lambda: matrix(tables),
        }
        try:
            return f"{match[1]}\n{make[match[2]]()}{match[5]}"
        except (IndexError, ValueError):
            raise BitfrontError(
                f"'{path}': '{match[1]}' should be like <!-- table:vit -->, <!-- sizes:vit 0.1,0.2 --> or "
                "<!-- overview:vit,lm -->"
            ) from None

    pattern = r"(<!-- (table|sizes|overview|matrix):([\w,-]*) ?([\d.,]*) -->).*?(<!-- end -->)"
    write_atomically(path, re.sub(pattern, block, path.read_text(), flags=re.DOTALL))


def overview(tables: dict[str, list[Row]], tasks: Sequence[str]) -> str:
    """Methods against tasks as a Markdown table: each cell as it runs without options, metric and MiB of the file."""
    parts = [tables[task] for task in tasks]
    lines = []
    for method in compose.options("quant"):
        cells = []
        for part in parts:
            usual = compose.load([f"task={part[0].task}", f"quant={method}"]).setting
            row = next((row for row in part if row.method == method and spelled(row.setting) == spelled(usual)), None)
            about = ", ".join([f"{row.size / MIB:.3f} MiB", *usual.split()]) if row else ""
            cells.append(f"{row.value:.4g} ({about})" if row else "")
        if any(cells):
            lines.append([method, *cells])
    return piped(["", *(f"{part[0].task}: {part[0].metric} {arrow(part[0])}" for part in parts)], lines)


def matrix(tables: dict[str, list[Row]]) -> str:
    """Every task but the user's own against every method, as Markdown: how many runs there are, how many on GPUs."""
    methods, lines = compose.options("quant"), []
    for task in (name for name in compose.options("task") if "data" not in dict(compose.knobs("task", name))):
        cells = []
        for method in methods:
            runs = [r for row in tables.get(task, []) if row.method == method for r in row.records]
            gpus = Counter(r.device for r in runs if r.device != "cpu")
            named = [f"{n} on {name}" for name, n in sorted(gpus.items())]
            cells.append(", ".join([str(len(runs)), *named]) if runs else "·")
        lines.append([task, *cells])
    return piped(["", *methods], lines)


def at_most(table: Sequence[Row], limits: Sequence[float]) -> str:
    """Methods against file sizes as a Markdown table: of the files of at most so many MiB, the one with the best
    validation metric, its test metric and setting; the best test metric of a size is bold. Of a method, the settings
    with the most seeds count: the mean of fewer is that of other networks.
    """
    methods = [method for method in compose.options("quant") if any(row.method == method for row in table)]
    chosen: dict[str, list[Row | None]] = {}
    for method in methods:
        rated = [(row.better(row.valid), row) for row in table if row.method == method and row.valid is not None]
        most = max((len(row.records) for _, row in rated), default=0)
        own = [(good, row) for good, row in rated if len(row.records) == most]
        fitting = [[(good, row) for good, row in own if row.size <= limit * MIB and isfinite(good)] for limit in limits]
        chosen[method] = [max(pairs, key=lambda pair: pair[0])[1] if pairs else None for pairs in fitting]
    shown = {id(row): copy(row) for found in chosen.values() for row in found if row}
    share([*shown.values()])  # which may be more than all rows of the task do
    chosen = {method: [shown[id(row)] if row else None for row in found] for method, found in chosen.items()}
    best = [
        max((row.better(row.value) for row in column if row), default=None)
        for column in zip(*chosen.values(), strict=True)
    ]

    def cell(row: Row | None, best: float | None) -> str:
        if row is None:
            return ""
        text = f"**{metric(row)}**" if row.better(row.value) == best else metric(row)
        return f"{text} ({row.own_setting})" if row.own_setting else text

    heading = [f"test {table[0].metric} {arrow(table[0])}", *(f"≤ {limit:g} MiB" for limit in limits)]
    lines = [[method, *map(cell, found, best)] for method, found in chosen.items() if any(found)]
    return piped(heading, lines, notes([row for found in chosen.values() for row in found if row], brief=True))
