"""Which method to take at a size: against a calculation from the records alone, and by cases."""

from __future__ import annotations

import copy
import json
import math
import re
import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, cli

from bitfront.cells.record import Record, read_all
from bitfront.reports.answer import answer, apart, standard_error
from bitfront.reports.rows import MIB, Row, front

RECORDS = REPOSITORY / "results" / "records"


@pytest.mark.parametrize("size", [0.1, 0.135])
def test_the_answer_is_that_of_a_short_calculation(size: float, tmp_path: Path) -> None:
    cells: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for path in (RECORDS / "resnet_cifar10").rglob("*.json"):
        record = json.loads(path.read_text())
        cells[record["method"], record["setting"].lower()].append(record)
    fitting: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (method, _), some in cells.items():
        if statistics.mean(r["sizes"]["file"] for r in some) <= size * MIB:
            valid, test = (statistics.mean(r["metrics"][split]["top1"] for r in some) for split in ("valid", "test"))
            fitting[method].append((valid, test))
    best = {method: max(valid for valid, _ in pairs) for method, pairs in fitting.items()}
    wanted = sorted(best, key=lambda method: -best[method])
    words = "task=resnet_cifar10", f"at={size}", f"out={tmp_path}"
    told = " ".join(cli("report", str(RECORDS), *words).stdout.partition("at most")[2].split())
    found = re.findall(r"(\w+) \([^)]*\): test top1 ([\d.]+) ± [\d.]+, validation ([\d.]+)", told)
    assert len(found) == len(wanted) > 4 and found[0][0] == wanted[0]
    for method, test, valid in found:
        as_good = [pair for pair in fitting[method] if pair[0] == best[method]]  # of which none is chosen by its test
        assert any((float(valid), float(test)) == pytest.approx(pair, abs=0.006) for pair in as_good)


def row(valid: list[float], size: float = 0.1, method: str = "gptq", samples: int = 0) -> Row:
    """One with these validation metrics, by seed; its test metrics are a point less."""
    one = next(r for r in read_all(RECORDS / "resnet_cifar10") if r.method == "gptq")

    def record(seed: int, value: float) -> Record:
        metrics = {"valid": {"top1": value}, "test": {"top1": value - 1}}
        sizes = replace(one.sizes, file=int(size * MIB))
        made = replace(copy.deepcopy(one), method=method, seed=seed, metrics=metrics, sizes=sizes)
        return replace(
            made,
            primary=replace(one.primary, value=value - 1),
            samples={"valid": samples, "test": samples} if samples else {},
        )

    return Row([record(seed, value) for seed, value in enumerate(valid)])


def test_seeds_and_samples_tell_methods_apart_or_do_not() -> None:
    near, far, one = row([90.0, 90.2, 90.4]), row([91.0, 91.2, 91.4]), row([90.6])
    assert apart(near, far, None) and not apart(near, one, 0.5) and not apart(near, row([90.4]), None)
    assert apart(near, row([95.0]), 0.5) and apart(near, row([95.0]), None) and not apart(row([95.0]), one, None)
    assert standard_error(near, "valid", 9.0) == pytest.approx(0.2 / math.sqrt(3))
    assert standard_error(one, "valid", 0.3) == 0.3 and standard_error(one, "valid", None) is None
    few = row([90.0, 90.2, 90.4], samples=360)
    assert standard_error(few, "valid", None) == pytest.approx(100 * math.sqrt(0.902 * 0.098 / 360), rel=1e-6)
    assert not apart(few, row([91.0, 91.2, 91.4], samples=360), None)


def test_the_answer_says_what_is_level_and_what_is_behind() -> None:
    table = [
        row([91.0, 91.2, 91.4], 0.1, "gptq"),
        row([91.1, 91.3, 91.5], 0.09, "lsq"),
        row([80.0, 80.2, 80.4], 0.08, "rtn"),
        row([95.0, 95.2, 95.4], 0.2, "float"),
    ]
    first, level, behind = answer(table, 0.1)
    assert "at most 0.1 MiB: take lsq" in first and "test top1 90.3" in first and "3 seeds" in first
    assert "cannot be told apart" in level and "gptq" in level and "behind" in behind and "rtn" in behind
    assert answer(table, 0.01) == [
        "resnet_cifar10: no run of at most 0.01 MiB with a validation metric; the smallest has 0.08"
    ]


def test_the_front_is_chosen_by_the_validation_split() -> None:
    lucky, better = row([90.0], 0.09), row([91.0], 0.1)
    lucky.records[0] = replace(lucky.records[0], primary=replace(lucky.records[0].primary, value=99.0))
    assert front([lucky, better]) == [lucky, better]
    better.records[0].metrics.pop("valid")
    for name in ("valid", "validated"):
        better.__dict__.pop(name, None)
    assert front([lucky, better]) == [lucky]
