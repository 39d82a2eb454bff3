"""Two processes: the same flow, and metrics equal to one process's on the same artifact."""

from __future__ import annotations

from pathlib import Path

from conftest import command

from src.record import read_all


def test_two_processes_train_and_measure_one_artifact(tmp_path: Path) -> None:
    words = ("task=vit", "quant=diffq", "smoke=true", "trainer.accelerator=cpu", f"root={tmp_path}")
    result = command("src.run", *words, "trainer.devices=2")
    assert result.returncode == 0, result.stderr
    (record,) = (r for r in read_all(tmp_path) if r["method"] == "diffq")
    assert record["processes"] == 2
    again = command("src.evaluate", f"artifact={record['artifact']}", "accelerator=cpu")
    assert "the same as in its record" in again.stdout, (again.stdout, record["metrics"])
