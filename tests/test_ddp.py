"""Two processes: the same flow, and metrics equal to one process's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import cli, command, torchrun
from torch import Tensor, distributed, nn

import bitfront
from bitfront.cells import compose
from bitfront.cells.flow import build_task
from bitfront.cells.record import read_all

TASKS = ("asr", "lm", "resnet", "separation", "vit")


def test_two_processes_train_and_measure_one_artifact(floats: Path, tmp_path: Path) -> None:
    (start,) = read_all(floats)
    words = ("task=vit", "quant=diffq", f"init_from={start.artifact}", "smoke=true", "trainer.accelerator=cpu")
    result = command("src.run", *words, f"root={tmp_path}", "trainer.devices=2")
    assert result.returncode == 0, result.stderr
    (record,) = (r for r in read_all(tmp_path) if r.method == "diffq")
    assert record.processes == 2
    again = cli("evaluate", f"artifact={record.artifact}", "accelerator=cpu")
    assert "the same as in its record" in again.stdout, (again.stdout, record.metrics)


def measured(name: str) -> dict[str, float]:
    """Metrics of a fresh network, on the samples of all processes."""
    task = build_task(compose.load([f"task={name}", "smoke=true"]))
    torch.manual_seed(0)
    return task.evaluate(task.model(), "test")


def steps(model: bitfront.QuantizedModel, called: nn.Module, x: Tensor) -> dict[str, list[float]]:
    """A few steps of a plain loop with a penalty; all that is learned, after them."""
    optimizer = model.optimizer(torch.optim.SGD(model.network.parameters(), 0.1))
    for _ in range(3):
        optimizer.zero_grad()
        (called(x).square().mean() + model.penalty()).backward()
        optimizer.step()
    return {name: p.detach().flatten().tolist() for name, p in model.named_parameters()}


def prepared(name: str) -> tuple[bitfront.QuantizedModel, Tensor]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    method = bitfront.LSQ(bits=3, min_size=0.001) if name == "lsq" else bitfront.DiffQ(penalty=3, min_size=0.001)
    model = bitfront.prepare(network, method)
    return model, torch.randn(8, 32)


def trained(rank: int) -> dict[str, dict[str, list[float]]]:
    found = {}
    for name in ("lsq", "diffq"):
        model, x = prepared(name)
        found[name] = steps(model, nn.parallel.DistributedDataParallel(model), x[4 * rank : 4 * rank + 4])
    return found


def work(folder: Path) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    found = {"metrics": {name: measured(name) for name in TASKS}, "weights": trained(rank)}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes measures, and learns."""
    folder = tmp_path_factory.mktemp("two")
    torchrun(folder, work, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_metrics_are_the_same_on_one_and_two_processes(found: list[dict[str, Any]]) -> None:
    both = [one["metrics"] for one in found]
    assert both[0] == both[1]
    for name in TASKS:
        assert both[0][name] == pytest.approx(measured(name), rel=1e-5, abs=1e-6), name


def test_a_loop_of_ones_own_learns_the_same_in_two_processes(found: list[dict[str, Any]]) -> None:
    both = [one["weights"] for one in found]
    assert both[0] == both[1]
    model, x = prepared("lsq")  # without noise, which differs between processes
    for key, values in steps(model, model, x).items():
        assert both[0]["lsq"][key] == pytest.approx(values, rel=1e-4, abs=1e-5), key
