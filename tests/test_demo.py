"""What README promises of the demo, at full size."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from conftest import command

from bitfront.cells.record import read_all


@pytest.mark.slow
def test_the_demo_keeps_its_promise(tmp_path: Path) -> None:
    for words in (("quant=float",), ("-m", "quant=diffq", "penalty=0.1,0.5,2,5,20")):
        assert command("src.run", "task=vit", *words, f"root={tmp_path}", timeout=1800).returncode == 0
    records = {r.setting or r.method: r for r in read_all(tmp_path)}
    floating, diffq = records.pop("float"), records["penalty=5"]
    assert floating.primary.value >= 95
    assert diffq.primary.value >= floating.primary.value - 1.5
    assert floating.sizes.file >= 6 * diffq.sizes.file
    assert sum(stage["seconds"] for record in (floating, diffq) for stage in record.stages.values()) < 360
    sizes = [records[f"penalty={penalty}"].sizes.file for penalty in (0.1, 0.5, 2, 5, 20)]
    assert all(larger > smaller for larger, smaller in pairwise(sizes))
