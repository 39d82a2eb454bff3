"""Tables, figures and a page of finished runs: which method keeps the accuracy at which size.

    python -m src.report                          every run below runs/
    python -m src.report results/records task=vit method=diffq max_size=0.3 out=tables

Prints a table per task, sorted by size, and writes to `out` (else `report` in the folder of the runs):

    <task>.csv .md .tex        the table; LaTeX with booktabs
    <task>.png .svg            metric against size
    <task>_bits.svg            bits per layer, where they are learned
    <task>_layers.svg          loss per layer, of methods after training
    report.html                everything, and each run, in one file that needs no network

Options:

    task=vit,lm                only these tasks
    method=diffq,lsq           only these methods
    max_size=0.3               only files of at most so many MiB
    out=tables                 the folder to write to
    readme=README.md,a.md      files whose blocks between <!-- table:TASK --> and <!-- end --> are filled

Sizes are those of the files on disk, in MiB; a star marks rows that no other row beats in both size and metric.
Published numbers are those of recipes/*/paper.csv.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from src import config, record, tables
from src.errors import BitfrontError
from src.rows import MIB, Row, published, rows

OPTIONS = {"task": "", "method": "", "max_size": 0.0, "out": "", "readme": ""}
CONSOLE = Console(highlight=False, markup=False)


def main() -> None:
    """Read records, print and write their tables."""
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        CONSOLE.print(__doc__, soft_wrap=True)
        return
    try:
        root = Path(words.pop(0)) if words and "=" not in words[0] else Path("runs")
        report(root, config.parse(words, OPTIONS))
    except (BitfrontError, OSError) as error:
        sys.exit(f"error: {error}")


def report(root: Path, chosen: dict[str, Any]) -> None:
    """Print and write the tables of the records below ``root``.

    Raises:
        BitfrontError: there are none.
    """
    if chosen["readme"] and any(chosen[key] for key in ("task", "method", "max_size")):
        raise BitfrontError("readme= is filled from all runs; leave task=, method= and max_size= out")
    papers = published()
    table = select(root, rows(record.read_all(root), papers), chosen)
    parts = {task: [row for row in table if row.task == task] for task in sorted({row.task for row in table})}
    out = Path(chosen["out"] or root / "report")
    out.mkdir(parents=True, exist_ok=True)
    for task, part in parts.items():
        tables.show(part, CONSOLE)
        (out / f"{task}.csv").write_text(tables.as_csv(part))
        (out / f"{task}.md").write_text(tables.markdown(part))
        (out / f"{task}.tex").write_text(tables.latex(part))
    for text in filter(None, chosen["readme"].split(",")):
        tables.fill(Path(text), parts)
    CONSOLE.file.flush()
    from src import figures, page  # after the tables: drawing takes seconds

    (out / "report.html").write_text(page.html(parts, papers))
    for task, part in parts.items():
        figures.draw(part, [p for p in papers if p.task == task], out / task)
    CONSOLE.print(f"tables and figures: {out}\npage: {out / 'report.html'}", soft_wrap=True)


def select(root: Path, table: list[Row], chosen: dict[str, Any]) -> list[Row]:
    """The rows that the options ask for.

    Raises:
        BitfrontError: there are none, and what there is.
    """
    if not table:
        raise BitfrontError(
            f"no finished runs in '{root}'; make one with: python -m src.run task=vit quant=diffq penalty=5"
        )
    asked = {key: chosen[key].split(",") for key in ("task", "method") if chosen[key]}
    kept = [row for row in table if all(getattr(row, key) in names for key, names in asked.items())]
    kept = [row for row in kept if not chosen["max_size"] or row.size <= chosen["max_size"] * MIB]
    if not kept:
        there = {(row.task, row.method) for row in table}
        tasks, methods = (", ".join(sorted(set(names))) for names in zip(*there, strict=True))
        smallest = min(row.size for row in table) / MIB
        raise BitfrontError(
            f"no run in '{root}' fits; there are task={tasks}, method={methods}, the smallest of {smallest:.3f} MiB"
        )
    return kept


if __name__ == "__main__":
    main()
