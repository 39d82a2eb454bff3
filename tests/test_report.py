"""The table: grouped over seeds, sorted, the best marked; and README's block, generated from the committed records."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, command

from src.record import read_all
from src.report import as_csv, draw, fill_readme, markdown, rows


def fake(method: str, size: int, value: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "id": f"{method}{size}{seed}", "task": "vit", "method": method, "setting": f"x={size}", "seed": seed,
        "config": {
            "task": {}, "train": {}, "quant": {"size": size}, "init_from": None, "smoke": False,
            "trainer": {"precision": "32-true"},
        },
        "primary": {"name": "top1", "higher_is_better": True, "value": value},
        "sizes": {"file": size, "float": 4000, "parameters": 1000},
        "stages": {"train": {"seconds": 60.0}},
    } | more  # fmt: skip


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
    assert table[0].cells()[3:8] == ("0.001", "4.00", "8.00", "81.00 ± 1.41", "2")


def test_precisions_are_rows_of_their_own_and_copies_count_once() -> None:
    mixed = fake("a", 1000, 50.0, 7)
    mixed["config"]["trainer"] = {"precision": "bf16-mixed"}
    table = rows([fake("a", 1000, 80.0), fake("a", 1000, 80.0), mixed])
    assert [row.values for row in table] == [[80.0], [50.0]]


def test_lower_can_be_better() -> None:
    lower = {"primary": {"name": "wer", "higher_is_better": False, "value": 5.0}}
    table = rows([fake("a", 10, 0, **lower), fake("b", 20, 0, **lower)])
    assert [r.best for r in table] == [True, False]


def test_tasks_have_their_own_front_and_smoke_runs_their_own_table() -> None:
    small = fake("a", 10, 99.0)
    small["config"]["smoke"] = True
    table = rows([small, fake("b", 20, 50.0), fake("b", 20, 40.0, 1, task="lm")])
    assert [(r.task, r.best) for r in table] == [("lm", True), ("vit", True), ("vit-smoke", True)]


def test_csv_and_markdown_hold_the_same_rows(tmp_path: Path) -> None:
    table = rows([fake("a", 1000, 80.0), fake("b", 2000, 90.123456)])
    parsed = list(csv.DictReader(io.StringIO(as_csv(table))))
    assert [row["method"] for row in parsed] == ["a", "b"] and float(parsed[1]["mean"]) == 90.123456
    assert markdown(table).count("\n") == 4 and "| 90.12 |" in markdown(table)
    draw(table, tmp_path / "x")
    first = (tmp_path / "x.svg").read_bytes()
    draw(table, tmp_path / "x")
    assert (tmp_path / "x.svg").read_bytes() == first and (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_readme_blocks_are_replaced_and_the_rest_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- table:vit -->\nold\n<!-- end -->\nb\n<!-- table:lm -->\nkept\n<!-- end -->\n")
    fill_readme(page, {"vit": rows([fake("a", 1000, 80.0)])})
    text = page.read_text()
    assert "old" not in text and "kept" in text and "| a |" in text and text.startswith("a\n") and "\nb\n" in text


def test_the_overview_has_the_cells_without_options(tmp_path: Path) -> None:
    usual = [fake("float", 4 * 2**20, 90.0), fake("rtn", 2**20, 80.0), fake("rtn", 2**19, 60.0)]
    usual[0]["setting"], usual[1]["setting"], usual[2]["setting"] = "", "bits=4", "bits=2"
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- overview:vit -->\nold\n<!-- end -->\nb\n<!-- overview:vit,lm -->\nkept\n<!-- end -->\n")
    fill_readme(page, {"vit": rows(usual)})
    text = page.read_text()
    assert "| float | 90 (4.000 MiB) |" in text and "| rtn | 80 (1.000 MiB, bits=4) |" in text
    assert "60" not in text and "| gptq |" not in text and "old" not in text and "kept" in text


def test_readme_and_results_are_what_the_records_say(tmp_path: Path) -> None:
    records = REPOSITORY / "results" / "records"
    page = tmp_path / "README.md"
    page.write_text((REPOSITORY / "README.md").read_text())
    result = command("src.report", str(records), f"out={tmp_path / 'out'}", f"readme={page}")
    assert result.returncode == 0, result.stderr
    assert page.read_text() == (REPOSITORY / "README.md").read_text()
    made = [path for path in (tmp_path / "out").iterdir() if path.suffix in (".csv", ".md", ".svg")]
    assert {path.stem for path in made} >= {"vit"}
    for path in made:  # tables and vector figures, of every task
        assert path.read_bytes() == (REPOSITORY / "results" / path.name).read_bytes(), path.name
    assert all(not r["environment"]["dirty"] and not r["config"]["smoke"] for r in read_all(records))


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (("/nowhere",), "no finished runs in '/nowhere'"),
        (("colour=red",), "unknown option"),
        (("max_size=big",), "takes a number"),
        ((str(REPOSITORY / "results" / "records"), "method=none"), "no run in"),
    ],
)
def test_mistakes(words: tuple[str, ...], answer: str) -> None:
    result = command("src.report", *words)
    assert result.returncode != 0 and answer in result.stderr and "Traceback" not in result.stderr


def test_a_thousand_records_are_a_table_in_a_second() -> None:
    import time

    records = [fake(f"m{i % 7}", 1000 + i, 50 + i % 40) for i in range(1000)]
    began = time.perf_counter()
    assert len(rows(records)) == 1000
    assert time.perf_counter() - began < 1


def test_a_start_given_by_its_path_is_shown_by_its_run() -> None:
    record = fake("a", 1000, 80.0)
    for given, shown in (("runs/vit/float/ab12/model.safetensors", "ab12"), ("float", "float"), ("x.safetensors",) * 2):
        record["setting"] = f"bits=2 init_from={given} J=0"
        assert rows([record])[0].setting == f"bits=2 init_from={shown} J=0"
