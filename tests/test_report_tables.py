"""The report's tables in their formats hold the same cells, with nothing that the format would misread."""

from __future__ import annotations

import csv
import io
import re

import pytest
from rich.console import Console
from test_report import fake, number

from bitfront.cells.record import Record
from bitfront.reports.columns import columns
from bitfront.reports.papers import Published
from bitfront.reports.rows import MIB, Row, rows
from bitfront.reports.tables import as_csv, latex, markdown, show, tex


def printed(table: list[Row], width: int) -> str:
    console = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
    show(table, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_csv_and_markdown_hold_the_same_rows() -> None:
    table = rows([fake("a", 1000, 80.0), fake("b", 2000, 90.123456)])
    parsed = list(csv.DictReader(io.StringIO(as_csv(table))))
    assert [row["method"] for row in parsed] == ["a", "b"] and float(parsed[1]["mean"]) == 90.123456
    assert parsed[0]["paper"] == parsed[0]["difference"] == parsed[0]["peak_gpu_memory"] == ""
    assert parsed[0]["peak_memory"] == str(2**31) and parsed[0]["seconds"] == "60.0"
    text = markdown(table)
    assert text.count("\n") == 4 and "| 90.12 |" in text and "paper" not in text


def test_published_numbers_stand_beside_ours_with_their_certainty() -> None:
    records = [fake("lsq", 1000, 80.0), fake("ste", 2000, 81.0)]
    for certainty, mark in (("quoted", ""), ("computed", "†"), ("recalled", "‡"), ("unsure", "?")):
        table = rows(records, [number(79.5, size=0.5 * MIB, certainty=certainty)])
        heading, _, *lines = markdown(table).splitlines()
        line, other = (dict(zip(cells(heading), cells(text), strict=True)) for text in lines[:2])
        assert (line["paper MiB"], line["paper"], line["difference"]) == (f"0.5{mark}", f"79.50{mark}", "+0.50")
        assert (other["paper MiB"], other["paper"], other["difference"]) == ("", "", "")
        assert len(lines) == (4 if mark else 2) and all(line.startswith(mark) for line in lines[3:])  # the legend
        (parsed, _) = csv.DictReader(io.StringIO(as_csv(table)))
        assert (parsed["paper"], parsed["paper_certainty"], parsed["paper_value"]) == ("lsq", certainty, "79.5")
        assert mark in printed(table, 200) and tex(mark) in latex(table)
    table = rows(records, [number(98.0, metric="top5")])
    assert "| 98.00 top5 | +1.00 |" in markdown(table)


def test_runs_of_uncommitted_code_are_marked() -> None:
    table = rows([fake("a", 1000, 80.0, environment={"dirty": True}), fake("b", 2000, 70.0)])
    assert "| *! | a |" in markdown(table) and "|  | b |" in markdown(table) and "\n! " in markdown(table)


def test_memory_is_the_gpus_where_there_is_one() -> None:
    stages = {"train": {"seconds": 1.5, "peak_memory": 2**30, "peak_gpu_memory": 3 * 2**30}}
    assert "| 0.03 | 3.00 GPU |" in markdown(rows([fake("a", 1000, 80.0, stages=stages)]))
    assert "| 0.03 |  |" in markdown(rows([fake("a", 1000, 80.0, stages={"train": {"seconds": 1.5}})]))


def test_times_are_by_device() -> None:
    def run(seed: int, seconds: float, **device: str) -> Record:
        stages = {"train": {"seconds": seconds}, "evaluate": {"seconds": 9.0}}
        return fake("a", 1000, 80.0, seed, stages=stages, **device)

    (row,) = rows([run(0, 30.0, device="H100"), run(1, 600.0, device="cpu"), run(2, 300.0)])
    assert row.seconds == {"cpu": 450.0, "H100": 30.0}
    assert "| 7.5, 0.50 GPU |" in markdown([row]) and "\n\nGPU: H100\n" in markdown([row])
    (parsed,) = csv.DictReader(io.StringIO(as_csv([row])))
    assert (parsed["devices"], parsed["seconds"]) == ("cpu; H100", "450.0; 30.0")
    assert "GPU" not in markdown(rows([run(1, 600.0, device="cpu")]))


def test_readmes_table_is_narrower() -> None:
    table = rows([fake("lsq", 1000, 80.0)], [number(79.5)])
    assert set(columns(table, narrow=True)) < set(columns(table)) and "+0.50" in markdown(table, narrow=True)


def test_a_narrow_terminal_gets_fewer_columns_but_whole_cells() -> None:
    table = rows([fake("lsq", 1000, 80.0, setting="bits=2 model=resnet18 train.epochs=30"), fake("lsq", 2000, 81.0)])
    assert "lsq10000" in printed(table, 150) and "peak GiB" in printed(table, 150)
    narrow = printed(table, 76)
    assert "lsq10000" not in narrow and "…" not in narrow and "80.00" in narrow and "model=resnet18" in narrow
    assert max(map(len, narrow.splitlines())) <= 76


HOSTILE = r"a_b%c#d&e$f{g}h~i^j\k<l>m|n\"o"


def test_pipes_do_not_break_markdown() -> None:
    heading, _, line = markdown(rows([fake("a", 1000, 80.0, setting="model=a|b")])).splitlines()
    assert len(cells(heading)) == len(cells(line)) and r"model=a\|b" in line


@pytest.mark.parametrize("papers", [[], [number(79.5, certainty="recalled")]])
def test_latex_is_well_formed(papers: list[Published]) -> None:
    records = [fake("lsq", 1000, 80.0), fake("lsq", 1000, 82.0, 1), fake("ste", 2000, 70.0, setting=HOSTILE)]
    text = latex(rows(records, papers))
    parse(text)
    assert r"81.00 $\pm$ 1.41" in text and r"test top1 $\uparrow$" in text and tex(HOSTILE) in text
    assert (r"$\ddagger$" in text) == bool(papers)


def parse(text: str) -> None:
    """Environments nest, braces and mathematics close, and each row has as many cells as the table has columns."""
    stack = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if kind == "begin":
            stack.append(name)
        else:
            assert stack.pop() == name
    assert not stack
    plain = re.sub(r"\\[&%$#_{}]", "", text)  # without escaped letters
    depth = 0
    for letter in plain:
        depth += (letter == "{") - (letter == "}")
        assert depth >= 0
    assert depth == 0 and plain.count("$") % 2 == 0
    without_math = re.sub(r"\$[^$]*\$", "", plain)
    assert not set('#%_^~<>|"±↑↓†‡*') & set(without_math.replace(r"\begin{tabular}", ""))
    (columns_,) = re.findall(r"\\begin\{tabular\}\{([lr]+)\}", text)
    body = plain.split(r"\toprule")[1].split(r"\bottomrule")[0]
    table = [line for line in body.splitlines() if line.endswith(r"\\")]
    assert len(table) >= 3 and {line.count("&") + 1 for line in table} == {len(columns_)}
