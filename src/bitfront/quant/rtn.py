"""Round to nearest: every weight to the closest of ``2**bits`` equidistant values between the smallest and the
largest weight of its tensor, row or group; what the other methods are measured against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitfront.quant.calibration import PostTraining
from bitfront.quant.core import FixedBits
from bitfront.quant.inputs import Moments
from bitfront.quant.packed import Packed
from bitfront.quant.rounding import round_to_nearest
from bitfront.ranges import Ranges


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
    sees_inputs: ClassVar[bool] = False
    per_layer: ClassVar[tuple[str, ...]] = ("bits", "group_size", "symmetric", "scale_dtype")
    ranges: ClassVar[Ranges] = {"scale_dtype": ("float32", "float16", "bfloat16")}

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored scales."""
        return getattr(torch, self.scale_dtype)

    @property
    def keeps_zero(self) -> bool:
        return self.symmetric

    def solve(self, w: Tensor, inputs: Moments | None) -> tuple[Packed, dict[str, Any]]:
        return round_to_nearest(w, self.bits, self.group_size, self.symmetric, self.dtype), {}
