"""Round to nearest: every weight to the closest of ``2**bits`` equidistant values between the smallest and the
largest weight of its tensor, row or group; what the other methods are measured against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from src.packed import Packed, grouped
from src.quant.calibration import PostTraining
from src.quant.core import FixedBits
from src.quant.inputs import Moments


def min_max(w: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Smallest weight and range of each group of ``w``: ``[groups]`` each."""
    lo, hi = torch.aminmax(grouped(w, group_size), dim=1)
    return lo, hi - lo


@torch.no_grad()
def round_to_nearest(w: Tensor, bits: int, group_size: int, dtype: torch.dtype = torch.float32) -> Packed:
    """Quantize ``w`` (any shape) to ``bits`` bits between the extremes of each group (``packed.grouped``).

    Args:
        w: finite weights.
        bits: 1..15.
        group_size: as in ``grouped``.
        dtype: in which the extremes are stored.
    """
    w = w.float()
    lo, span = min_max(w, group_size)
    return Packed.nearest(w, torch.tensor([bits], device=w.device), lo.to(dtype), span.to(dtype), group_size)


@dataclass(kw_only=True)
class RTN(FixedBits, PostTraining):
    """Round to nearest.

    Attributes:
        bits: 1..15.
        group_size: weights that share a range: n consecutive ones, -1 a row, 0 the whole tensor.
    """

    group_size: int = -1

    def solve(self, w: Tensor, inputs: Moments | None) -> tuple[Packed, dict[str, Any]]:
        return round_to_nearest(w, self.bits, self.group_size), {}
