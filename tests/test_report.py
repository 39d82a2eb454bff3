"""The report: rows grouped over seeds, sorted, the best marked, beside published numbers; and the committed results."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, cli

from bitfront.cells.record import Record, read, read_all, text_of
from bitfront.errors import BitfrontError
from bitfront.reports.figures import draw
from bitfront.reports.papers import Published, published
from bitfront.reports.readme import fill
from bitfront.reports.rows import MIB, Row, learned_bits, limit, rows
from bitfront.reports.tables import markdown

RECORDS = REPOSITORY / "results" / "records"
HEADER = "recipe,table,model,task,method,setting,metric,value,size,certainty,source,note\n"


def fake(method: str, size: float, value: float, seed: int = 0, **more: Any) -> Record:
    """A record with little in it."""
    return Record.of({
        "id": f"{method}{size}{seed}", "task": "vit", "method": method, "setting": f"x={size}", "seed": seed,
        "config": {
            "task": {}, "train": {}, "quant": {"size": size}, "init_from": None, "smoke": False, "seed": seed,
            "trainer": {"precision": "32-true"},
        },
        "overrides": [f"quant={method}"], "environment": {"dirty": False}, "init_sha256": None,
        "artifact": "model.safetensors", "artifact_sha256": f"{method}{size}{seed}",
        "primary": {"name": "top1", "higher_is_better": True, "value": value},
        "metrics": {"test": {"top1": value, "top5": 99.0}},
        "sizes": {"file": size, "payload": size, "float": 4000, "rule_mb": 0.0, "parameters": 1000},
        "widths": {"a.weight": [0, 0, 10, 30]},
        "stages": {
            "train": {"seconds": 60.0, "peak_memory": 2**30},
            "evaluate": {"seconds": 30.0, "peak_memory": 2**31},
        },
        "history": [{"epoch": 1, "train/loss": 1.0}],
    } | more)  # fmt: skip


def low(value: float) -> dict[str, Any]:
    """Of which less is better."""
    return {"primary": {"name": "top1", "higher_is_better": False, "value": value}}


def number(value: float | None, **more: Any) -> Published:
    """What a paper says about the cell of ``fake("lsq", 1000, ...)``."""
    return Published(**{
        "paper": "lsq", "table": "Tab. 1", "model": "ViT", "task": "vit", "method": "lsq", "setting": "x=1000",
        "metric": "top1", "value": value, "size": None, "certainty": "quoted", "source": "arXiv", "note": "",
    } | more)  # fmt: skip


def test_rows_are_seeds_together_sorted_by_size_with_the_front_marked() -> None:
    table = rows(
        [
            fake("b", 2000, 90.0),
            fake("a", 1000, 80.0, 1),
            fake("a", 1000, 82.0, 0),
            fake("c", 1500, 79.0),
            fake("d", 2500, 90.0),
        ]
    )
    assert [(r.method, r.best) for r in table] == [("a", True), ("c", False), ("b", True), ("d", False)]
    assert table[0].values == [82.0, 80.0] and table[0].value == 81 and table[0].spread == pytest.approx(2**0.5)
    assert (table[0].size, table[0].ratio, table[0].bits) == (1000, 4, 8)
    assert table[0].seconds == {"cpu": 60} and table[0].memory == 2**31 and table[0].gpu_memory is None


def test_a_change_is_from_the_network_that_a_run_starts_from() -> None:
    start = {seed: fake("float", 4000, 80.0 + 5 * seed, seed) for seed in (0, 1)}
    runs = [
        fake("a", 1000, start[seed].primary.value - lost, seed, init_sha256=start[seed].artifact_sha256)
        for seed, lost in ((0, 0.5), (1, 0.7))
    ]
    table = {row.method: row for row in rows([*start.values(), *runs, fake("b", 500, 70.0, init_sha256="gone")])}
    assert table["a"].changes == pytest.approx([-0.5, -0.7]) and not table["float"].changes and not table["b"].changes
    assert table["a"].error == pytest.approx(0.02**0.5) and table["float"].error > 3
    assert "| -0.60 ± 0.14 |" in markdown(list(table.values()))
    assert "Δ start" not in markdown(rows([*start.values(), fake("b", 500, 70.0)]))


def test_the_front_is_what_no_other_row_beats() -> None:
    values = [(1000, 80.0), (1000, 80.0), (1000, 79.0), (1200, 80.0), (1300, 85.0), (1300, 81.0), (1400, 84.0)]
    table = rows([fake(f"m{n}", size, value, setting="") for n, (size, value) in enumerate(values)])

    def beaten(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return b[0] <= a[0] and b[1] >= a[1] and b != a

    for row in table:
        cell = (row.size, row.value)
        assert row.best == (not any(beaten(cell, other) for other in values))


@pytest.mark.parametrize("less", [False, True])
def test_a_run_that_diverged_is_not_the_best(less: bool, tmp_path: Path) -> None:
    table = rows(
        [fake(name, size, x, **low(x) if less else {}) for name, size, x in (("a", 1, math.nan), ("b", 2, 50))]
    )
    assert [row.best for row in table] == [False, True]
    draw(table[:1], [], tmp_path / "x")
    assert (tmp_path / "x.svg").is_file()


def test_errors_that_span_decades_have_a_logarithmic_axis(tmp_path: Path) -> None:
    for most, next_one in ((150, "50"), (60, "25")):
        values = [20 + (most - 20) * n / 9 for n in range(10)]
        draw(rows([fake("a", 2**20 * value, value, **low(value)) for value in values]), [], tmp_path / "x")
        upright = re.findall(r"text-anchor: end[^>]*>(\d+)</text>", (tmp_path / "x.svg").read_text())
        assert upright[:2] == ["20", next_one]


def test_precisions_are_rows_of_their_own_and_copies_count_once() -> None:
    mixed = fake("a", 1000, 50.0, 7)
    mixed.config["trainer"] = {"precision": "bf16-mixed"}
    table = rows([fake("a", 1000, 80.0), fake("a", 1000, 80.0), mixed])
    assert [row.values for row in table] == [[80.0], [50.0]]


def test_seeds_are_together_however_their_setting_is_spelled() -> None:
    table = rows([fake("a", 1000, 80.0, setting="penalty=1.0"), fake("a", 1000, 82.0, 1, setting="penalty=1")])
    assert [row.values for row in table] == [[80.0, 82.0]]


def test_an_option_that_came_later_and_is_off_does_not_part_seeds() -> None:
    later = fake("a", 1000, 81.0, 1)
    later.config["quant"] = later.config["quant"] | {"layers": None}
    assert [row.values for row in rows([fake("a", 1000, 80.0), later])] == [[80.0, 81.0]]


def test_what_all_rows_of_a_task_share_is_said_once() -> None:
    common = "trainer.precision=bf16-mixed bits=2"
    several = rows([fake(name, 10, 1.0, setting=f"{common} J={name}") for name in "ab"])
    assert [row.own_setting for row in several] == ["bits=2 J=a", "bits=2 J=b"]
    assert "\n\nall with trainer.precision=bf16-mixed\n" in markdown(several)
    (single,) = rows([fake("a", 10, 1.0, setting=common)])
    assert single.own_setting == common and "all with" not in markdown([single])


def test_runs_on_other_data_of_the_same_name_are_named() -> None:
    made = [fake(name, 10, 1.0, environment={"dirty": False, "data": "a1"}) for name in "ab"]
    assert "other data" not in markdown(rows([*made, fake("old", 10, 1.0)]))
    changed = fake("c", 10, 1.0, setting="bits=2", environment={"dirty": False, "data": "b2"})
    assert "on other data than most: c bits=2\n" in markdown(rows([*made, changed])) + "\n"


def test_a_run_says_when_its_widths_had_no_choice() -> None:
    config = fake("diffq", 1000, 1.0).config
    limits = config | {"quant": {"min_bits": 2, "max_bits": 15}}
    for widths, told in (
        ({"a": [0, 0, 9], "b": [0, 0, 1]}, "all weights at the smallest width (2 bits)"),
        ({"a": [0] * 15 + [9]}, "all weights at the largest width (15 bits)"),
    ):
        assert told in fake("diffq", 1000, 1.0, config=limits, widths=widths).summary()
        assert "width" not in fake("rtn", 1000, 1.0, config=config, widths=widths).summary()
    assert "width" not in fake("diffq", 1000, 1.0, config=limits, widths={"a": [0, 0, 9], "b": [0, 0, 1, 1]}).summary()


def test_lower_can_be_better() -> None:
    table = rows([fake("a", 10, 0, **low(5.0)), fake("b", 20, 0, **low(5.0))])
    assert [r.best for r in table] == [True, False]


def test_tasks_have_their_own_front_and_smoke_runs_their_own_table() -> None:
    small = fake("a", 10, 99.0)
    small.config["smoke"] = True
    table = rows([small, fake("b", 20, 50.0), fake("b", 20, 40.0, 1, task="lm")])
    assert [(r.task, r.best) for r in table] == [("lm", True), ("vit", True), ("vit-smoke", True)]


def test_a_cell_is_compared_with_its_own_number() -> None:
    other = number(70.0, setting="x=2000")
    (row,) = rows(
        [fake("lsq", 1000, 80.0), fake("lsq", 1000, 82.0, 1)], [other, number(79.5), number(9, metric="hours")]
    )
    assert row.paper == number(79.5) and row.difference == pytest.approx(1.5)
    small = fake("lsq", 1000, 80.0)
    small.config["smoke"] = True
    assert rows([fake("lsq", 1000, 80.0)], [other])[0].paper is None and not rows([small], [other])[0].papers


def test_on_data_of_the_users_own_a_setting_says_which_number_is_of_the_same() -> None:
    own = fake("lsq", 1000, 80.0)
    own.config["task"] = {"fingerprint": "0123456789-abcdef", "data": "places/wikitext2"}
    (row,) = rows([own], [number(79.5)])
    assert row.task == "vit-wikitext2-0123" and row.paper == number(79.5)
    (other,) = rows([fake("lsq", 1000, 80.0, setting="x=1000 data=mine")], [number(79.5)])
    assert other.paper is None


def test_settings_that_are_the_same_compare_however_they_are_spelled() -> None:
    setting = "penalty=5.0 task.pretrained=true quant.layers={a: {bits: 8}, b: {bits: 4}} train.lr=0.001 model=resnet18"
    ours = [fake("lsq", 1000, 80.0, setting=setting)]
    (row,) = rows(
        ours,
        [
            number(
                79.0,
                setting="model=resnet18 quant.layers={a:{bits:8},b:{bits:4}} penalty=5 task.pretrained=True "
                "train.lr=1e-3",
            )
        ],
    )
    assert row.paper and row.paper.value == 79.0
    (row,) = rows(ours, [number(79.0, setting="penalty=50 task.pretrained=True train.lr=1e-3 model=resnet18")])
    assert row.paper is None


def test_of_several_numbers_the_methods_own_paper_counts() -> None:
    papers = [
        number(99.5, paper="aaa", metric="top5"),
        number(77.0, paper="diffq"),
        number(78.0),
        number(76.0, paper="b"),
    ]
    (row,) = rows([fake("lsq", 1000, 80.0)], papers)
    assert [(p.paper, p.metric) for p in row.papers] == [
        ("lsq", "top1"), ("b", "top1"), ("diffq", "top1"), ("aaa", "top5"),
    ]  # fmt: skip
    (row,) = rows([fake("lsq", 1000, 80.0)], papers[:1])
    assert row.difference == pytest.approx(-0.5)  # in the paper's metric
    recalled, quoted = number(78.0, paper="aaa", certainty="recalled"), number(77.0, paper="b")
    assert rows([fake("lsq", 1000, 80.0)], [recalled, quoted])[0].paper == quoted
    sized = number(None, size=2.0 * MIB)
    (row,) = rows([fake("lsq", 1000, 80.0)], [sized, number(78.0, paper="b")])
    assert row.paper_file == sized and row.paper and row.paper.value == 78.0


def test_published_numbers_are_read_from_the_recipes(tmp_path: Path) -> None:
    (tmp_path / "lsq").mkdir()
    path = tmp_path / "lsq" / "paper.csv"
    path.write_text(
        HEADER
        + "x,Tab. 1,ViT,vit,lsq,bits=2,top1,67.6,2.5,recalled,arXiv,a note\n,Tab. 2,X,,OmniQuant,,ppl,,,unsure,,\n"
    )
    (found,) = published(tmp_path)  # the other has no cell
    assert (found.paper, found.setting, found.value, found.size) == ("lsq", "bits=2", 67.6, 2.5 * MIB)
    assert published(tmp_path / "nowhere") == []
    for wrong in ("x,,,vit,lsq,,top1,much,,quoted,,\n", "x,,,vit,lsq,,top1,1,,sure,,\n", "x,,vit\n"):
        path.write_text(HEADER + wrong)
        with pytest.raises(BitfrontError, match=r"paper\.csv', line 2"):
            published(tmp_path)


def test_the_recipes_can_be_read() -> None:
    assert all(p.task and p.metric for p in published())


def test_commands_make_the_run_again() -> None:
    record = fake("rtn", 1000, 80.0, overrides=["quant=rtn", "quant.layers={head*: {bits: 8}}"])
    assert record.command == "python -m src.run quant=rtn 'quant.layers={head*: {bits: 8}}'"


def test_bits_are_learned_where_they_differ_within_a_tensor() -> None:
    record = fake("a", 1000, 80.0, widths={"a": [0, 0, 10, 30], "b": [0, 0, 5], "raw": [0]})
    assert learned_bits(record) == {"a": 2.75, "b": 2.0}
    assert learned_bits(replace(record, widths={"a": [0, 0, 5], "b": [0, 0, 0, 5]})) == {}


def test_a_start_given_by_its_path_is_shown_by_its_run() -> None:
    record = fake("a", 1000, 80.0)
    for given, shown in (("runs/vit/float/ab12/model.safetensors", "ab12"), ("float", "float"), ("x.safetensors",) * 2):
        (row,) = rows([replace(record, setting=f"bits=2 init_from={given} J=0")])
        assert row.setting == f"bits=2 init_from={shown} J=0"


def test_figures_are_the_same_every_time(tmp_path: Path) -> None:
    layers = [{"name": "a.0.weight", "loss": 0.1}, {"name": "a.1.weight", "loss": 0.01}, {"name": "looked up"}]
    layers = [entry | {"inputs": 8} for entry in layers]
    records = [fake("diffq", 1000, 80.0), fake("rtn", 2000, 90.0, calibration={"layers": layers})]
    papers = [number(85.0, size=1500.0), number(None)]
    draw(rows(records, papers), papers, tmp_path / "x")
    names = {"x.png", "x.svg", "x_bits.svg", "x_layers.svg"}
    first = {name: (tmp_path / name).read_bytes() for name in names}
    assert {path.name for path in tmp_path.iterdir()} == names and first["x.png"][:4] == b"\x89PNG"
    assert (
        b"lsq, published" in first["x.svg"]
        and b"a.1" in first["x_layers.svg"]
        and b"blind" not in first["x_layers.svg"]
    )
    draw(rows(records, papers), papers, tmp_path / "x")
    assert all((tmp_path / name).read_bytes() == content for name, content in first.items())


def test_rows_far_below_lie_on_the_edge_with_their_value(tmp_path: Path) -> None:
    def ticks(table: list[Row]) -> set[str]:
        draw(table, [], tmp_path / "x")
        return set(re.findall(r">([\w. ]+)</text>", (tmp_path / "x.svg").read_text()))

    near = [fake("lsq", 1000, 80.0), fake("rtn", 1500, 79.0), fake("float", 4000, 81.0)]
    assert "rtn 12.5" in ticks(rows([*near, fake("rtn", 1000, 12.5)]))
    assert "20" not in ticks(rows([*near, fake("rtn", 1000, 12.5)]))
    assert "rtn 813" in ticks(rows([fake("a", 1000, 0, **low(80.0)), fake("rtn", 1000, 0, **low(812.6))]))
    behind_one = [1.11, 1.31, 1.48, 1.81, 2.77, 3.64]  # the first of which is all of the front
    table = rows([fake(f"m{n}", 1000 + n, 0, **low(value)) for n, value in enumerate(behind_one)])
    assert limit(table, []) == -math.inf


def test_readme_blocks_are_replaced_and_the_rest_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- table:vit -->\nold\n<!-- end -->\nb\n<!-- table:lm -->\nkept\n<!-- end -->\n")
    fill(page, {"vit": rows([fake("a", 1000, 80.0)])})
    text = page.read_text()
    assert "old" not in text and "kept" in text and "| a |" in text and text.startswith("a\n") and "\nb\n" in text


def test_the_overview_has_the_cells_without_options(tmp_path: Path) -> None:
    usual = [
        fake("float", 4 * 2**20, 90.0, setting=""),
        fake("rtn", 2**20, 80.0, setting="bits=4"),
        fake("rtn", 2**19, 60.0, setting="bits=2"),
    ]
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- overview:vit -->\nold\n<!-- end -->\nb\n<!-- overview:vit,lm -->\nkept\n<!-- end -->\n")
    fill(page, {"vit": rows(usual)})
    text = page.read_text()
    assert "| float | 90 (4.000 MiB) |" in text and "| rtn | 80 (1.000 MiB, bits=4) |" in text
    assert "60" not in text and "| gptq |" not in text and "old" not in text and "kept" in text


def test_of_files_that_fit_the_one_with_the_best_validation_metric_is_shown(tmp_path: Path) -> None:
    def run(method: str, mib: float, value: float, valid: float, seed: int = 0) -> Record:
        metrics = {"test": {"top1": value}, "valid": {"top1": valid}}
        return fake(method, mib * MIB, value, seed, metrics=metrics)

    runs = [run("rtn", 1, 80.0, 81.0), run("rtn", 2, 95.0, 70.0), run("lsq", 1.5, 84.0, 90.0), run("float", 9, 90, 90)]
    runs += [run("rtn", 0.5, 9.0, math.nan), run("lsq", 1.4, 99.0, 99.0)]  # of one seed, where another has two
    page = tmp_path / "page.md"
    page.write_text("<!-- sizes:vit 1.2,2,9.5 -->\nold\n<!-- end -->\n")
    fill(page, {"vit": rows([*runs, run("lsq", 1.5, 86.0, 90.0, 1)])})
    assert page.read_text().splitlines()[1:-1] == [
        "| test top1 ↑ | ≤ 1.2 MiB | ≤ 2 MiB | ≤ 9.5 MiB |",
        "|---|---|---|---|",
        "| float |  |  | **90.00** (x=9437184) |",
        f"| lsq |  | **85.00 ± 1.41** (x={1.5 * MIB}) | 85.00 ± 1.41 (x={1.5 * MIB}) |",
        "| rtn | **80.00** (x=1048576) | 80.00 (x=1048576) | 80.00 (x=1048576) |",
    ]


def test_what_all_shown_files_share_is_said_once(tmp_path: Path) -> None:
    def run(method: str, size: int, setting: str) -> Record:
        return fake(method, size, 80.0, setting=setting, metrics={"test": {"top1": 80.0}, "valid": {"top1": size}})

    half = "trainer.precision=bf16-mixed"
    runs = [run("lsq", 30, f"bits=3 {half}"), run("rtn", 40, f"bits=4 {half}"), run("rtn", 20, "bits=2")]
    page = tmp_path / "page.md"
    page.write_text("<!-- sizes:vit 1 -->\n<!-- end -->\n")
    fill(page, {"vit": rows(runs)})
    text = page.read_text()
    assert "(bits=3)" in text and "(bits=4)" in text and text.count(half) == 1 and f"all with {half}" in text


@pytest.mark.parametrize("block", ["table:", "sizes:vit", "sizes:vit 1,,2", "sizes: 1"])
def test_a_block_that_lacks_something_is_named(tmp_path: Path, block: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"<!-- {block} -->\n<!-- end -->\n")
    with pytest.raises(BitfrontError, match=rf"page\.md': '<!-- {block} -->' should be"):
        fill(page, {"vit": rows([fake("a", 1000, 80.0)])})


def test_where_less_is_better_the_least_is_bold(tmp_path: Path) -> None:
    def run(method: str, size: int, value: float) -> Record:
        metrics = {"test": {"wer": value}, "valid": {"wer": value}}
        return fake(
            method, size, 0, primary={"name": "wer", "higher_is_better": False, "value": value}, metrics=metrics
        )

    page = tmp_path / "page.md"
    page.write_text("<!-- sizes:vit 1 -->\n<!-- end -->\n")
    fill(page, {"vit": rows([run("lsq", 10, 5.0), run("lsq", 20, 4.0), run("rtn", 10, 6.0)])})
    assert "| lsq | **4** (x=20) |\n| rtn | 6 (x=10) |\n" in page.read_text()


def test_the_matrix_counts_runs_of_every_cell_and_names_gpus(tmp_path: Path) -> None:
    runs = [fake("rtn", 10, 1.0), fake("rtn", 10, 2.0, 1), fake("rtn", 20, 2.0), fake("lsq", 5, 1.0, device="H100")]
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- matrix: -->\n<!-- end -->\nb\n")
    fill(page, {"vit": rows(runs)})
    lines = {line.split(" | ")[0][2:]: line.strip("| ").split(" | ") for line in page.read_text().splitlines()[2:-2]}
    methods = page.read_text().splitlines()[2].strip("| ").split(" | ")
    assert dict(zip(methods, lines["vit"][1:], strict=True)) == dict.fromkeys(methods, "·") | {
        "rtn": "3",
        "lsq": "1, 1 on H100",
    }
    assert set(lines["lm"][1:]) == {"·"}


def test_readme_and_results_are_what_the_records_say(tmp_path: Path) -> None:
    originals = [REPOSITORY / "README.md", REPOSITORY / "results" / "README.md"]
    copies = [tmp_path / "README.md", tmp_path / "results.md"]
    for original, copy in zip(originals, copies, strict=True):
        copy.write_text(original.read_text())
    readme = ",".join(map(str, copies))
    result = cli("report", str(RECORDS), f"out={tmp_path / 'out'}", f"readme={readme}")
    assert result.returncode == 0, result.stderr
    for original, copy in zip(originals, copies, strict=True):
        assert copy.read_text() == original.read_text()
    made = [path for path in (tmp_path / "out").iterdir() if path.suffix in (".csv", ".md", ".tex", ".svg")]
    assert {path.stem for path in made} >= {"vit", "vit_bits", "vit_layers"}
    for path in made:  # tables and vector figures, of every task
        assert path.read_bytes() == (REPOSITORY / "results" / path.name).read_bytes(), path.name
    assert all(not r.environment["dirty"] and not r.smoke for r in read_all(RECORDS))


def test_numbers_in_the_prose_of_results_are_in_its_tables() -> None:
    text = (REPOSITORY / "results" / "README.md").read_text()
    tables = "".join(re.findall(r"<!-- \w+:.*?<!-- end -->", text, re.DOTALL))
    more = [path for part in ("benchmarks", "scales") for path in (REPOSITORY / "results" / part).glob("*.md")]
    tables += "".join(path.read_text() for path in more)
    prose = re.sub(r"<!-- \w+:.*?<!-- end -->", "", text, flags=re.DOTALL)
    numbers = set(re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])", prose))
    assert numbers
    assert numbers <= set(re.findall(r"\d+\.\d+", tables)), "typed, or no longer so"


@pytest.mark.parametrize(
    "wrong",
    [
        {"task": "../../elsewhere"}, {"id": "/x"}, {"environment": {}}, {"config": {}}, {"stages": {"a": 1}},
        {"widths": {"a": 5}}, {"primary": {"name": "top1", "higher_is_better": True, "value": "x"}}, {"sizes": {}},
        {"colour": "red"}, {"metrics": {"test": {}}}, {"seed": "0"},
    ],
)  # fmt: skip
def test_a_foreign_record_is_none(tmp_path: Path, wrong: dict[str, Any]) -> None:
    content = fake("a", 1000, 80.0).as_json()
    path = tmp_path / "record.json"
    path.write_text(text_of("finished", content))
    assert read(path)
    path.write_text(text_of("finished", content | wrong))
    assert read(path) is None and read_all(tmp_path) == []


def test_filters(tmp_path: Path) -> None:
    words = ("task=vit", "method=diffq", "max_size=0.15", f"out={tmp_path}")
    result = cli("report", str(RECORDS), *words)
    assert result.returncode == 0, result.stderr
    found = list(csv.DictReader(io.StringIO((tmp_path / "vit.csv").read_text())))
    assert found and {row["method"] for row in found} == {"diffq"}
    assert all(float(row["bytes"]) <= 0.15 * MIB for row in found) and not (tmp_path / "lm.csv").exists()


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (("/nowhere",), "no finished runs in '/nowhere'"),
        (("colour=red",), "unknown option"),
        (("max_size=big",), "takes a number"),
        ((str(RECORDS), "method=none"), "no run of method=none"),
        ((str(RECORDS), "task=vit", "readme=README.md"), "filled from all runs"),
    ],
)
def test_mistakes(words: tuple[str, ...], answer: str) -> None:
    result = cli("report", *words)
    assert result.returncode != 0 and answer in result.stderr and "Traceback" not in result.stderr


def test_files_are_written_though_nobody_reads_the_table(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "src.report", str(RECORDS), "task=vit", "method=rtn", f"out={tmp_path}"]
    reader = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert reader.stdout is not None
    reader.stdout.close()
    assert reader.wait(100) == 0 and reader.stderr is not None and not reader.stderr.read()
    assert (tmp_path / "report.html").exists()


def test_tables_come_before_anything_that_draws_is_imported() -> None:
    late = {"torch", "matplotlib", "numpy", "pandas", "jinja2"}
    code = f"import sys, bitfront.commands.report; sys.exit(bool({late} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_records_that_cannot_be_read_are_told_and_the_others_shown(tmp_path: Path) -> None:
    good = fake("lsq", 1000, 70.0)
    content = good.as_json()
    wrong = {
        "newer": json.dumps({"schema": "bitfront/record/99", "status": "finished"} | content),
        "cut": text_of("finished", content)[:-50],
        "deep": "[" * 10**5,
        "without a part": text_of("finished", content | {"config": {"task": 3}}),
        "without a size": text_of("finished", content | {"sizes": content["sizes"] | {"file": 0}}),
        "with another path": text_of("finished", content | {"task": "../../x"}),
    }
    others = {"failed": text_of("failed", {"id": "x"}), "other": "[1, 2]", "good": text_of("finished", content)}
    for name, text in (wrong | others).items():
        (tmp_path / f"{name}.json").write_text(text)
    skipped: dict[Path, str] = {}
    assert read_all(tmp_path, skipped) == [good]
    assert {path.stem for path in skipped} == wrong.keys() and all(skipped.values())
    result = cli("report", str(tmp_path))
    assert result.returncode == 0 and "skipped 6 that cannot be read" in result.stdout and "lsq" in result.stdout
