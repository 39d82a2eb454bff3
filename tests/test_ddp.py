"""Two processes: the same flow, and metrics equal to one process's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import cli, command, torchrun
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

import bitfront
from bitfront.cells import compose
from bitfront.cells.flow import build_task
from bitfront.cells.record import read_all
from bitfront.quant.forwards.sharded import whole

TASKS = ("asr", "lm", "resnet", "separation", "vit")
METHODS: dict[str, Callable[[], bitfront.Method]] = {
    "lsq": lambda: bitfront.LSQ(bits=3, min_size=0.001),
    "ste": lambda: bitfront.STE(bits=3, min_size=0.001),
    "diffq": lambda: bitfront.DiffQ(penalty=3, min_size=0.001),
}
IN_PHASES = {"diffq_lsq": lambda: bitfront.DiffQLSQ(penalty=3, min_size=0.001)}  # of which each knows the way of all


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


def labels(shared: bool) -> list[list[int]]:
    """Of batches to calibrate on."""
    task = build_task(compose.load(["task=vit", "smoke=true"]))
    return [batch[1].tolist() for batch in task.calibration(9, 4, shared)]


def steps(model: bitfront.QuantizedModel, called: nn.Module, x: Tensor) -> dict[str, list[float]]:
    """A few steps of a plain loop with a penalty; all that is learned, after them."""
    optimizer = model.optimizer(torch.optim.SGD(model.network.parameters(), 0.1))
    for _ in range(3):
        optimizer.zero_grad()
        (called(x).square().mean() + model.penalty()).backward()
        optimizer.step()
    with whole(model):
        return {name: p.detach().flatten().tolist() for name, p in model.named_parameters()}


def prepared(name: str) -> tuple[bitfront.QuantizedModel, Tensor]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    return bitfront.prepare(network, (METHODS | IN_PHASES)[name](), steps=3), torch.randn(8, 32)


def trained(rank: int) -> dict[str, dict[str, list[float]]]:
    found = {}
    for name in ("lsq", "diffq", "diffq_lsq"):
        model, x = prepared(name)
        found[name] = steps(model, nn.parallel.DistributedDataParallel(model), x[4 * rank : 4 * rank + 4])
    return found


def sharded(rank: int, file: Path) -> dict[str, dict[str, list[float]]]:
    """Of a model whose parameters are in parts between steps; the last one is saved."""
    found = {}
    for name in METHODS:
        model, x = prepared(name)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        found[name] = steps(model, model, x[4 * rank : 4 * rank + 4])
        model.save(file)
        assert isinstance(model.network[0].weight, DTensor)
    return found


def refused() -> list[str]:
    """What is said of modules that are sharded by themselves, before and after."""
    mesh, said = init_device_mesh("cpu", (2,)), []
    plain, x = prepared("lsq")[0].network, torch.randn(4, 32)
    inner, outer, first = (prepared("diffq")[0] for _ in range(3))
    fully_shard(inner.network[2], mesh=mesh), fully_shard(inner, mesh=mesh), fully_shard(first, mesh=mesh)
    fully_shard(plain[0], mesh=mesh)
    for call in (
        lambda: bitfront.prepare(plain, bitfront.STE(min_size=0.001)),
        lambda: bitfront.quantize(plain, bitfront.RTN(min_size=0.001)),
        lambda: inner(x),
        lambda: FullyShardedDataParallel(outer, device_id=torch.device("cpu"))(x),
        lambda: first.penalty(),
    ):
        with pytest.raises(bitfront.BitfrontError) as error:
            call()
        said.append(str(error.value))
    return said


def work(folder: Path) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    found: dict[str, Any] = {"metrics": {name: measured(name) for name in TASKS}, "weights": trained(rank)}
    found |= {
        "labels": labels(shared=True),
        "sharded": sharded(rank, folder / f"{rank}.safetensors"),
        "refused": refused(),
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What each of two processes measures, and learns."""
    torchrun(folder, work, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_metrics_are_the_same_on_one_and_two_processes(found: list[dict[str, Any]]) -> None:
    both = [one["metrics"] for one in found]
    assert both[0] == both[1]
    for name in TASKS:
        assert both[0][name] == pytest.approx(measured(name), rel=1e-5, abs=1e-6), name


def test_each_batch_to_calibrate_on_is_shared_out(found: list[dict[str, Any]]) -> None:
    *pairs, last = labels(shared=False)
    assert [one["labels"] for one in found] == [[*(batch[0::2] for batch in pairs), last], [b[1::2] for b in pairs]]


def test_a_loop_of_ones_own_learns_the_same_in_two_processes(found: list[dict[str, Any]]) -> None:
    both = [one["weights"] for one in found]
    assert both[0] == both[1]
    model, x = prepared("lsq")  # without noise, which differs between processes
    for key, values in steps(model, model, x).items():
        assert both[0]["lsq"][key] == pytest.approx(values, rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("name", METHODS)
def test_a_sharded_model_learns_what_a_whole_one_does(name: str, found: list[dict[str, Any]]) -> None:
    """Also with noise, which is the same here: processes and single one have one seed."""
    model, x = prepared(name)
    for key, values in steps(model, model, x).items():
        for one in found:
            assert one["sharded"][name][key] == pytest.approx(values, rel=1e-4, abs=1e-5), key


def test_a_sharded_model_is_saved_whole(found: list[dict[str, Any]], folder: Path) -> None:
    network = bitfront.load(folder / "0.safetensors", into=prepared("lsq")[0].network)
    (name,) = list(METHODS)[-1:]
    model, x = prepared(name)
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(torch.tensor(found[0]["sharded"][name][key]).view_as(p))
    assert torch.equal(network(x), model.eval()(x))
    assert (folder / "0.safetensors").read_bytes() == (folder / "1.safetensors").read_bytes()


def test_modules_that_are_sharded_by_themselves_are_refused(found: list[dict[str, Any]]) -> None:
    *parts, early = found[0]["refused"]
    assert all("fully_shard(model)" in said and "DistributedDataParallel" in said for said in parts)
    assert "penalty() after" in early
