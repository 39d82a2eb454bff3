"""Round to nearest: every weight to the closest of ``2**bits`` equidistant values between the smallest and the
largest weight of its tensor, row or group; what the other methods are measured against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from src.packed import Packed, as_stored, grouped, middle_code
from src.quant.calibration import PostTraining
from src.quant.core import FixedBits, check
from src.quant.inputs import Moments

SCALE_TYPES = ("float32", "float16", "bfloat16")


def min_max(w: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Smallest weight and range of each group of ``w``: ``[groups]`` each."""
    lo, hi = torch.aminmax(grouped(w, group_size), dim=1)
    return lo, hi - lo


@torch.no_grad()
def round_to_nearest(
    w: Tensor, bits: int, group_size: int, symmetric: bool = False, dtype: torch.dtype = torch.float32
) -> Packed:
    """Quantize ``w`` (any shape) to ``bits`` bits between the extremes of each group (``packed.grouped``).

    Args:
        w: finite weights.
        bits: 1..15.
        group_size: as in ``grouped``.
        symmetric: widen the range so that the middle code stands for 0.
        dtype: in which the range is stored.

    Raises:
        BitfrontError: the weights are too large for the type.
    """
    w = w.float()
    lo, span = min_max(w, group_size)
    if symmetric:
        levels, middle = 2**bits - 1, middle_code(bits)
        scale = torch.maximum(-lo / middle, (lo + span) / (levels - middle))
        lo, span = -middle * scale, levels * scale
    lo, span = as_stored(lo, dtype), as_stored(span, dtype)
    return Packed.nearest(w, torch.tensor([bits], device=w.device), lo, span, group_size)


@dataclass(kw_only=True)
class RTN(PostTraining, FixedBits):
    """Round to nearest.

    Attributes:
        bits: 1..15.
        group_size: weights that share a range: n consecutive ones, -1 a row, 0 the whole tensor.
        symmetric: the middle code stands for 0, up to the rounding of what is stored.
        scale_dtype: in which the range is stored: "float32", "float16" or "bfloat16".
    """

    group_size: int = -1
    symmetric: bool = False
    scale_dtype: str = "float32"
    per_layer: ClassVar[tuple[str, ...]] = ("bits", "group_size", "symmetric", "scale_dtype")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.scale_dtype in SCALE_TYPES, f"quant.scale_dtype is one of {', '.join(SCALE_TYPES)}")

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored scales."""
        return getattr(torch, self.scale_dtype)

    @property
    def keeps_zero(self) -> bool:
        return self.symmetric

    def solve(self, w: Tensor, inputs: Moments | None) -> tuple[Packed, dict[str, Any]]:
        return round_to_nearest(w, self.bits, self.group_size, self.symmetric, self.dtype), {}
