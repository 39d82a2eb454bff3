"""Round to nearest: every weight to the closest of ``2**bits`` equidistant values between the smallest and the
largest weight of its tensor, row or group, or in the range with the least error; what the other methods are measured
against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from bitfront.quant.core import FixedBits
from bitfront.quant.engine.calibration import PostTraining
from bitfront.quant.layers.inputs import Moments
from bitfront.quant.storage.packed import Packed
from bitfront.quant.storage.rounding import fitted_range, min_max, on_stored_grid
from bitfront.quant.storage.scales import Scales
from bitfront.ranges import Ranges

GROUPS, TABLE = (64, 32), 6  # weights of a group, and bits of its range, that may pay where a row is one group


@dataclass(kw_only=True)
class RTN(PostTraining, FixedBits):
    """Round to nearest.

    Attributes:
        bits: 1..15.
        group_size, scale_dtype: as in ``FixedBits``.
        symmetric: the middle code stands for 0, up to the rounding of what is stored.
        scale_bits: in which the ranges of a row's groups are stored, relative to a pair of float16 for the row: 1..8,
            or 0 for ``scale_dtype``. Codes and zeros are fitted to what that makes of them.
        grid: "minmax", from the smallest to the largest weight, or "mse", the range in which rounding to nearest has
            the least squared error.
        round_zero: a code stands for 0 (the zero point is a whole number), up to the rounding of what is stored; of
            symmetric grids, one always does.
    """

    group_size: int = -1
    scale_dtype: str = "float16"
    symmetric: bool = False
    scale_bits: int = 0
    grid: str = "minmax"
    round_zero: bool = False
    sees_inputs: ClassVar[bool] = False
    per_layer: ClassVar[tuple[str, ...]] = (*FixedBits.per_layer, "symmetric", "scale_bits", "grid", "round_zero")
    ranges: ClassVar[Ranges] = {"scale_bits": "0..8", "grid": ("minmax", "mse")}

    @property
    def scales(self) -> Scales:
        """How they are to be stored."""
        return Scales(self.dtype, self.scale_bits, self.symmetric)

    def forms(self, w: Tensor) -> list[dict[str, Any]]:
        if self.group_size == 0 or self.scale_bits or w.dim() < 2:
            return [{}]
        columns, size = w[0].numel(), self.group_size
        tables = [{"group_size": n, "scale_bits": TABLE} for n in ([size] if size > 0 else GROUPS) if n < columns]
        return [{}, *tables]

    @property
    def keeps_zero(self) -> bool:
        return self.symmetric

    def solve(self, w: Tensor, inputs: Moments | None) -> tuple[Packed, dict[str, Any]]:
        w, ranges = w.float(), fitted_range if self.grid == "mse" else min_max
        lo, span = ranges(w, self.group_size, self.bits, self.symmetric, self.round_zero)
        return on_stored_grid(w, self.bits, lo, span, self.group_size, self.scales), {}
