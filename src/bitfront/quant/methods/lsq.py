"""Learned step size quantization (Esser et al. 2020, arXiv 1902.08153), weights only:

    w_train = s * round(clip(w / s, -2**(b-1), 2**(b-1) - 1)),      round with a straight-through gradient  (eq. 1-3)
    s starts at 2 mean|w| / sqrt(q),  its gradient is scaled by 1 / sqrt(numel * q),  q = 2**(b-1) - 1     (§2.2)

Differs from the code in the official DiffQ package: steps start from the weights that training starts from (there:
often from the random ones before a checkpoint is loaded) and stay positive; q is the original paper's (there:
2**(b-1) in the initial step); 1 bit and all-zero tensors work; a step per row or group is possible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bitfront.quant.core import FixedBits, Trained
from bitfront.quant.model import Quantizer
from bitfront.quant.storage.packed import Packed, grouped, ungrouped
from bitfront.quant.storage.rounding import on_stored_grid
from bitfront.quant.storage.scales import Scales
from bitfront.ranges import Ranges


class LSQQuantizer(Quantizer):
    """One learned step per tensor, row or group."""

    def __init__(self, w: Tensor, bits: int, group_size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.width, self.group_size, self.dtype = bits, group_size, dtype
        self.low, self.high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        largest = max(self.high, 1)  # 1 bit has the codes -1 and 0
        groups = grouped(w.detach().float(), group_size)
        step = 2 * groups.abs().mean(1) / math.sqrt(largest)
        # An all-zero group would otherwise divide by zero.
        self.step = nn.Parameter(torch.where(step > 0, step, 1.0))
        self.gradient_scale = 1 / math.sqrt(groups.shape[1] * largest)
        self.size = float(bits * groups.numel() + 32 * len(groups))

    def positive_step(self) -> Tensor:
        """The steps in use, ``[groups]``: an optimizer step across zero must not turn the grid around."""
        return self.step.abs().clamp_min(torch.finfo(torch.float32).tiny)

    def surrogate(self, w: Tensor) -> Tensor:
        step = self.positive_step()[:, None]
        step = step.detach() + self.gradient_scale * (step - step.detach())  # the value is unchanged
        scaled = (grouped(w, self.group_size) / step).clamp(self.low, self.high)
        rounded = scaled + (scaled.round() - scaled).detach()
        seen = ungrouped(rounded * step, w.shape)
        return seen if self.dtype == torch.float32 else seen + (self.encode(w).decode() - seen).detach()

    def encode(self, w: Tensor) -> Packed:
        step = self.positive_step()
        lo, span = self.low * step, (self.high - self.low) * step
        return on_stored_grid(w, self.width, lo.detach(), span.detach(), self.group_size, Scales(self.dtype))

    def bits(self) -> Tensor:
        return torch.tensor(self.size)


@dataclass(kw_only=True)
class LSQ(FixedBits, Trained):
    """Learned step size; the paper has one step per tensor.

    Attributes:
        lr: learning rate (Adam, constant) of the steps; 0 trains them in the network's optimizer (the paper).
    """

    lr: float = 0.0
    ranges: ClassVar[Ranges] = {"lr": "[0, inf)"}

    def quantizer(self, w: Tensor) -> LSQQuantizer:
        return LSQQuantizer(w, self.bits, self.group_size, self.dtype)

    def optimizer(self, parameters: list[nn.Parameter], steps: int = 0) -> torch.optim.Optimizer | None:
        return torch.optim.Adam(parameters, lr=self.lr) if self.lr else None
