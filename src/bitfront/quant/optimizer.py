"""Weights and what a method learns beside them, stepped as one, whoever writes the training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Joint(Optimizer):
    """An optimizer of the weights, and one of a method's own, as widths.

    Only the first one's groups are in ``param_groups``: a schedule moves its rates alone, and clipping neither counts
    nor scales the gradients of the second, so that the weights move as without it.

    Args:
        main: of the weights.
        own: the method's, if it has one.
        prepare, finish: called before and after each step.
        scaler: needed where float16 training has one: it knows ``param_groups`` alone, and would leave its factor in
            the gradients of ``own``.
    """

    def __init__(
        self,
        main: Optimizer,
        own: Optimizer | None,
        prepare: Callable[[], None],
        scaler: torch.amp.GradScaler | None = None,
        finish: Callable[[], None] | None = None,
    ) -> None:
        self.main, self.own, self.prepare, self.scaler, self.finish = main, own, prepare, scaler, finish
        super().__init__(main.param_groups, main.defaults)  # which schedules look into
        self._show()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        self.prepare()
        self.main.step()
        if self.own and self._unscaled(self.own):
            self.own.step()
        if self.finish:
            self.finish()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self._both():
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self._both()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self._both(), state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self._show()

    def _both(self) -> list[Optimizer]:
        return [self.main, self.own] if self.own else [self.main]

    def _show(self) -> None:
        self.param_groups, self.state = self.main.param_groups, self.main.state

    def _unscaled(self, own: Optimizer) -> bool:
        """Take the scaler's factor out; False if a gradient has overflowed, and the step is to be left out."""
        if self.scaler is None or not self.scaler.is_enabled():
            return True
        gradients: list[Tensor] = [p.grad for group in own.param_groups for p in group["params"] if p.grad is not None]
        for gradient in gradients:
            gradient.div_(self.scaler.get_scale())
        return all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
