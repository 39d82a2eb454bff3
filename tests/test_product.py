"""Every method on every task, from the command line's words to the record, on generated data."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn

from bitfront.cells import compose
from bitfront.cells.batchnorm import reestimate
from bitfront.cells.cell import Cell
from bitfront.cells.flow import build_task
from bitfront.errors import BitfrontError
from bitfront.quant.storage.artifact import Artifact

DEFAULTS = ("asr", "lm", "resnet", "separation", "vit")


@pytest.mark.parametrize(
    "task", [pytest.param(t, marks=[] if t in DEFAULTS else pytest.mark.slow) for t in compose.options("task")]
)
def test_every_method_runs_on_the_task(task: str, tmp_path: Path) -> None:
    for method in compose.options("quant"):
        words = [f"task={task}", f"quant={method}", "smoke=true", f"root={tmp_path}", "wandb=disabled"]
        words += ["quant.min_size=0.01"] if method != "float" else []  # a cell of a large network sets more
        record = Cell([*words, "trainer.accelerator=cpu"]).execute()
        assert (record.task, record.method) == (task, method)
        for numbers in record.metrics.values():
            assert all(math.isfinite(value) for value in numbers.values()), (method, numbers)
        assert record.sizes.file == Path(record.artifact).stat().st_size
        quantized = sum(sum(counts) for counts in record.widths.values())
        assert quantized == 0 if method == "float" else quantized > 0.5 * record.sizes.parameters, method
        assert bool(record.calibration) == (method in ("rtn", "gptq", "decoupleq", "gsq"))


@pytest.mark.parametrize("method", [["rtn", "bits=2"], ["rtn", "quant.sft=true"], ["diffq"], ["lsq", "init_from=null"]])
def test_batch_norms_are_measured_anew_with_the_weights_of_the_file(method: list[str], tmp_path: Path) -> None:
    words = ["task=resnet", f"quant={method[0]}", *method[1:], "smoke=true", f"root={tmp_path}", "wandb=disabled"]
    record = Cell([*words, "quant.reestimate_bn=true", "trainer.accelerator=cpu"]).execute()
    task = build_task(compose.load(words))
    network = task.model()
    Artifact.load(Path(record.artifact)).load_into(network)
    (norm, *_), seen = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)], []
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].mean((0, 2, 3))))
    torch.manual_seed(task.seed)
    with torch.no_grad():
        for batch in islice(task.loader("train"), 64):  # augmented, as the batch norms knew it
            task.loss(network.eval(), batch)
    torch.testing.assert_close(norm.running_mean, torch.stack(seen).mean(0), rtol=1e-4, atol=1e-5)
    assert "reestimate_bn" in record.stages and norm.momentum == 0.1


def test_batch_norms_measured_anew_do_not_depend_on_the_random_state() -> None:
    task = build_task(compose.load(["task=resnet", "smoke=true"]))
    model, device = task.model(), torch.device("cpu")
    reestimate(model, task, device)
    first = {name: b.clone() for name, b in model.named_buffers()}
    state = torch.get_rng_state()
    reestimate(model, task, device)
    assert torch.equal(state, torch.get_rng_state())
    for name, b in model.named_buffers():
        torch.testing.assert_close(b, first[name], rtol=0, atol=0)


def test_without_batch_norms_there_is_nothing_to_measure_anew(tmp_path: Path) -> None:
    words = ["task=vit", "quant=ste", "quant.reestimate_bn=true", "smoke=true", f"root={tmp_path}", "wandb=disabled"]
    with pytest.raises(BitfrontError, match="no batch norm"):
        Cell(words).execute()
