"""W&B: what is logged can be read back; offline unless the user is logged in; its failures are harmless."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from src.tracking import Tracker, logged_in


def tracker(mode: str, directory: Path, run_id: str = "abc") -> Tracker:
    return Tracker(mode, run_id=run_id, name="vit diffq", group="a sweep", config={"penalty": 5}, directory=directory)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no netrc"))


def test_an_offline_run_holds_config_metrics_histograms_and_artifact(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"packed")
    run = tracker("auto", tmp_path)
    for epoch in (1, 2):
        run.log(epoch, {"valid/top1": 90.0 + epoch, "size_mb": 0.5}, {"layer.weight": [0, 0, 5, 3]})
    run.finish({"test/top1": 95.0}, tmp_path / "model.safetensors")
    run.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-abc.wandb")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect"]
    lines = subprocess.run([*inspect, "--json", str(file)], capture_output=True, text=True, check=True).stdout
    summary = subprocess.run(
        [*inspect, "--summary", "--json", str(file)], capture_output=True, text=True, check=True
    ).stdout
    everything = lines + summary
    for expected in (
        "valid/top1",
        "size_mb",
        "bits/layer.weight",
        "histogram",
        "test/top1",
        "penalty",
        "a sweep",
        "model-abc",
    ):
        assert expected in everything, expected
    history = [json.loads(line) for line in lines.splitlines() if '"history"' in line]
    assert len(history) >= 2


def test_modes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not logged_in()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert logged_in()
    monkeypatch.delenv("NETRC")
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert logged_in()
    assert tracker("disabled", tmp_path).run is None


def test_an_unreachable_server_costs_seconds_and_no_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    began = time.perf_counter()
    with pytest.warns(UserWarning, match="W&B"):
        run = tracker("online", tmp_path, "unreachable")
    assert time.perf_counter() - began < 60
    run.log(1, {"x": 1.0}, {})
    run.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_online_without_a_key_does_not_ask_but_goes_offline(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="offline for this run"):
        run = tracker("online", tmp_path, "keyless")
    run.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_a_failure_inside_wandb_is_a_warning(tmp_path: Path) -> None:
    run = tracker("offline", tmp_path, "failing")
    with pytest.warns(UserWarning, match="goes on without it"):
        run.finish({}, tmp_path / "missing")
    run.close()
