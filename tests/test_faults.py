"""What goes wrong around the suite: files that are damaged or hostile, as ``benchmarks.faults`` makes them, but fewer;
and disks that are full."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from conftest import REPOSITORY, cli

from benchmarks.faults import run
from bitfront.cells.cell import Cell
from bitfront.cells.record import read_all
from bitfront.downloads import sha256
from bitfront.errors import BitfrontError

SMOKE = ("task=vit", "smoke=true", "trainer.accelerator=cpu", "wandb=disabled")


def test_what_is_wrong_with_a_file_is_told_and_never_taken_for_right() -> None:
    faults, grown = run({"artifacts": 300, "records": 100, "states": 200})
    assert not faults.found
    refused = sum(n for (_, outcome), n in faults.counts.items() if outcome == "refused")
    assert refused > 0.6 * faults.counts.total()
    assert grown < 256 << 20


def full_at(n: int, patch: pytest.MonkeyPatch) -> None:
    """A disk that has no room for the n-th file."""
    calls, real = iter(range(1, 10**9)), os.fsync

    def fsync(file: int) -> None:
        if next(calls) == n:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    patch.setattr(os, "fsync", fsync)


def left_behind(root: Path) -> list[Path]:
    return [path for path in root.rglob(".*") if path.is_file()]


def test_a_disk_that_is_full_at_any_moment_costs_a_line_and_nothing_else(
    floats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (start,) = read_all(floats)
    words = [*SMOKE, "quant=gptq", f"init_from={start.artifact}"]
    straight = Cell([*words, f"root={tmp_path / 'straight'}"]).execute()
    told: list[str] = []
    while not (records := [r for r in read_all(tmp_path / "full") if r.method == "gptq"]):
        with monkeypatch.context() as patch:
            full_at(len(told) + 1, patch)
            try:
                Cell([*words, f"root={tmp_path / 'full'}"]).execute()
            except BitfrontError as error:
                told.append(str(error))
        assert not left_behind(tmp_path)
    (record,) = records
    assert len(told) >= 4 and all(os.strerror(errno.ENOSPC) in line for line in told)  # owner, blocks, record
    assert record.artifact_sha256 == straight.artifact_sha256 == sha256(Path(record.artifact))


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in list((REPOSITORY / "results/records/resnet/rtn").glob("*.json"))[:2]:
        shutil.copy(path, tmp_path)
    assert cli("report", str(tmp_path)).returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    for n in range(1, len(before) + 1):
        with monkeypatch.context() as patch:
            full_at(n, patch)
            result = cli("report", str(tmp_path))
        assert (
            result.returncode == 1 and os.strerror(errno.ENOSPC) in result.stderr and "Traceback" not in result.stderr
        )
        assert {path: path.read_bytes() for path in (tmp_path / "report").iterdir()} == before
