"""Quantization-aware training with the straight-through estimator (Bengio et al. 2013, arXiv 1308.3432), as the
baseline "QAT" of the DiffQ paper (arXiv 2104.09987):

    w_train = w + stop_gradient(Q(w) - w),       Q = round to nearest between the current extremes

Differs from the official code: ranges per tensor, row or group (there: tensor), widths are whole numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitfront.quant.core import FixedBits, Trained
from bitfront.quant.model import Quantizer
from bitfront.quant.storage.packed import Packed, grouped
from bitfront.quant.storage.rounding import round_to_nearest
from bitfront.quant.storage.scales import Scales


class STEQuantizer(Quantizer):
    """Sees the stored weight, sends the gradient to the float weight unchanged."""

    def __init__(self, w: Tensor, bits: int, group_size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.width, self.group_size, self.dtype = bits, group_size, dtype
        groups = grouped(w.detach(), group_size)
        self.size = float(bits * groups.numel() + 64 * len(groups))

    def surrogate(self, w: Tensor) -> Tensor:
        return w + (self.encode(w).decode() - w).detach()

    def encode(self, w: Tensor) -> Packed:
        return round_to_nearest(w, self.width, self.group_size, Scales(self.dtype))

    def bits(self) -> Tensor:
        return torch.tensor(self.size)


@dataclass(kw_only=True)
class STE(FixedBits, Trained):
    """Straight-through estimator; all its options are ``FixedBits``'."""

    def quantizer(self, w: Tensor) -> STEQuantizer:
        return STEQuantizer(w, self.bits, self.group_size, self.dtype)
