"""Figures of a task's rows: metric against size, bits per layer, loss per layer."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot, ticker

from bitfront.cells import compose
from bitfront.cells.record import Record
from bitfront.files import write_atomically
from bitfront.reports.columns import arrow
from bitfront.reports.papers import Published
from bitfront.reports.rows import MIB, Row, front, layer_losses, learned_bits, limit

STYLE: Any = {
    "svg.hashsalt": "bitfront",
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
HASH = re.compile(r"\b([cmp])[0-9a-f]{10}\b")
MARKERS = "osD^vP*X"
WIDE = 5  # times the least error, from which on errors have a logarithmic axis


def draw(table: Sequence[Row], papers: Sequence[Published], stem: Path) -> None:
    """All figures of a task, with names that begin with ``stem``: those that its rows have the numbers for."""
    with matplotlib.rc_context(STYLE):
        tradeoff(table, papers, stem)
        over_layers(table, learned_bits, stem.with_name(f"{stem.name}_bits"), "mean bits per weight")
        over_layers(table, layer_losses, stem.with_name(f"{stem.name}_layers"), "relative loss of the layer", log=True)


def tradeoff(table: Sequence[Row], papers: Sequence[Published], stem: Path) -> None:
    """Metric against file size, a line through each method's own front, and published numbers hollow, as PNG and SVG.

    Bars are standard deviations over seeds, of what changed from the start where there is one. Rows so much worse that
    the others could not be told apart lie on the edge, with their value.
    """
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    row = table[0]
    known = [(p.method, p.size / MIB, p.value) for p in papers if p.metric == row.metric and p.value and p.size]
    edge = limit(table, papers)
    usual = compose.options("quant")  # which look the same in every figure
    methods = {r.method for r in table} | {method for method, *_ in known}
    for number, method in enumerate([*usual, *sorted(methods.difference(usual))]):
        if method not in methods:
            continue
        look: dict[str, Any] = {"marker": MARKERS[number % len(MARKERS)], "color": f"C{number % 10}"}
        if own := [row for row in table if row.method == method]:
            _measured(axes, own, edge, look)
        theirs = [(x, y) for name, x, y in known if name == method]
        axes.errorbar(
            [x for x, _ in theirs],
            [y for _, y in theirs],
            linestyle="",
            markerfacecolor="none",
            label=f"{method}, published" if theirs else None,
            **look,
        )
    _name_beyond(axes, table, edge)
    axes.set_xscale("log")
    shown = [row.value for row in table if isfinite(row.value) and row.better(row.value) >= edge]
    if shown and not row.higher_is_better and max(shown) > WIDE * min(shown) > 0:
        axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(ticker.NullFormatter())
    axes.set(xlabel="file size, MiB", ylabel=f"test {row.metric} {arrow(row)}", title=row.task)
    if isfinite(edge) and row.higher_is_better:
        axes.set_ylim(bottom=edge)
    elif isfinite(edge):
        axes.set_ylim(top=-edge)
    axes.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150, metadata={"Software": None})
    write_atomically(stem.with_suffix(".png"), drawn.getvalue())
    _save(figure, stem)


def _measured(axes: Any, rows: Sequence[Row], edge: float, look: dict[str, Any]) -> None:
    """A method's rows with their bars, a line through their front, and on the edge those that are worse."""
    points = [row for row in rows if row.better(row.value) >= edge]
    axes.errorbar(
        [row.size / MIB for row in points],
        [row.value for row in points],
        yerr=[row.error for row in points] if any(row.error for row in points) else None,
        capsize=2,
        linestyle="",
        label=rows[0].method,
        **look,
    )
    line = front(points)
    sizes, values = [row.size / MIB for row in line], [row.value for row in line]
    axes.plot(sizes, values, color=look["color"], linewidth=1, alpha=0.5)
    beyond = [row.size / MIB for row in rows if row.better(row.value) < edge]
    axes.plot(beyond, [rows[0].better(edge)] * len(beyond), linestyle="", clip_on=False, zorder=3, **look)


def _name_beyond(axes: Any, table: Sequence[Row], edge: float) -> None:
    """The values of what lies on the edge, of each place together."""
    beyond: dict[str, list[Row]] = {}
    for row in table:
        if row.better(row.value) < edge:
            beyond.setdefault(f"{row.size / MIB:.3g}", []).append(row)
    inwards, side = (7, "bottom") if table[0].higher_is_better else (-7, "top")
    upright: dict[str, Any] = {"rotation": 90, "ha": "right", "va": side}  # as places are often close to each other
    for there in beyond.values():
        at = (there[0].size / MIB, there[0].better(edge))
        text = ", ".join(f"{row.method} {_short(row.value)}" for row in there)
        axes.annotate(text, at, (-4, inwards), textcoords="offset points", fontsize=7, **upright)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def over_layers(
    table: Sequence[Row],
    values: Callable[[Record], dict[str, float]],
    stem: Path,
    label: str,
    log: bool = False,
) -> None:
    """A line per method and setting over the layers in the network's order, as SVG; of seeds, the first one counts.

    Networks with other layers have axes of their own, and there is no file where no row has values.
    """
    networks: dict[tuple[str, ...], list[tuple[Row, dict[str, float]]]] = {}
    for row in table:
        if found := values(row.records[0]):
            networks.setdefault(tuple(found), []).append((row, found))
    if not networks:
        return
    width = min(max(6.0, 2 + 0.22 * max(map(len, networks))), 16.0)
    legends = [_legend(lines) for lines in networks.values()]
    width += max(columns * inches for columns, inches in legends)
    figure, grid = pyplot.subplots(
        len(networks), figsize=(width, 4.4 * len(networks)), layout="constrained", squeeze=False
    )
    for axes, (names, lines), (columns, _) in zip(grid[:, 0], networks.items(), legends, strict=True):
        _lines(axes, lines)
        _name_layers(axes, names)
        axes.set(ylabel=label, yscale="log" if log else "linear", title=table[0].task)
        if columns:
            axes.legend(fontsize=8, ncols=columns, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, stem)


def _label(row: Row, methods: Sequence[str]) -> str:
    return f"{row.method} {row.own_setting}".strip() if len(methods) > 1 else row.own_setting


def _legend(lines: Sequence[tuple[Row, dict[str, float]]]) -> tuple[int, float]:
    """Columns of a legend, none for many lines (the page names each), and inches that one takes at 8 points."""
    methods = sorted({row.method for row, _ in lines})
    columns = 1 + (len(lines) - 1) // 16 if len(lines) <= 32 else 0
    return columns, 0.5 + 0.065 * max(len(_label(row, methods)) for row, _ in lines)


def _lines(axes: Any, lines: Sequence[tuple[Row, dict[str, float]]]) -> None:
    """Methods by marker, and settings, from small to large files, by colour."""
    methods = sorted({row.method for row, _ in lines})
    for method in methods:
        own = [(row, found) for row, found in lines if row.method == method]
        for n, (row, found) in enumerate(own):
            axes.plot(
                list(found.values()),
                marker=MARKERS[methods.index(method) % len(MARKERS)],
                markersize=4,
                linewidth=1,
                color=matplotlib.colormaps["viridis"](n / max(1, len(own)) * 0.9),
                linestyle=("-", "--", ":", "-.")[methods.index(method) % 4],
                label=_label(row, methods),
            )


def _name_layers(axes: Any, names: Sequence[str]) -> None:
    """Names below the axis, thinned out where there are many, and a line between blocks: the depth."""
    step = 1 + len(names) // 64
    axes.set_xticks(range(0, len(names), step), [n.removesuffix(".weight") for n in names[::step]])
    axes.tick_params("x", labelrotation=90, labelsize=7)
    axes.grid(False, axis="x")
    blocks = [re.match(r"\D*\d*", name) for name in names]
    for n, (before, after) in enumerate(itertools.pairwise(m and m[0] for m in blocks)):
        if before != after:
            axes.axvline(n + 0.5, color="0.85", linewidth=0.8, zorder=0)


def _save(figure: Any, stem: Path) -> None:
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    write_atomically(stem.with_suffix(".svg"), _numbered(drawn.getvalue()))


def _numbered(svg: str) -> str:
    """With its names of shapes by their order: hashes of the last digits, they depend on the processor."""
    numbers: dict[str, str] = {}
    return HASH.sub(lambda found: numbers.setdefault(found[0], f"{found[1]}{len(numbers)}"), svg)
