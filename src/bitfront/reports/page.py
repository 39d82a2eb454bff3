"""One HTML page of all rows and runs, in a single file that opens without a network.

The rows lie in it as JSON. The records, for the runs' own pages and the charts over layers, are packed with gzip and
unpacked by the browser once. Nothing in a record becomes markup: the script writes text only, and the page's policy
allows no script but its own.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

from jinja2 import Template

from bitfront.reports.papers import CERTAINTY, Published
from bitfront.reports.rows import Row, limit, spread

SOURCES = Path(__file__).parent / "html"
SCRIPTS = ("charts.js", "table.js", "run.js", "page.js")
DIGITS = 6


def html(tables: dict[str, list[Row]], papers: Sequence[Published]) -> str:
    """The page.

    Args:
        tables: each task's rows.
        papers: published numbers, with those of cells that have no run.
    """
    tasks = [_task(table, [p for p in papers if p.task == table[0].published]) for table in tables.values()]
    records = [record for table in tables.values() for row in table for record in row.records]
    script = "\n".join((SOURCES / name).read_text() for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template((SOURCES / "page.html").read_text(), keep_trailing_newline=True).render(
        style=(SOURCES / "page.css").read_text(),
        script=script,
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'",
        data=_inline({"tasks": tasks, "certainty": CERTAINTY}),
        runs=_packed({record.id: record.as_json() | {"command": record.command} for record in records}),
    )


def _task(table: Sequence[Row], papers: Sequence[Published]) -> dict[str, Any]:
    first = table[0]
    return {
        "name": first.task,
        "metric": first.metric,
        "higher": first.higher_is_better,
        "limit": first.better(limit(table, papers)),
        "shared": " ".join(sorted(first.shared)),
        "rows": [_row(row) for row in table],
        "papers": [asdict(p) for p in papers],
    }


def _row(row: Row) -> dict[str, Any]:
    names = ("method", "size", "ratio", "bits", "value", "spread", "error", "values", "seconds", "memory")
    more = ("changes", "change", "gpu_memory", "difference", "best", "dirty", "runs")
    return {name: getattr(row, name) for name in (*names, *more)} | {
        "paper": row.paper and asdict(row.paper),
        "paper_file": row.paper_file and asdict(row.paper_file),
        "setting": row.own_setting,
        "change_spread": spread(row.changes),
        "command": row.records[0].command,
    }


def _inline(value: Any) -> str:
    """JSON that cannot end the element that it stands in."""
    return json.dumps(_rounded(value), separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def _packed(value: Any) -> str:
    text = json.dumps(_rounded(value), separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _rounded(value: Any) -> Any:
    """As many digits as the page shows; JSON knows no NaN, the metric of a run that diverged."""
    if isinstance(value, float):
        if not isfinite(value):
            return None
        return int(value) if value.is_integer() else float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value
