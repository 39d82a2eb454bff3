"""Round to nearest: every weight to the closest of ``2**bits`` equidistant values between the smallest and the
largest weight of its tensor, row or group. No data, no training; what the other methods are measured against.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from src.packed import Packed, grouped
from src.quant.core import FixedBits, PostTraining


def min_max(w: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Smallest weight and range of each group of ``w``: ``[groups]`` each."""
    lo, hi = torch.aminmax(grouped(w, group_size), dim=1)
    return lo, hi - lo


@torch.no_grad()
def round_to_nearest(w: Tensor, bits: int, group_size: int) -> Packed:
    """Quantize ``w`` (any shape) to ``bits`` bits between the extremes of each group (``artifact.grouped``)."""
    w = w.float()
    return Packed.nearest(w, torch.tensor([bits], device=w.device), *min_max(w, group_size), group_size)


@dataclass(kw_only=True)
class RTN(FixedBits, PostTraining):
    """Round to nearest; all its options are ``FixedBits``'."""

    def solve(self, w: Tensor) -> Packed:
        return round_to_nearest(w, self.bits, self.group_size)
