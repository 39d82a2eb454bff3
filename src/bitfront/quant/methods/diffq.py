"""DiffQ: differentiable widths through pseudo quantization noise (Défossez, Adi, Synnaeve 2022, arXiv 2104.09987).

    w_train = w + (max w - min w) / (2**b - 1) * noise,     noise ~ N(0, 1) / 2 or U[-1/2, 1/2]     (§3.2)
    loss    = task loss + penalty * size in MB,             size = sum of group_size * b + overhead  (§3.3)

One width ``b`` per group of weights, one range per tensor. The noise has the standard deviation of rounding with
step 1 / (2**b - 1) (uniform) or more (gaussian), so that the gradient of the task loss meets that of the size in b.

Noise has the mean 0, which rounding has not: where 0 lies anywhere between two codes, all weights near it err to one
side, the more the fewer bits, and their errors add up over inputs that are not centred. In training nothing shows it.
``range="absmax"``, which is not in the paper, puts 0 in the middle of two codes for every width, at no cost in size.

Differs from the official code: a group size that does not divide is padded; on disk the table of widths starts at the
smallest one in use, which can only make the file smaller than the paper's rule says; tied weights have one logit each
that is stepped once; widths 1..15 all survive storing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bitfront.quant.core import check
from bitfront.quant.storage.packed import Packed, grouped, ungrouped
from bitfront.quant.widths import LearnedWidth, LearnedWidths
from bitfront.ranges import Ranges


class DiffQQuantizer(LearnedWidth):
    """Noise of learned widths, and one range per tensor."""

    def __init__(self, w: Tensor, method: DiffQ) -> None:
        super().__init__(w, method)
        self.extra = method.extra_bits

    def extremes(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest and the highest value of the grid, differentiable in ``w``."""
        # max(0) and min(0), because the backward of amax and amin searches the whole tensor for ties.
        lo, hi = w.reshape(-1).min(0).values, w.reshape(-1).max(0).values
        if self.method.range == "absmax":
            hi = torch.maximum(hi, -lo)
            lo = -hi
        return lo, hi

    def surrogate(self, w: Tensor) -> Tensor:
        groups = grouped(w, self.method.group_size)
        lo, hi = self.extremes(groups)
        step = (hi - lo) / (torch.exp2(self.widths()) - 1)
        if self.method.noise == "gaussian":
            noise, step = torch.randn_like(groups), step / 2
        else:
            noise = torch.rand_like(groups).sub_(0.5)
        return ungrouped(torch.addcmul(groups, step[:, None], noise), w.shape)

    def encode(self, w: Tensor) -> Packed:
        lo, hi = self.extremes(w.detach().float())
        return Packed.nearest(w, self.stored_widths().int(), lo[None], (hi - lo)[None], self.method.group_size)

    def bits(self) -> Tensor:
        return self.coded_bits() + 64


@dataclass(kw_only=True)
class DiffQ(LearnedWidths):
    """Differentiable widths.

    Attributes:
        param: "bits" (b is a sigmoid of the logit between the limits) or "noise" (the logarithm of the noise is).
        noise: "gaussian" (standard deviation of half a step) or "uniform" (within half a step).
        range: "minmax" (the paper) or "absmax": from -max |w| to max |w|.
        extra_bits: added to every width when storing, never in training.
        lr: learning rate (Adam, constant, no weight decay) of the logits. A logit moves by at most lr per step: from 8
            to 3 bits takes 2,300 steps at 1e-3.
    """

    param: str = "bits"
    noise: str = "gaussian"
    range: str = "minmax"
    extra_bits: int = 0
    lr: float = 1e-3
    ranges: ClassVar[Ranges] = {
        "extra_bits": "-14..14",
        "param": ("bits", "noise"),
        "noise": ("gaussian", "uniform"),
        "range": ("minmax", "absmax"),
        "lr": "(0, inf)",
    }
    per_layer: ClassVar[tuple[str, ...]] = (*LearnedWidths.per_layer, "param", "noise", "range", "extra_bits")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(not (self.max_size and self.extra_bits), "extra_bits are for a penalty; max_size has its own rounding")

    def widths(self, logits: Tensor) -> Tensor:
        if self.param == "bits":
            return super().widths(logits)
        share = torch.sigmoid(logits)
        finest, coarsest = (-math.log(2**bits - 1) for bits in (self.max_bits, self.min_bits))
        return torch.log2(1 + torch.exp(-(share * finest + (1 - share) * coarsest)))

    def initial_logit(self) -> float:
        if self.param == "bits":
            return super().initial_logit()
        finest, coarsest, start = (math.log(2**b - 1) for b in (self.max_bits, self.min_bits, self.init_bits))
        share = (start - coarsest) / (finest - coarsest)
        return math.log(share / (1 - share))

    def quantizer(self, w: Tensor) -> DiffQQuantizer:
        return DiffQQuantizer(w, self)

    def remedy(self) -> str:
        return (
            f"a step changes them by at most lr={self.lr:g}; train for more steps, or with a larger "
            f"{type(self).__name__}(lr=...)"
        )

    def optimizer(self, parameters: list[nn.Parameter], steps: int = 0) -> torch.optim.Optimizer | None:
        return torch.optim.Adam(parameters, lr=self.lr)
