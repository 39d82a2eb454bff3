"""Codes that move: each weight has a place on its grid, whole steps being codes, that learns along with the grid.
Forward it is rounded, backward it is not (straight through). AutoRound (arXiv 2309.05516) starts from the weight and
steps by the sign of each gradient; here the start is a solver's code, which may lie elsewhere, and steps have momentum,
without which those of many small gradients that do not agree add up to noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitfront.quant.engine.frozen import Frozen
from bitfront.quant.storage.packed import Packed

REACH = 0.4  # of a step: at the start, a place is as near to the weight as it can be with the solver's code well ahead


class Moving(Frozen):
    """Codes and grid of a tensor, both of which learn.

    Args:
        packed, symmetric, relative: as of ``Frozen``.
        w: the weight that was quantized.
    """

    moves = True

    def __init__(self, packed: Packed, w: Tensor, symmetric: bool = False, relative: bool = True) -> None:
        super().__init__(packed, True, symmetric, relative)
        first, step, _ = packed.grid(packed.bits, packed.lo, packed.span, len(packed.codes))
        codes = packed.codes.float()
        off = (packed.cut(w.float()) - first) / torch.where(step == 0, 1.0, step) - codes
        self.place = nn.Parameter(codes + off.clamp_(-REACH, REACH))

    def codes(self) -> Tensor:
        return Straight.apply(self.place.detach(), self.levels).to(self.get_buffer("packed_codes").dtype)

    def learned_codes(self) -> Tensor:
        self.place.data.clamp_(-0.5, self.levels + 0.5)  # further out, a code would take long to come back
        return Straight.apply(self.place, self.levels)


class Straight(torch.autograd.Function):
    """Places to codes, with the gradient of the codes."""

    @staticmethod
    def forward(ctx: Any, place: Tensor, levels: int) -> Tensor:
        return place.round().clamp_(0, levels)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
