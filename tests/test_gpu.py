"""On a GPU: a file is the network that was measured, stores what the CPU would, and every task and method runs."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import attach, cli, command
from torch import Tensor, nn

import bitfront
from bitfront.cells import compose
from bitfront.cells.flow import build_method
from bitfront.cells.record import read_all
from bitfront.quant.core import Trained
from bitfront.quant.storage.artifact import Artifact

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("name", compose.options("quant"))
def test_a_file_from_the_gpu_is_the_file_from_the_cpu(
    name: str, tiny: tuple[type[nn.Module], Tensor], tmp_path: Path
) -> None:
    network, x = tiny
    method = replace(build_method(compose.load([f"quant={name}"])), min_size=0.0004)
    if isinstance(method, Trained):
        here = attach(method, network(), x)
        with torch.no_grad():
            for parameter in here.quantizers.parameters():
                parameter.mul_(1 + torch.rand_like(parameter))
        there = copy.deepcopy(here).to("cuda")
    else:
        start = network()
        here, there = attach(method, copy.deepcopy(start), x), attach(method, start.to("cuda"), x.to("cuda"))
    sizes = [model.eval().save(tmp_path / place, {}) for place, model in (("cpu", here), ("gpu", there))]
    assert sizes[0] == sizes[1]
    files = {place: Artifact.load(tmp_path / place) for place in ("cpu", "gpu")}
    for place, model, given in (("cpu", here, x), ("gpu", there, x.to("cuda"))):
        fresh = network().eval()
        files[place].load_into(fresh)
        with torch.no_grad():
            torch.testing.assert_close(fresh(x), model(given).cpu(), rtol=1e-3, atol=1e-4)
    if isinstance(method, Trained):
        for key, w in here.weights().items():
            torch.testing.assert_close(w, there.weights()[key].cpu(), rtol=1e-5, atol=1e-6)


def test_states_of_an_interrupted_calibration_go_back_to_the_gpu(tmp_path: Path) -> None:
    network, data = nn.Sequential(nn.Linear(64, 64)).cuda(), [torch.randn(8, 64)]
    for _ in range(2):  # the second time from states
        model = bitfront.quantize(network, bitfront.GPTQ(min_size=0.0), data, states=tmp_path)
        assert model(data[0].cuda()).device.type == "cuda" and all(p.is_cuda for p in model.buffers())


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_network_that_stays_elsewhere_gets_the_same_codes(place: str) -> None:
    """And only a block of it, and what that works on, is on the GPU at a time."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 512)) for _ in range(12)]
    network = nn.Sequential(nn.Linear(16, 512), nn.Sequential(*blocks), nn.Linear(512, 8)).eval()
    data = [torch.randn(8, 16) for _ in range(4)]
    method = bitfront.GPTQ(bits=3, min_size=0.0)
    torch.cuda.reset_peak_memory_stats()
    model = bitfront.quantize(network, method, data, offload=place)
    peak = torch.cuda.max_memory_allocated()
    assert all(p.device.type == "cpu" for p in model.parameters())
    weights = sum(4 * p.numel() for p in network.parameters())
    torch.cuda.reset_peak_memory_stats()
    there = bitfront.quantize(network.cuda(), method, data)
    assert torch.cuda.max_memory_allocated() - peak > weights / 2
    for (name, ours), theirs in zip(model.encode().items(), there.encode().values(), strict=True):
        assert torch.equal(ours.codes, theirs.codes.cpu()), name


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every method on every laptop task in bfloat16, once for this file."""
    root = tmp_path_factory.mktemp("runs")
    words = ("task=vit,resnet,lm,separation,asr", "quant=glob(*)", "smoke=true", "wandb=disabled")
    on = ("trainer.accelerator=gpu", "trainer.precision=bf16-mixed")
    result = command("src.run", "-m", *words, *on, f"root={root}", timeout=600)
    assert result.returncode == 0, result.stderr
    return root


def test_every_cell_runs_and_says_on_what(root: Path) -> None:
    records = list(read_all(root))
    assert len({(r.task, r.method) for r in records}) == 5 * len(compose.options("quant"))
    for record in records:
        assert record.device == torch.cuda.get_device_name()
        assert any(stage.get("peak_gpu_memory", 0) > 0 for stage in record.stages.values()), record.id


@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_evaluation_repeats_the_record(root: Path, accelerator: str) -> None:
    for record in read_all(root):
        if record.task == "lm" and record.method in ("diffq", "gptq"):
            result = cli("evaluate", f"artifact={record.artifact}", f"accelerator={accelerator}")
            differs = result.stdout.rsplit("differs by up to ", 1)[1:]
            assert "the same" in result.stdout or float(differs[0].split(" %")[0]) < 0.1, result.stdout + result.stderr
