"""The training recipe of a task, ``train.*``: the same options for every task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from bitfront.errors import BitfrontError
from bitfront.ranges import Ranges, refuse

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


@dataclass(kw_only=True)
class Recipe:
    """How a network is trained.

    Attributes:
        epochs, batch_size: epochs may be 0, to measure a start; batch_size is over all processes.
        optim: "adamw", whose decay spares what ``Task.decays`` does not name; or "adam" (with L2 decay, as arXiv
            2005.08100), "sgd", "nesterov", "rmsprop" (as EfficientNet's), which decay all weights.
        lr, weight_decay, momentum: of the optimizer; momentum of all but Adam's kinds.
        schedule: after the warm-up, "cosine" to ``min_lr``; "step", times ``decay`` every ``period`` epochs;
            "constant"; "inverse_sqrt" of the steps; "restarts", along cosines to ``min_lr``.
        warmup: share of the steps with a rate that rises linearly to lr, for "cosine" and "step".
        warmup_steps, warmup_lr: of "inverse_sqrt" and "restarts": how many steps, and the rate that they begin with.
        cycle, cycle_growth: of "restarts": steps of the first cosine, and by which each is longer than the one
            before; its rates are ``decay`` times theirs.
        clip: largest norm of the gradient of what this optimizer trains; 0 for any.
        ema: decay per step of an average of the weights, which then is what is validated and kept; 0 for none.
        keep: the network of the "last" epoch, or of the "best" by the primary metric on the validation split, or by the
            "loss" there.
        max_size: MB that the best may have at most; 0 for any.
        repeats: how often a sample is drawn in a row, each time augmented anew ("repeated augmentation", arXiv
            1901.09335); an epoch has as many draws as there are samples.
        workers: processes that load data, whose augmentation depends on their number; 0 loads it in this one.
    """

    epochs: int
    batch_size: int
    optim: str = "adamw"
    lr: float
    weight_decay: float = 0.0
    momentum: float = 0.9
    schedule: str = "cosine"
    warmup: float = 0.0
    warmup_steps: int = 0
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    period: float = 0.0
    decay: float = 1.0
    cycle: int = 0
    cycle_growth: float = 1.0
    clip: float = 0.0
    ema: float = 0.0
    keep: str = "last"
    max_size: float = 0.0
    repeats: int = 1
    workers: int = 0
    ranges: ClassVar[Ranges] = {
        "epochs": "0..",
        "batch_size": "1..",
        "optim": ("adamw", "adam", "sgd", "nesterov", "rmsprop"),
        "lr": "(0, inf)",
        "weight_decay": "[0, inf)",
        "momentum": "[0, 1)",
        "schedule": ("cosine", "step", "constant", "inverse_sqrt", "restarts"),
        "warmup": "[0, 1)",
        "warmup_steps": "0..",
        "warmup_lr": "[0, inf)",
        "min_lr": "[0, inf)",
        "period": "[0, inf)",
        "decay": "(0, inf)",
        "cycle": "0..",
        "cycle_growth": "[1, inf)",
        "clip": "[0, inf)",
        "ema": "[0, 1)",
        "keep": ("last", "best", "loss"),
        "max_size": "[0, inf)",
        "repeats": "1..",
        "workers": "0..",
    }

    def __post_init__(self) -> None:
        refuse(vars(self), self.ranges, "train.{}".format)
        for name, fits in {
            "warmup_steps": self.warmup_steps > 0 or self.schedule != "inverse_sqrt",
            "period": self.period > 0 or self.schedule != "step",
            "cycle": self.cycle > 0 or self.schedule != "restarts",
        }.items():
            if not fits:
                raise BitfrontError(f"train.{name}=0 is out of range for train.schedule={self.schedule}")

    def optimizer(self, parameters: Iterable[nn.Parameter], decays: Callable[[nn.Parameter], bool]) -> Optimizer:
        """The network's optimizer.

        Args:
            parameters: to train.
            decays: which of them AdamW lets decay.
        """
        import torch  # here, as a recipe is checked before there is torch

        options: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self.optim == "adamw":
            groups: dict[float, list[nn.Parameter]] = {}
            for p in parameters:
                groups.setdefault(self.weight_decay if decays(p) else 0.0, []).append(p)
            return torch.optim.AdamW(
                [{"params": ps, "weight_decay": decay} for decay, ps in groups.items()], lr=self.lr
            )
        if self.optim == "adam":
            return torch.optim.Adam(parameters, betas=(0.9, 0.98), eps=1e-9, **options)
        options["momentum"] = self.momentum
        if self.optim != "rmsprop":
            # Of fairseq's NAG, the velocity is -lr times this one's, also where the rate changes.
            return torch.optim.SGD(parameters, nesterov=self.optim == "nesterov", **options)
        from timm.optim import RMSpropTF  # whose epsilon is inside the root, as where EfficientNet comes from

        return RMSpropTF(parameters, alpha=0.9, eps=1e-3, **options)

    def lr_factor(self, step: int, steps: int) -> float:
        """Learning rate as a share of ``lr`` after ``step`` of ``steps``."""
        kinds = {"step": self._stairs, "inverse_sqrt": self._inverse_sqrt, "restarts": self._restarts}
        if self.schedule in kinds:
            return kinds[self.schedule](step, steps)
        return self._cosine(step, steps) if self.schedule == "cosine" else 1.0

    def _cosine(self, step: int, steps: int) -> float:
        progress, floor = min(step / steps, 1.0), self.min_lr / self.lr
        if progress < self.warmup:
            share = (progress + 1e-3) / (self.warmup + 1e-3)
        else:
            share = 0.5 * (1 + math.cos(math.pi * progress))
        return floor + (1 - floor) * share

    def _stairs(self, step: int, steps: int) -> float:
        rising = min(1.0, (step / steps + 1e-3) / (self.warmup + 1e-3))
        return rising * self.decay ** (step / steps * self.epochs // self.period)

    def _inverse_sqrt(self, step: int, steps: int) -> float:
        return min((step + 1) / self.warmup_steps, (self.warmup_steps / (step + 1)) ** 0.5)

    def _restarts(self, step: int, steps: int) -> float:
        if step < self.warmup_steps:
            return (self.warmup_lr + (self.lr - self.warmup_lr) * step / self.warmup_steps) / self.lr
        at, period, scale = float(step - self.warmup_steps), float(self.cycle), 1.0
        while at >= period:
            at, period, scale = at - period, period * self.cycle_growth, scale * self.decay
        low = self.min_lr / self.lr
        return scale * (low + 0.5 * (1 - low) * (1 + math.cos(math.pi * at / period)))
