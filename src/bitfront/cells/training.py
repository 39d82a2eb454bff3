"""Training: the one LightningModule for every task and method."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bitfront.cells.tracking import Tracker
from bitfront.errors import BitfrontError
from bitfront.processes import rank
from bitfront.quant.core import Method
from bitfront.quant.model import QuantizedModel
from bitfront.tasks.core import Task


class Training(pl.LightningModule):
    """Task loss plus penalty times size, with a validation, a checkpoint and a log entry after each epoch.

    Args:
        model: what is trained.
        task: loss, data, recipe.
        method: penalty and the quantizers' optimizer.
        checkpoint: where to resume from, and to leave the state after each epoch.
        tracker: gets each epoch's numbers and widths.
        loss: of a network and a batch, in the place of the task's.
    """

    def __init__(
        self,
        model: QuantizedModel,
        task: Task,
        method: Method,
        checkpoint: Path,
        tracker: Tracker | None = None,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.task, self.method, self.checkpoint = model, task, method, checkpoint
        self.recipe, self.tracker, self.loss = task.recipe, tracker, loss or task.loss
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0
        self.best: dict[str, Any] | None = None  # score of the best epoch, and its state
        self.average = None
        if self.recipe.ema:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(self.recipe.ema)).requires_grad_(
                False
            )

    @property
    def result(self) -> QuantizedModel:
        """What is validated and kept: the model, or its average."""
        if self.average is None:
            return self.model
        assert isinstance(self.average.module, QuantizedModel)
        return self.average.module

    def configure_optimizers(self) -> Any:
        own = list(self.model.quantizers.parameters())
        together = own if own and self.method.optimizer(own) is None else []
        network = [*self.model.network.parameters()]
        decaying = {id(p) for p in network if self.task.decays(p)}
        main = self.recipe.optimizer([*network, *together], lambda p: id(p) in decaying)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        steps = int(self.trainer.estimated_stepping_batches)
        if self.model.steering:
            self.model.steering.steps = steps
        optimizer = self.model.optimizer(main, scaler)
        schedule = LambdaLR(optimizer, lambda step: self.recipe.lr_factor(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> Any:
        # Lightning sets the epoch, too, but on resuming only after it has started to iterate.
        parts = self.trainer.accumulate_grad_batches
        return self.task.loader("train", epoch=len(self.history), parts=parts)

    def on_train_epoch_start(self) -> None:
        # Every draw of an epoch depends on (seed, epoch, process) alone: a resumed run repeats it.
        draws = np.random.SeedSequence([self.task.seed, self.current_epoch, rank()])
        pl.seed_everything(int(draws.generate_state(1)[0]), verbose=False)
        self.started = time.perf_counter()
        self.total = torch.zeros((), device=self.device)

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        loss = self.loss(self.model, batch)
        self.total += loss.detach()
        if self.model.penalized:
            return loss + self.model.penalty() / self.task.summed
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:
            self.average.update_parameters(self.model)

    def on_train_epoch_end(self) -> None:
        # The same number in every process, so that all of them go on or stop.
        loss = self.trainer.strategy.reduce(self.total, reduce_op="mean").item() / self.trainer.num_training_batches
        if not loss < float("inf"):
            raise BitfrontError(
                f"the loss became {loss} in epoch {self.current_epoch + 1}; lower train.lr and run again"
            )
        result = self.result.eval()
        numbers = {f"valid/{k}": v for k, v in self.task.evaluate(result, "valid", self.device).items()}
        with torch.no_grad():
            numbers["size_mb"] = result.megabytes().item()
        self.seconds += time.perf_counter() - self.started
        self.history.append({"epoch": self.current_epoch + 1, "train/loss": loss, **numbers})
        if self.recipe.keep != "last":
            self.compare(numbers)
        if self.tracker and self.tracker.run is not None:
            self.tracker.log(self.current_epoch + 1, self.history[-1], self.model.widths())
        self.save()
        self.model.train()

    def compare(self, numbers: dict[str, float]) -> None:
        """Keep a copy of the model if it is the best so far: small enough, or else the smallest."""
        name, higher = self.task.primary if self.recipe.keep == "best" else ("loss", False)
        excess = max(numbers["size_mb"] - self.recipe.max_size, 0.0) if self.recipe.max_size else 0.0
        value = numbers[f"valid/{name}"] * (1 if higher else -1)
        score = [-excess, value if value == value else -math.inf]
        if self.best is None or score > self.best["score"]:
            state = {key: t.detach().cpu().clone() for key, t in self.result.state_dict().items()}
            self.best = {"score": score, "state": state}

    def on_fit_end(self) -> None:
        if self.best is not None:
            self.model.load_state_dict(self.best["state"])
        elif self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())

    def save(self) -> None:
        """Leave the state behind atomically."""
        temporary = self.checkpoint.with_name(f".{self.checkpoint.name}")
        try:
            self.trainer.save_checkpoint(temporary)
            if rank() == 0:
                os.replace(temporary, self.checkpoint)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or error
            raise BitfrontError(
                f"could not write '{self.checkpoint}' ({reason}); make room and run the same command, it resumes"
            ) from None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["bitfront"] = {"history": self.history, "seconds": self.seconds, "best": self.best}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history, self.seconds, self.best = (checkpoint["bitfront"][key] for key in ("history", "seconds", "best"))
