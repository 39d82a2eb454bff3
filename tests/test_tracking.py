"""W&B: what is logged can be read back; offline unless the user is logged in; its failures are harmless; an agent of a
W&B sweep runs cells.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from conftest import REPOSITORY, wandb_run

from bitfront.cells import compose
from bitfront.cells.cell import Cell
from bitfront.cells.check import check
from bitfront.cells.record import Head, Record
from bitfront.cells.tracking import Tracker, logged_in, mean_bits

SMOKE = ["task=vit", "quant=diffq", "smoke=true", "trainer.accelerator=cpu", "wandb=offline"]
SWEEP = REPOSITORY / "recipes" / "wandb_sweep.yaml"
ABOUT = Head(
    id="abc",
    task="vit",
    method="diffq",
    setting="penalty=5",
    seed=0,
    overrides=["penalty=5"],
    config={"smoke": False, "penalty": 5},
    init_sha256=None,
    environment={},
)


def tracker(mode: str, directory: Path, run_id: str = "abc") -> Tracker:
    return Tracker(mode, replace(ABOUT, id=run_id), directory)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no netrc"))


def test_mean_bits_of_tensors_and_of_all_weights() -> None:
    widths = {"a": [0, 0, 5, 3], "b": [2, 0, 0, 0, 0, 0, 0, 0, 2]}
    assert mean_bits(widths) == {"mean_bits/a": 19 / 8, "mean_bits/b": 4.0, "mean_bits": 35 / 12}
    assert mean_bits({}) == {}


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, Path]:
    """The record of a cell that ran offline, after its float start, and the folder that has ``runs`` in it."""
    folder = tmp_path_factory.mktemp("offline")
    return Cell([*SMOKE, f"root={folder}/runs", "penalty=5"]).execute(), folder


def test_a_cells_offline_run_read_back_by_wandb_is_its_record(cell: tuple[Record, Path]) -> None:
    record, sizes, run = cell[0], vars(cell[0].sizes), wandb_run(cell[1] / "runs" / "vit" / "diffq")
    assert (run["project"], run["run_id"], run["name"]) == ("bitfront", record.id, "vit diffq penalty=5")
    assert run["lines"]["run"][0]["run_group"] == "vit"
    for key in ("task", "method", "setting", "seed", "overrides", "init_sha256", "config"):
        assert run["config"][key] == getattr(record, key)
    assert run["config"]["smoke"] is True

    logged = run["summary"]
    numbers = {f"{split}/{name}": value for split, part in record.metrics.items() for name, value in part.items()}
    numbers |= {f"size/{name}": value for name, value in sizes.items()}
    numbers["size/mib"] = Path(record.artifact).stat().st_size / 2**20
    numbers["size/ratio"] = sizes["float"] / sizes["file"]
    numbers["size/bits_per_weight"] = 8 * sizes["file"] / sizes["parameters"]
    assert {name: logged[name] for name in numbers} == pytest.approx(numbers)
    assert logged["minutes"] > 0
    for name, counts in record.widths.items():
        assert logged[f"bits/{name}"]["values"] == counts


def test_a_cells_offline_run_has_every_epoch(cell: tuple[Record, Path]) -> None:
    record, run = cell[0], wandb_run(cell[1] / "runs" / "vit" / "diffq")
    history = [line["item"] for line in run["lines"]["history"]]
    assert [item["_step"] for item in history] == [1, 2]
    for item, epoch in zip(history, record.history, strict=True):
        assert {name: item[name] for name in epoch} == pytest.approx(epoch)
        for name, counts in record.widths.items():
            assert 2 <= item[f"mean_bits/{name}"] <= 15
            assert sum(item[f"bits/{name}.values"]) == sum(counts)


def test_the_artifact_of_an_offline_run_is_the_packed_file_where_it_is(cell: tuple[Record, Path]) -> None:
    record, run = cell[0], wandb_run(cell[1] / "runs" / "vit" / "diffq")
    (artifact,) = run["lines"]["artifact"]
    (entry,) = artifact["manifest"]["contents"]
    content = Path(record.artifact).read_bytes()
    assert (artifact["name"], artifact["type"], entry["path"]) == (
        f"model-{record.id}",
        "model",
        "model.safetensors",
    )
    assert int(entry["size"]) == len(content)
    assert entry["digest"] == base64.b64encode(hashlib.md5(content).digest()).decode()
    assert Path(entry["local_path"]).samefile(record.artifact)  # no second copy


def test_the_documented_command_syncs_every_offline_run(cell: tuple[Record, Path]) -> None:
    command = "wandb sync runs/*/*/*/wandb/offline-run-*"
    for source in ("cells/tracking.py", "reports/dashboard.py"):
        assert command in (REPOSITORY / "src" / "bitfront" / source).read_text()
    words = f"{sys.executable} -m {command} --dry-run"
    result = subprocess.run(words, shell=True, cwd=cell[1], capture_output=True, text=True, check=True)
    files = sorted(cell[1].glob("runs/vit/*/*/wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    for file in files:
        assert str(file.relative_to(cell[1])) in result.stdout + result.stderr


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
    def hasty(**options: Any) -> wandb.Settings:
        assert 0 < options["init_timeout"] <= 15 and 0 < options["login_timeout"] <= 15
        return settings(**options | {"init_timeout": 4, "login_timeout": 4})

    settings = wandb.Settings
    monkeypatch.setattr(wandb, "Settings", hasty)
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
    with pytest.warns(UserWarning, match="offline for this run") as warned:
        run = tracker("online", tmp_path, "keyless")
    run.close()
    pattern = str(warned[0].message).rpartition(" ")[2]  # of the sync command
    assert list(tmp_path.glob(str(Path(pattern).relative_to(tmp_path)) + "/*.wandb"))


def test_a_failure_inside_wandb_is_a_warning(cell: tuple[Record, Path], tmp_path: Path) -> None:
    run = tracker("offline", tmp_path, "failing")
    with pytest.warns(UserWarning, match="goes on without it"):
        run.finish(replace(cell[0], artifact=str(tmp_path / "missing")))
    run.close()


def test_networks_of_many_tensors_have_their_artifact(cell: tuple[Record, Path], tmp_path: Path) -> None:
    run = tracker("offline", tmp_path, "many")
    run.finish(replace(cell[0], widths={f"layer{n}.weight": [0, 0, 10] for n in range(200)}))
    run.close()
    (artifact,) = wandb_run(tmp_path)["lines"]["artifact"]
    assert json.loads(artifact["metadata"])["size/file"] == cell[0].sizes.file


def sweep_values(draw: str) -> dict[str, Any]:
    """Parameters as a W&B sweep hands them out: the lower or upper end of each range."""
    end = {"lower": min, "upper": max}[draw]
    parameters = yaml.safe_load(SWEEP.read_text())["parameters"].items()
    return {
        name: about["value"] if "value" in about else end(about.get("values") or (about["min"], about["max"]))
        for name, about in parameters
    }


@pytest.mark.parametrize("draw", ["lower", "upper"])
def test_the_sweep_files_command_is_a_cell(draw: str) -> None:
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    about, values = yaml.safe_load(SWEEP.read_text()), sweep_values(draw)
    macros = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
    command = create_sweep_command(about["command"])
    assert command[:-1] == ["${env}", "python", "-m", "src.run"]
    words = macros[command[-1][2:-1]]
    check(words)
    config = compose.load(words)
    assert (config.task, config.method) == ("vit", "diffq")
    quant = config.values["quant"]
    assert quant["penalty"] == values["penalty"] and quant["lr"] == values["quant.lr"]
    assert quant["group_size"] == values["group_size"]


def agent_run(monkeypatch: pytest.MonkeyPatch, folder: Path, run_id: str, **others: Any) -> None:
    """Have W&B's agent start a cell with the sweep file's command, as it does when the server hands it values."""
    from wandb.wandb_agent import Agent

    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep123")
    monkeypatch.setenv("WANDB_PROJECT", "bitfront")
    monkeypatch.setenv("WANDB_DIR", str(folder))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):  # the agent sets them
        monkeypatch.setenv(name, "")
    monkeypatch.chdir(REPOSITORY)
    agent = Agent(None, None, sweep_id="sweep123")
    agent._sweep_command = yaml.safe_load(SWEEP.read_text())["command"]
    values = (
        sweep_values("upper") | {"root": str(folder / "runs"), "smoke": True, "trainer.accelerator": "cpu"} | others
    )
    args = {name: {"value": value} for name, value in values.items()}
    agent._command_run({"run_id": run_id, "program": "src/run.py", "args": args})
    assert agent._run_processes[run_id].wait(300) == 0


def test_an_agents_run_is_one_wandb_run_with_the_sweeps_metric(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    metric = yaml.safe_load(SWEEP.read_text())["metric"]["name"]
    assert metric.startswith("valid/")  # test data chooses nothing
    agent_run(monkeypatch, tmp_path, "fromagent")
    run = wandb_run(tmp_path)  # one: the float start has none
    assert run["run_id"] == "fromagent" and run["project"] == "bitfront"
    assert run["lines"]["run"][0]["sweep_id"] == "sweep123"
    assert run["config"]["task"] == "vit" and run["config"]["method"] == "diffq"
    assert run["config"]["penalty"] == run["config"]["config"]["penalty"] == 20
    assert metric in run["summary"]

    shutil.rmtree(Path(run["file"]).parents[1])
    agent_run(monkeypatch, tmp_path, "again")  # the cell has finished, but this run needs its numbers, too
    again = wandb_run(tmp_path)
    assert again["run_id"] == "again"
    for name in ("test/top1", "size/mib", metric):
        assert again["summary"][name] == run["summary"][name]
    assert [line["item"]["_step"] for line in again["lines"]["history"]] == [1, 2]
