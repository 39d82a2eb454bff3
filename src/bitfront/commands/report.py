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
    at=0.3                     which method to take for files of so many MiB, by validation data
    out=tables                 the folder to write to
    readme=README.md,a.md      files whose blocks between <!-- table:TASK --> and <!-- end --> are filled

Sizes are those of the files on disk, in MiB; a star marks rows that no other row beats in both size and
validation metric.
Published numbers are those of recipes/*/paper.csv.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bitfront.cells.check import closest
from bitfront.cells.record import read_all
from bitfront.commands.options import folder, options
from bitfront.console import CONSOLE
from bitfront.errors import BitfrontError
from bitfront.files import write_atomically
from bitfront.reports import readme, tables
from bitfront.reports.papers import published
from bitfront.reports.rows import MIB, Row, rows
from bitfront.shipped import module

SKIPPED = 5  # files that are named


@dataclass
class Options:
    """Of the command, as above."""

    task: str = ""
    method: str = ""
    max_size: float = 0.0
    at: float = 0.0
    out: str = ""
    readme: str = ""


def usage() -> str:
    """The help."""
    return str(__doc__)


def main(words: list[str]) -> None:
    """Read records, print and write their tables.

    Raises:
        BitfrontError: there are no records, or a file cannot be written.
    """
    root, words = folder(words)
    try:
        report(root, options(Options, words))
    except OSError as error:
        raise BitfrontError(str(error)) from None


def report(root: Path, chosen: Options) -> None:
    """Print and write the tables of the records below ``root``.

    Raises:
        BitfrontError: there are none.
    """
    if chosen.readme and (chosen.task or chosen.method or chosen.max_size):
        raise BitfrontError("readme= is filled from all runs; leave task=, method= and max_size= out")
    papers, skipped = published(), dict[Path, str]()
    records = read_all(root, skipped)
    if skipped:
        some = [f"{path} ({why})" for path, why in skipped.items()]
        more = f", and {len(some) - SKIPPED} more" if len(some) > SKIPPED else ""
        CONSOLE.print(f"skipped {len(some)} that cannot be read: {', '.join(some[:SKIPPED])}{more}")
    table = select(root, rows(records, papers), chosen)
    parts = {task: [row for row in table if row.task == task] for task in sorted({row.task for row in table})}
    for part in parts.values():
        tables.show(part, CONSOLE)
    if chosen.at:
        from bitfront.reports.answer import answer

        CONSOLE.print("\n".join(line for part in parts.values() for line in answer(part, chosen.at)))
    CONSOLE.file.flush()
    out = Path(chosen.out or root / "report")
    out.mkdir(parents=True, exist_ok=True)
    for task, part in parts.items():
        write_atomically(out / f"{task}.csv", tables.as_csv(part))
        write_atomically(out / f"{task}.md", tables.markdown(part))
        write_atomically(out / f"{task}.tex", tables.latex(part))
    for text in filter(None, chosen.readme.split(",")):
        readme.fill(Path(text), parts)
    from bitfront.reports import figures, page  # after the tables: drawing takes seconds

    write_atomically(out / "report.html", page.html(parts, papers))
    for task, part in parts.items():
        figures.draw(part, [p for p in papers if p.task == part[0].published], out / task)
    CONSOLE.print(f"tables and figures: {out}\npage: {out / 'report.html'}")


def _of_task(name: str, known: list[str]) -> list[str]:
    """A task's own name, or those of all its data."""
    return [name] if name in known else [k for k in known if k.startswith(f"{name}-")] or [name]


def select(root: Path, table: list[Row], chosen: Options) -> list[Row]:
    """The rows that the options ask for.

    Raises:
        BitfrontError: there are none, and what there is; none of a task, or of a method among those of the tasks.
    """
    if not table:
        raise BitfrontError(
            f"no finished runs in '{root}'; make one with: {module('run')} task=vit quant=diffq penalty=5"
        )
    for key in ("task", "method"):
        names = getattr(chosen, key).split(",") if getattr(chosen, key) else []
        known = sorted({getattr(row, key) for row in table})
        if key == "task":  # data of the user's have a part of their own in the name
            names = [other for name in names for other in _of_task(name, known)]
        for name in names:
            if name not in known:
                near = closest(name, known)
                raise BitfrontError(f"no run of {key}={name} in '{root}'; {near}there are {key}={', '.join(known)}")
        table = [row for row in table if not names or getattr(row, key) in names]
    kept = [row for row in table if not chosen.max_size or row.size <= chosen.max_size * MIB]
    if not kept:
        smallest = min(row.size for row in table) / MIB
        raise BitfrontError(f"no run in '{root}' fits; the smallest has {smallest:.3f} MiB")
    return kept
