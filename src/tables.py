"""Rows as tables: for the terminal, as CSV, Markdown and LaTeX, and as the blocks of README."""

from __future__ import annotations

import csv
import io
import re
import statistics
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from rich.console import Console

from src import config
from src.errors import BitfrontError
from src.rows import CERTAINTY, MIB, Row, spelled, spread


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
    marks += ["Δ start: less the metric of the network that a run starts from"] * (
        not brief and any(row.changes for row in table)
    )
    gpus = sorted({device for row in table for device in row.seconds} - {"cpu"})
    marks += [f"GPU: {', '.join(gpus)}"] * bool(gpus and not brief)
    return marks + [f"all with {' '.join(sorted(table[0].shared))}"] * bool(table[0].shared)


def markdown(table: Sequence[Row], narrow: bool = False) -> str:
    """One task's rows as a Markdown table, with its notes."""
    chosen = columns(table, narrow)
    lines = [_line(headings(table, chosen)), "|" + "---|" * len(chosen)]
    lines += [_line([column.text(row) for column in chosen]) for row in table]
    return "\n".join(lines + _noted(notes(table))) + "\n"


def _noted(found: list[str]) -> list[str]:
    return ["", "; ".join(found)] if found else []


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def as_csv(table: Sequence[Row]) -> str:
    """One task's rows as CSV, with all digits; what is not known is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    about = ("best", "dirty", "method", "setting", "bytes", "ratio", "bits_per_weight")
    ours = ("metric", "mean", "std", "change", "change_std", "valid", "seeds")
    costs = ("devices", "seconds", "peak_memory", "peak_gpu_memory")
    kinds = ("paper_file", "paper_file_source", "paper_file_certainty", "paper_file_bytes")
    papers = (*kinds, "paper", "paper_source", "paper_certainty", "paper_metric", "paper_value", "difference")
    writer.writerow((*about, *ours, *costs, *papers, "runs"))
    for row in table:
        file, p = row.paper_file, row.paper
        writer.writerow(
            (
                *(int(row.best), int(row.dirty), row.method, row.setting, row.size, row.ratio, row.bits),
                *(row.metric, row.value, row.spread, row.change, spread(row.changes) if row.changes else None),
                *(row.valid, len(row.values)),
                *("; ".join(map(str, column)) for column in (row.seconds.keys(), row.seconds.values())),
                *(row.memory, row.gpu_memory),
                *((file.paper, file.source, file.certainty, file.size) if file else ("",) * 4),
                *((p.paper, p.source, p.certainty, p.metric, p.value) if p else ("",) * 5),
                *(row.difference, " ".join(row.runs)),
            )
        )
    return text.getvalue()


TEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}"},
    **{"±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "†": r"$\dagger$", "‡": r"$\ddagger$", "*": r"$\ast$"},
    "≠": r"$\neq$",
}


def latex(table: Sequence[Row]) -> str:
    """One task's rows as a LaTeX table; it needs ``\\usepackage{booktabs}``, and fontenc T1 for quotation marks."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join(tex(cell) for cell in cells) + r" \\"

    chosen = [column for column in columns(table) if column.heading != RUNS]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{tex('; '.join([f'{table[0].task}. * not beaten in size and metric', *notes(table)]))}}}",
        rf"\label{{tab:{table[0].task}}}",
        rf"\begin{{tabular}}{{{''.join('l' if column.words else 'r' for column in chosen)}}}",
        r"\toprule",
        line(headings(table, chosen)),
        r"\midrule",
        *(line([column.text(row) for column in chosen]) for row in table),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def tex(text: str) -> str:
    """Plain text for LaTeX."""
    return "".join(TEX.get(letter, letter) for letter in text)


def show(table: Sequence[Row], console: Console) -> None:
    """Print one task's rows; on a narrow terminal the settings wrap, and the last columns are left to the files."""
    chosen = columns(table)
    place = next(n for n, column in enumerate(chosen) if column.heading == SETTING)
    lines = [[_short(row) if column.heading == RUNS else column.text(row) for column in chosen] for row in table]
    lines.insert(0, headings(table, chosen))
    widths = [max(map(len, texts)) for texts in zip(*lines, strict=True)]
    slack = widths[place] - max(len(word) for line in lines for word in line[place].split(" "))
    while (over := sum(widths) + 2 * len(widths) - console.width) > slack and len(widths) > 7:
        widths.pop()
    widths[place] -= max(0, min(over, slack))
    heading, *text = [part for line in lines for part in _aligned(line, widths, chosen, place)]
    meaning = f"* not beaten in size and test {table[0].metric}; MiB of the file; file bits per parameter; minutes"
    console.print(f"\n{table[0].task}\n\n{heading}", style="bold", soft_wrap=True)
    console.print("\n".join(["─" * (sum(widths) + 2 * len(widths) - 2), *text]), soft_wrap=True)
    console.print("\n".join(["", f"{meaning} without evaluation", *notes(table)]), style="italic")


def _aligned(line: Sequence[str], widths: Sequence[int], chosen: Sequence[Column], place: int) -> Iterator[str]:
    """A row as one line of text, or more if the cell at ``place`` wraps."""
    for n, part in enumerate(textwrap.wrap(line[place], widths[place]) or [""]):
        cells = [part if k == place else "" if n else cell for k, cell in enumerate(line)]
        parts = zip(cells, widths, chosen, strict=False)
        yield "  ".join(f"{cell:{'<' if column.words else '>'}{width}}" for cell, width, column in parts).rstrip()


def _short(row: Row) -> str:
    """The first run, and how many more there are."""
    return row.runs[0] + (f" +{len(row.runs) - 1}" if len(row.runs) > 1 else "")


def overview(tables: dict[str, list[Row]], tasks: Sequence[str]) -> str:
    """Methods against tasks as a Markdown table: each cell as it runs without options, metric and MiB of the file."""
    parts = [tables[task] for task in tasks]
    lines = [_line(["", *(f"{part[0].task}: {part[0].metric} {arrow(part[0])}" for part in parts)])]
    lines += ["|" + "---|" * (1 + len(parts))]
    for method in config.options("quant"):
        cells = []
        for part in parts:
            usual = config.load([f"task={part[0].task}", f"quant={method}"])["setting"]
            row = next((row for row in part if row.method == method and spelled(row.setting) == spelled(usual)), None)
            about = ", ".join([f"{row.size / MIB:.3f} MiB", *usual.split()]) if row else ""
            cells.append(f"{row.value:.4g} ({about})" if row else "")
        if any(cells):
            lines.append(_line([method, *cells]))
    return "\n".join(lines) + "\n"


def matrix(tables: dict[str, list[Row]]) -> str:
    """Every task against every method as a Markdown table: how many runs there are, and how many of them on GPUs."""
    methods = config.options("quant")
    lines = [_line(["", *methods]), "|" + "---|" * (1 + len(methods))]
    for task in config.options("task"):
        cells = []
        for method in methods:
            runs = [r for row in tables.get(task, []) if row.method == method for r in row.records]
            gpus = Counter(r["device"] for r in runs if r.get("device", "cpu") != "cpu")
            named = [f"{n} on {name}" for name, n in sorted(gpus.items())]
            cells.append(", ".join([str(len(runs)), *named]) if runs else "·")
        lines.append(_line([task, *cells]))
    return "\n".join(lines) + "\n"


def at_most(table: Sequence[Row], limits: Sequence[float]) -> str:
    """Methods against file sizes as a Markdown table: of the files of at most so many MiB, the one with the best
    validation metric, its test metric and setting; the best test metric of a size is bold.
    """
    methods = [method for method in config.options("quant") if any(row.method == method for row in table)]
    chosen: dict[str, list[Row | None]] = {}
    for method in methods:
        own = [(row.better(row.valid), row) for row in table if row.method == method and row.valid is not None]
        fitting = [[(good, row) for good, row in own if row.size <= limit * MIB and isfinite(good)] for limit in limits]
        chosen[method] = [max(pairs, key=lambda pair: pair[0])[1] if pairs else None for pairs in fitting]
    best = [
        max((row.better(row.value) for row in column if row), default=None)
        for column in zip(*chosen.values(), strict=True)
    ]

    def cell(row: Row | None, best: float | None) -> str:
        if row is None:
            return ""
        text = f"**{metric(row)}**" if row.better(row.value) == best else metric(row)
        return f"{text} ({row.own_setting})" if row.own_setting else text

    headings = [f"test {table[0].metric} {arrow(table[0])}", *(f"≤ {limit:g} MiB" for limit in limits)]
    lines = [_line(headings), "|" + "---|" * len(headings)]
    lines += [_line([method, *map(cell, found, best)]) for method, found in chosen.items() if any(found)]
    rows = [row for found in chosen.values() for row in found if row]
    return "\n".join(lines + _noted(notes(rows, brief=True))) + "\n"


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

    pattern = r"(<!-- (table|sizes|overview|matrix):([\w,]*) ?([\d.,]*) -->).*?(<!-- end -->)"
    path.write_text(re.sub(pattern, block, path.read_text(), flags=re.DOTALL))
