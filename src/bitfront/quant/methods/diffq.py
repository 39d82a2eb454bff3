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
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bitfront.quant.core import Trained, check
from bitfront.quant.model import MB, QuantizedModel, Quantizer
from bitfront.quant.steered import Steering, stored
from bitfront.quant.storage.layout import MAX_BITS
from bitfront.quant.storage.packed import Packed, grouped, ungrouped
from bitfront.ranges import Ranges


class DiffQQuantizer(Quantizer):
    """Learned widths of one tensor, as logits ``[groups]``."""

    threshold: Tensor | None

    def __init__(self, w: Tensor, method: DiffQ) -> None:
        super().__init__()
        self.method = method
        groups = grouped(w.detach(), method.group_size)
        self.group_numel = groups.shape[1]
        self.least = method.min_bits
        self.logits = nn.Parameter(torch.full((len(groups),), method.initial_logit(), device=w.device))
        self.register_buffer("threshold", torch.tensor(0.5, device=w.device) if method.max_size else None)

    def widths(self) -> Tensor:
        """Continuous bits of each group, ``[groups]``, between min_bits and max_bits."""
        return self.method.widths(self.logits)

    def stored_widths(self) -> Tensor:
        """Whole bits of each group on disk, ``[groups]``."""
        if self.threshold is not None:
            return stored(self.widths().detach(), self.threshold, self.least)
        return (self.widths().detach() + self.method.extra_bits).round().clamp(1, MAX_BITS)

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
        widths = self.widths() + self.method.extra_bits if self.training else self.stored_widths()
        table = (1 + widths.detach().max().round() - self.method.min_bits).clamp_min(1).log2().ceil()
        return self.group_numel * widths.sum() + 64 + 8 + len(widths) * table


@dataclass(kw_only=True)
class DiffQ(Trained):
    """Differentiable widths.

    Attributes:
        penalty: what a MB costs in units of the loss (the paper's lambda).
        group_size: consecutive weights that share a width; 0 for the whole tensor, -1 for a row.
        min_bits, init_bits, max_bits: range and start of the widths.
        param: "bits" (b is a sigmoid of the logit between the limits) or "noise" (the logarithm of the noise is).
        noise: "gaussian" (standard deviation of half a step) or "uniform" (within half a step).
        range: "minmax" (the paper) or "absmax": from -max |w| to max |w|.
        extra_bits: added to every width when storing, never in training.
        lr: learning rate (Adam, constant, no weight decay) of the logits. A logit moves by at most lr per step: from 8
            to 3 bits takes 2,300 steps at 1e-3.
    """

    penalty: float = field(default=1.0)
    group_size: int = 8
    min_bits: int = 2
    init_bits: int = 8
    max_bits: int = 15
    param: str = "bits"
    noise: str = "gaussian"
    range: str = "minmax"
    extra_bits: int = 0
    lr: float = 1e-3
    ranges: ClassVar[Ranges] = {
        "group_size": "-1..",
        "min_bits": "1..15",
        "init_bits": "1..15",
        "max_bits": "1..15",
        "extra_bits": "-14..14",
        "param": ("bits", "noise"),
        "noise": ("gaussian", "uniform"),
        "range": ("minmax", "absmax"),
        "lr": "(0, inf)",
    }
    per_layer: ClassVar[tuple[str, ...]] = (
        "group_size",
        "min_bits",
        "init_bits",
        "max_bits",
        "param",
        "noise",
        "range",
        "extra_bits",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.min_bits < self.init_bits < self.max_bits,
            f"widths have min_bits < init_bits < max_bits, got {self.min_bits}, {self.init_bits}, {self.max_bits}",
        )
        check(not (self.max_size and self.extra_bits), "extra_bits are for a penalty; max_size has its own rounding")

    def widths(self, logits: Tensor) -> Tensor:
        """Bits of logits, elementwise."""
        share = torch.sigmoid(logits)
        if self.param == "bits":
            return self.min_bits + share * (self.max_bits - self.min_bits)
        finest, coarsest = (-math.log(2**bits - 1) for bits in (self.max_bits, self.min_bits))
        return torch.log2(1 + torch.exp(-(share * finest + (1 - share) * coarsest)))

    def initial_logit(self) -> float:
        """The logit of init_bits."""
        if self.param == "bits":
            share = (self.init_bits - self.min_bits) / (self.max_bits - self.min_bits)
        else:
            finest, coarsest, start = (math.log(2**b - 1) for b in (self.max_bits, self.min_bits, self.init_bits))
            share = (start - coarsest) / (finest - coarsest)
        return math.log(share / (1 - share))

    def quantizer(self, w: Tensor) -> DiffQQuantizer:
        return DiffQQuantizer(w, self)

    def steering(self, model: QuantizedModel, about: Mapping[str, Any]) -> Steering:
        quantizers: Any = {name: quantizer for name, quantizer, _ in model.items()}
        return Steering(quantizers, model.network, int(self.max_size * MB), about, model.raw_dtype)

    def remarks(self, packed: Mapping[str, Packed]) -> list[str]:
        widths = torch.cat([p.bits.float().expand(len(p.codes)).cpu() for p in packed.values()] or [torch.zeros(1)])
        if self.max_size or not self.penalty or widths.mean() < self.init_bits - 0.5:
            return []
        return [
            f"the widths have hardly moved from {self.init_bits} bits: a step changes them by at most lr={self.lr:g}; "
            "train for more steps, or with a larger DiffQ(lr=...)"
        ]

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer | None:
        return torch.optim.Adam(parameters, lr=self.lr)
