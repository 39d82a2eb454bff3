"""Tables and figures of finished runs: which method keeps the accuracy at which size.

    python -m src.report                          every run below runs/
    python -m src.report results/records task=vit method=diffq max_size=0.3 out=tables

Prints a table per task, sorted by size, and writes it as CSV and Markdown with a figure (PNG, SVG) to ``out``.
Sizes are those of the files on disk, in MiB; a star marks rows that no other row beats in both size and metric.
"""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from src import config, record
from src.errors import BitfrontError

MIB = 2**20
OPTIONS = {"task": "", "method": "", "max_size": 0.0, "out": "", "readme": ""}
HEADINGS = ("", "method", "setting", "MiB", "ratio", "bits/w", "metric", "seeds", "minutes", "runs")
CONSOLE = Console(highlight=False, markup=False)


@dataclass
class Row:
    """One method and setting on one task, over its seeds.

    Attributes:
        size: of the file in bytes, mean over seeds.
        values: the task's primary metric on the test split, by seed.
        best: not beaten in both size and metric by any other row of its task.
    """

    task: str
    method: str
    setting: str
    metric: str
    higher_is_better: bool
    size: float
    float_size: float
    parameters: int
    values: list[float]
    seconds: float
    runs: list[str]
    best: bool = False

    @property
    def value(self) -> float:
        """Mean of the metric."""
        return statistics.mean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation of the metric over seeds; 0 for one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def cells(self) -> tuple[str, ...]:
        """As text, in the order of ``HEADINGS``."""
        spread = f" ± {self.spread:.2f}" if len(self.values) > 1 else ""
        return (
            "*" if self.best else "",
            self.method,
            self.setting,
            f"{self.size / MIB:.3f}",
            f"{self.float_size / self.size:.2f}",
            f"{8 * self.size / self.parameters:.2f}",
            f"{self.value:.2f}{spread}" if abs(self.value) >= 10 else f"{self.value:.4g}{spread}",
            str(len(self.values)),
            f"{self.seconds / 60:.1f}",
            " ".join(self.runs),
        )


def rows(records: Sequence[dict[str, Any]]) -> list[Row]:
    """Records grouped over seeds, sorted by task and size, with the best marked."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for each in {r["id"]: r for r in records}.values():
        same = {key: each["config"][key] for key in ("task", "train", "quant", "init_from", "smoke", "trainer")}
        same["trainer"] = same["trainer"]["precision"]
        key = json.dumps([each["task"], each["method"], each["setting"], same], sort_keys=True)
        groups.setdefault(key, []).append(each)
    table = [_row(sorted(group, key=lambda r: (r["seed"], r["id"]))) for group in groups.values()]
    table.sort(key=lambda row: (row.task, row.size, row.method, row.setting))
    for row in table:
        row.best = not any(_beats(other, row) for other in table if other.task == row.task)
    return table


def _row(group: list[dict[str, Any]]) -> Row:
    first = group[0]
    return Row(
        task=first["task"] + ("-smoke" if first["config"]["smoke"] else ""),
        method=first["method"],
        # of a start given by its path, the run's directory
        setting=re.sub(r"(init_from=)\S*?([^/\s]+)/[^/\s]+(?!\S)", r"\1\2", first["setting"]),
        metric=first["primary"]["name"],
        higher_is_better=first["primary"]["higher_is_better"],
        size=statistics.mean(r["sizes"]["file"] for r in group),
        float_size=first["sizes"]["float"],
        parameters=first["sizes"]["parameters"],
        values=[r["primary"]["value"] for r in group],
        seconds=statistics.mean(sum(stage["seconds"] for stage in r["stages"].values()) for r in group),
        runs=[r["id"] for r in group],
    )


def _beats(a: Row, b: Row) -> bool:
    sign = 1 if a.higher_is_better else -1
    no_worse = a.size <= b.size and sign * a.value >= sign * b.value
    return no_worse and (a.size < b.size or sign * a.value > sign * b.value)


def markdown(table: Sequence[Row]) -> str:
    """One task's rows as a Markdown table."""
    headings = [row_metric(table) if h == "metric" else h for h in HEADINGS]
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    lines += ["| " + " | ".join(row.cells()) + " |" for row in table]
    return "\n".join(lines) + "\n"


def row_metric(table: Sequence[Row]) -> str:
    """Heading of the metric's column."""
    return f"test {table[0].metric}"


def as_csv(table: Sequence[Row]) -> str:
    """One task's rows as CSV, with all digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    numbers = ("bytes", "ratio", "bits_per_weight", "metric", "mean", "std", "seeds", "seconds")
    writer.writerow(("best", "method", "setting", *numbers, "runs"))
    for row in table:
        ratio, bits = row.float_size / row.size, 8 * row.size / row.parameters
        values = (row.size, ratio, bits, row.metric, row.value, row.spread, len(row.values), row.seconds)
        writer.writerow((int(row.best), row.method, row.setting, *values, " ".join(row.runs)))
    return text.getvalue()


def draw(table: Sequence[Row], stem: Path) -> None:
    """Metric against file size with the front of the best rows, as ``stem.png`` and ``stem.svg``."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "bitfront", "font.size": 10, "axes.spines.top": False})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    front = [row for row in table if row.best]
    axes.step(
        [r.size / MIB for r in front], [r.value for r in front], where="post", color="0.75", zorder=0, label="front"
    )
    for number, method in enumerate(sorted({row.method for row in table})):
        points = [row for row in table if row.method == method]
        axes.errorbar(
            [row.size / MIB for row in points],
            [row.value for row in points],
            yerr=[row.spread for row in points] if any(row.spread for row in points) else None,
            fmt="osD^vP*X"[number % 8],
            color=f"C{number}",
            capsize=2,
            label=method,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.set(xlabel="file size, MiB", ylabel=row_metric(table), title=table[0].task)
    axes.grid(alpha=0.25)
    axes.spines["right"].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(stem.with_suffix(".png"), dpi=150, metadata={"Software": None})
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
    pyplot.close(figure)


def show(table: Sequence[Row]) -> None:
    """Print one task's rows."""
    grid = Table(title=table[0].task, header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    grid.caption = f"* not beaten in size and {row_metric(table)}; MiB of the file; file bits per parameter"
    for heading in HEADINGS[:-1]:
        text = row_metric(table) if heading == "metric" else heading
        grid.add_column(
            text, justify="left" if heading in ("", "method", "setting") else "right", no_wrap=heading != "setting"
        )
    for row in table:
        grid.add_row(*row.cells()[:-1])
    CONSOLE.print(grid)


def overview(tables: dict[str, list[Row]], tasks: Sequence[str]) -> str:
    """Methods against tasks as a Markdown table: each cell as it runs without options, metric and MiB of the file."""
    parts = [tables[task] for task in tasks]
    headings = ["", *(f"{part[0].task}: {part[0].metric} {'↑' if part[0].higher_is_better else '↓'}" for part in parts)]
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for method in config.options("quant"):
        cells = []
        for part in parts:
            usual = config.load([f"task={part[0].task}", f"quant={method}"])["setting"]
            row = next((row for row in part if (row.method, row.setting) == (method, usual)), None)
            about = ", ".join([f"{row.size / MIB:.3f} MiB", *usual.split()]) if row else ""
            cells.append(f"{row.value:.4g} ({about})" if row else "")
        if any(cells):
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def fill_readme(path: Path, tables: dict[str, list[Row]]) -> None:
    """Replace what is between ``<!-- table:TASK -->`` and ``<!-- end -->`` by the task's table, and between
    ``<!-- overview:TASK,TASK -->`` and that by the tasks' overview."""

    def block(match: re.Match[str]) -> str:
        tasks = match[3].split(",")
        if not all(task in tables for task in tasks):
            return match[0]
        table = overview(tables, tasks) if match[2] == "overview" else markdown(tables[tasks[0]])
        return f"{match[1]}\n{table}{match[4]}"

    text = path.read_text()
    pattern = r"(<!-- (table|overview):([\w,]+) -->).*?(<!-- end -->)"
    path.write_text(re.sub(pattern, block, text, flags=re.DOTALL))


def main() -> None:
    """Read records, print and write their tables."""
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        CONSOLE.print(f"{__doc__}\nOptions: {' '.join(f'{key}=' for key in OPTIONS)}")
        return
    try:
        root = Path(words.pop(0)) if words and "=" not in words[0] else Path("runs")
        chosen = config.parse(words, OPTIONS)
        report(root, chosen)
    except (BitfrontError, OSError) as error:
        sys.exit(f"error: {error}")


def report(root: Path, chosen: dict[str, Any]) -> None:
    """Print and write the tables of the records below ``root``.

    Raises:
        BitfrontError: there are none.
    """
    table = rows(record.read_all(root))
    if not table:
        raise BitfrontError(
            f"no finished runs in '{root}'; make one with: python -m src.run task=vit quant=diffq penalty=5"
        )
    there = {(row.task, row.method) for row in table}
    smallest = min(row.size for row in table) / MIB
    table = [row for row in table if chosen["task"] in ("", row.task) and chosen["method"] in ("", row.method)]
    table = [row for row in table if not chosen["max_size"] or row.size <= chosen["max_size"] * MIB]
    if not table:
        tasks, methods = (", ".join(sorted(set(names))) for names in zip(*there, strict=True))
        raise BitfrontError(
            f"no run in '{root}' fits; there are task={tasks}, method={methods}, the smallest of {smallest:.3f} MiB"
        )
    out = Path(chosen["out"] or root / "report")
    out.mkdir(parents=True, exist_ok=True)
    tables = {task: [row for row in table if row.task == task] for task in sorted({row.task for row in table})}
    for task, part in tables.items():
        show(part)
        (out / f"{task}.csv").write_text(as_csv(part))
        (out / f"{task}.md").write_text(markdown(part))
        draw(part, out / task)
    if chosen["readme"]:
        fill_readme(Path(chosen["readme"]), tables)
    CONSOLE.print(f"tables and figures: {out}", soft_wrap=True)


if __name__ == "__main__":
    main()
