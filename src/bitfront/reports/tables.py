"""Rows as tables: for the terminal, as Markdown, CSV and LaTeX."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bitfront.reports.columns import RUNS, SETTING, columns, headings
from bitfront.reports.papers import CERTAINTY
from bitfront.reports.rows import Row, spread

FEWEST = 7  # columns of a terminal's table: those until the metric


def show(table: Sequence[Row], console: Console) -> None:
    """Print one task's rows; on a narrow terminal the settings wrap, and the last columns are left to the files."""
    chosen = columns(table)
    cells = [[_short(row) if c.heading == RUNS else c.text(row) for row in table] for c in chosen]
    least = []
    for column, heading, texts in zip(chosen, headings(table, chosen), cells, strict=True):
        whole = [word for text in texts for word in text.split()] if column.heading == SETTING else texts
        least.append(max(map(len, [heading, *whole])))
    while sum(least) + 2 * (len(least) - 1) > console.width and len(least) > FEWEST:
        least.pop()
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column, heading, _ in zip(chosen, headings(table, chosen), least, strict=False):
        grid.add_column(heading, justify="left" if column.words else "right", no_wrap=column.heading != SETTING)
    for line in zip(*cells[: len(least)], strict=True):
        grid.add_row(*line)
    metric = table[0].metric
    meaning = f"* not beaten in size and validation {metric}; MiB of the file; file bits per parameter; minutes"
    console.print(f"\n{table[0].task}\n", style="bold", soft_wrap=True)
    console.print(grid, soft_wrap=False)
    console.print("\n".join(["", f"{meaning} without evaluation", *notes(table)]), style="italic", soft_wrap=False)


def _short(row: Row) -> str:
    """The first run, and how many more there are."""
    return row.runs[0] + (f" +{len(row.runs) - 1}" if len(row.runs) > 1 else "")


def markdown(table: Sequence[Row], narrow: bool = False) -> str:
    """One task's rows as a Markdown table, with its notes."""
    chosen = columns(table, narrow)
    return piped(headings(table, chosen), [[column.text(row) for column in chosen] for row in table], notes(table))


def piped(heading: Sequence[str], lines: Sequence[Sequence[str]], below: Sequence[str] = ()) -> str:
    """A Markdown table, and notes below it."""
    head, *body = ("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (heading, *lines))
    text = [head, "|" + "---|" * len(heading), *body]
    return "\n".join([*text, "", "; ".join(below)] if below else text) + "\n"


def notes(table: Sequence[Row], brief: bool = False) -> list[str]:
    """What the marks mean that this table has, which GPUs its times are of, and what its rows share; a brief table has
    neither times nor changes.
    """
    certainties = {p.certainty for row in table for p in (row.paper, row.paper_file) if p}
    meanings = {"computed": "computed by the paper's rule", "recalled": "recalled, not read", "unsure": "not certain"}
    marks = [f"{CERTAINTY[c]} {meaning}" for c, meaning in meanings.items() if c in certainties]
    differ = any(p.differs for row in table for p in (row.paper, row.paper_file) if p)
    marks += ["≠ of another network, or with quantized activations"] * differ
    marks += ["! with code that git does not have"] * any(row.dirty for row in table)
    data = Counter(outline for row in table for outline in row.data).most_common()
    other = [f"{row.method} {row.setting}".strip() for row in table if row.data - {outline for outline, _ in data[:1]}]
    marks += [f"runs of these rows were on other data than most: {'; '.join(other)}"] * bool(other)
    marks += ["Δ start: less the metric of the network that a run starts from"] * (
        not brief and any(row.changes for row in table)
    )
    gpus = sorted({device for row in table for device in row.seconds} - {"cpu"})
    marks += [f"GPU: {', '.join(gpus)}"] * bool(gpus and not brief)
    return marks + [f"all with {' '.join(sorted(table[0].shared))}"] * bool(table[0].shared)


def as_csv(table: Sequence[Row]) -> str:
    """One task's rows as CSV, with all digits; what is not known is empty."""
    import pandas

    lines = [{name: "" if value is None else value for name, value in _numbers(row).items()} for row in table]
    return pandas.DataFrame(lines, dtype=object).to_csv(index=False, na_rep="nan", lineterminator="\n")


def _numbers(row: Row) -> dict[str, Any]:
    file, paper = row.paper_file, row.paper
    return {
        "best": int(row.best),
        "dirty": int(row.dirty),
        "method": row.method,
        "setting": row.setting,
        "bytes": row.size,
        "ratio": row.ratio,
        "bits_per_weight": row.bits,
        "metric": row.metric,
        "mean": row.value,
        "std": row.spread,
        "change": row.change,
        "change_std": spread(row.changes) if row.changes else None,
        "valid": row.valid,
        "seeds": len(row.values),
        "devices": "; ".join(row.seconds),
        "seconds": "; ".join(map(str, row.seconds.values())),
        "peak_memory": row.memory,
        "peak_gpu_memory": row.gpu_memory,
        "paper_file": file and file.paper,
        "paper_file_source": file and file.source,
        "paper_file_certainty": file and file.certainty,
        "paper_file_bytes": file and file.size,
        "paper": paper and paper.paper,
        "paper_source": paper and paper.source,
        "paper_certainty": paper and paper.certainty,
        "paper_metric": paper and paper.metric,
        "paper_value": paper and paper.value,
        "difference": row.difference,
        "runs": " ".join(row.runs),
    }


TEX = str.maketrans(
    {
        **{letter: f"\\{letter}" for letter in "&%$#_{}"},
        **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
        **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}"},
        **{"±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "†": r"$\dagger$", "‡": r"$\ddagger$"},
        **{"*": r"$\ast$", "≠": r"$\neq$", "Δ": r"$\Delta$"},
    }
)


def latex(table: Sequence[Row]) -> str:
    """One task's rows as a LaTeX table; it needs ``\\usepackage{booktabs}``, and fontenc T1 for quotation marks."""
    import pandas

    chosen = [column for column in columns(table) if column.heading != RUNS]
    lines = [[tex(column.text(row)) for column in chosen] for row in table]
    frame = pandas.DataFrame(lines, columns=list(map(tex, headings(table, chosen))))
    return frame.style.hide().to_latex(
        hrules=True,
        column_format="".join("l" if column.words else "r" for column in chosen),
        position_float="centering",
        caption=tex("; ".join([f"{table[0].task}. * not beaten in size and validation metric", *notes(table)])),
        label=f"tab:{table[0].task}",
    )


def tex(text: str) -> str:
    """Plain text for LaTeX."""
    return text.translate(TEX)
