"""The training loop: averaging, choosing the best epoch, clipping, batches in parts, the unit of the penalty."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitfront.cells import compose
from bitfront.cells.flow import build_method, build_task
from bitfront.cells.trainer import fit
from bitfront.cells.training import Training
from bitfront.errors import BitfrontError
from bitfront.tasks.core import Task

TRAINER = {"accelerator": "cpu", "devices": 1, "precision": "32-true", "accumulate_grad_batches": 1}


class Recorded(Training):
    """Keeps the network's weights and the gradients' norm of every step."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        parameters = list(self.model.network.parameters())
        self.steps = [*getattr(self, "steps", []), [p.detach().clone() for p in parameters]]
        norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        self.norms = [*getattr(self, "norms", []), norm.item()]


def trained(path: Path, method: str = "float", trainer: dict[str, Any] | None = None, **fields: Any) -> Recorded:
    config = compose.load(["task=vit", *f"quant={method}".split(), "smoke=true"])
    task: Task = build_task(config)
    for name, value in fields.items():
        setattr(task if hasattr(task, name) else task.recipe, name, value)
    torch.manual_seed(0)
    quantization = build_method(config)
    training = Recorded(quantization.attach(task.model()), task, quantization, path / "last.ckpt")
    fit(training, TRAINER | (trainer or {}))
    return training


def weights(training: Training) -> list[Tensor]:
    return [p.detach() for p in training.model.network.parameters()]


def test_the_average_of_the_weights_is_kept(tmp_path: Path) -> None:
    training = trained(tmp_path, ema=0.8)
    expected = training.steps[0]
    for step in training.steps[1:]:
        expected = [0.8 * mean + 0.2 * w for mean, w in zip(expected, step, strict=True)]
    for mean, kept in zip(expected, weights(training), strict=True):
        torch.testing.assert_close(kept, mean)
    numbers = training.task.evaluate(training.model.eval(), "valid")
    assert numbers["loss"] == pytest.approx(training.history[-1]["valid/loss"], rel=1e-5)


def test_the_best_epoch_is_kept_also_after_an_interruption(tmp_path: Path) -> None:
    training = trained(tmp_path, epochs=4, keep="best", lr=0.03)
    best = max(numbers["valid/top1"] for numbers in training.history)
    assert training.task.evaluate(training.model.eval(), "valid")["top1"] == pytest.approx(best)
    again = trained(tmp_path, epochs=4, keep="best", lr=0.03)  # resumes a finished training
    assert not hasattr(again, "steps")
    assert all(torch.equal(a, b) for a, b in zip(weights(again), weights(training), strict=True))


def test_the_epoch_of_the_lowest_loss_is_kept(tmp_path: Path) -> None:
    training = trained(tmp_path, epochs=4, keep="loss", lr=0.03)
    lowest = min(numbers["valid/loss"] for numbers in training.history)
    assert training.task.evaluate(training.model.eval(), "valid")["loss"] == pytest.approx(lowest)


def test_what_is_too_large_is_not_the_best(tmp_path: Path) -> None:
    training = trained(tmp_path, "diffq", keep="best", max_size=0.02)
    for size, top1, best in ((0.05, 90.0, True), (0.03, 50.0, True), (0.02, 40.0, True), (0.01, 30.0, False)):
        if size == 0.05:
            training.best = None
            training.compare({"size_mb": 0.05, "valid/top1": float("nan")})
        before = copy.copy(training.best)
        training.compare({"size_mb": size, "valid/top1": top1})
        assert (training.best != before) == best, size


def test_the_penalty_spares_what_a_step_leaves_out(tmp_path: Path) -> None:
    training = trained(tmp_path, "diffq", epochs=1)
    (name, quantizer, w), (_, other, v), *_ = training.model.items()
    for grad in (torch.zeros_like(w), None):
        for p in training.model.parameters():
            p.grad = torch.ones_like(p)
        w.grad = grad
        training.model._spare_unused()
        assert all(p.grad is None for p in quantizer.parameters()), name
        assert all(p.grad is not None for p in other.parameters()) and v.grad is not None


def test_gradients_are_clipped(tmp_path: Path) -> None:
    assert max(trained(tmp_path / "a").norms) > 0.1
    assert max(trained(tmp_path / "b", clip=0.01).norms) <= 0.01 * (1 + 1e-5)


def test_what_the_penalty_does_to_widths_does_not_clip_the_weights(tmp_path: Path) -> None:
    norms = trained(tmp_path, "diffq penalty=1e6", epochs=1, clip=0.01).norms
    assert norms == pytest.approx([0.01] * len(norms), rel=1e-3)


def test_a_batch_in_parts_gives_the_same_training(tmp_path: Path) -> None:
    fields = {"drop_path": 0.0}  # which draws per part
    whole = trained(tmp_path / "a", **fields)
    parts = trained(tmp_path / "b", trainer={"accumulate_grad_batches": 4}, **fields)
    assert len(whole.steps) == len(parts.steps)
    for a, b in zip(weights(whole), weights(parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    with pytest.raises(BitfrontError, match="batch_size=32 does not divide among 1 processes and 5 parts"):
        trained(tmp_path / "c", trainer={"accumulate_grad_batches": 5})


def test_a_penalty_for_a_summed_loss_is_divided(tmp_path: Path) -> None:
    training = trained(tmp_path, "diffq", epochs=1)
    model, batch = training.model.train(), next(iter(training.task.loader("train")))
    training.total = torch.zeros(())
    training.method.penalty = 3.0
    losses = []
    for summed in (1, 100):
        training.task.summed = summed  # type: ignore[misc]
        torch.manual_seed(0)
        losses.append(training.training_step(batch, 0).item())
    assert losses[0] - losses[1] == pytest.approx(3.0 * 0.99 * model.megabytes().item(), rel=1e-3)
