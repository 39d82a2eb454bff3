"""Widths that are learned, one for each group of a tensor: what the methods share that have them."""

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
from bitfront.quant.storage.packed import Packed, grouped
from bitfront.ranges import Ranges


class LearnedWidth(Quantizer):
    """Learned widths of one tensor, as logits ``[groups]``."""

    threshold: Tensor | None

    def __init__(self, w: Tensor, method: LearnedWidths) -> None:
        super().__init__()
        self.method: Any = method
        groups = grouped(w.detach(), method.group_size)
        self.group_numel = groups.shape[1]
        self.least, self.extra = method.min_bits, 0
        self.logits = nn.Parameter(torch.full((len(groups),), method.initial_logit(), device=w.device))
        self.register_buffer("threshold", torch.tensor(0.5, device=w.device) if method.max_size else None)

    def widths(self) -> Tensor:
        """Continuous bits of each group, ``[groups]``, between min_bits and max_bits."""
        return self.method.widths(self.logits)

    def stored_widths(self) -> Tensor:
        """Whole bits of each group on disk, ``[groups]``."""
        if self.threshold is not None:
            return stored(self.widths().detach(), self.threshold, self.least)
        return (self.widths().detach() + self.extra).round().clamp(1, MAX_BITS)

    def hold(self, w: Tensor) -> None:
        """Keep these for the rest of the training, of a method that goes on with them; ``w`` is the weight by then."""
        raise NotImplementedError

    def coded_bits(self) -> Tensor:
        """Bits of the codes and, if they are written plainly, of the widths; as ``Quantizer.bits``."""
        widths = self.widths() + self.extra if self.training else self.stored_widths()
        table = (1 + widths.detach().max().round() - self.least).clamp_min(1).log2().ceil()
        return self.group_numel * widths.sum() + 8 + len(widths) * table


@dataclass(kw_only=True)
class LearnedWidths(Trained):
    """A method with such widths.

    Attributes:
        penalty: what a MB costs in units of the loss (the paper's lambda).
        group_size: consecutive weights that share a width; 0 for the whole tensor, -1 for a row.
        min_bits, init_bits, max_bits: range and start of the widths.
    """

    penalty: float = field(default=1.0)
    group_size: int = 8
    min_bits: int = 2
    init_bits: int = 8
    max_bits: int = 15
    ranges: ClassVar[Ranges] = {
        "group_size": "-1..",
        "min_bits": "1..15",
        "init_bits": "1..15",
        "max_bits": "1..15",
    }
    per_layer: ClassVar[tuple[str, ...]] = ("group_size", "min_bits", "init_bits", "max_bits")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.min_bits < self.init_bits < self.max_bits,
            f"widths have min_bits < init_bits < max_bits, got {self.min_bits}, {self.init_bits}, {self.max_bits}",
        )

    def widths(self, logits: Tensor) -> Tensor:
        """Bits of logits, elementwise."""
        return self.min_bits + torch.sigmoid(logits) * (self.max_bits - self.min_bits)

    def initial_logit(self) -> float:
        """The logit of init_bits."""
        return math.log((self.init_bits - self.min_bits) / (self.max_bits - self.init_bits))

    def steering(self, model: QuantizedModel, about: Mapping[str, Any]) -> Steering:
        quantizers: Any = {name: quantizer for name, quantizer, _ in model.items()}
        return Steering(quantizers, model.network, int(self.max_size * MB), about, model.raw_dtype)

    def remarks(self, packed: Mapping[str, Packed]) -> list[str]:
        widths = torch.cat([p.bits.float().expand(len(p.codes)).cpu() for p in packed.values()] or [torch.zeros(1)])
        moved = self.max_size or not self.penalty or widths.mean() < self.init_bits - 0.5
        return [] if moved else [f"the widths have hardly moved from {self.init_bits} bits: {self.remedy()}"]

    def remedy(self) -> str:
        """Of widths that have hardly moved."""
        raise NotImplementedError
