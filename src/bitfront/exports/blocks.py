"""Packed tensors as other formats have them: codes in rows, cut into blocks of consecutive values, each of which has
two floats of its own,

    w = lo + step * code

so that a grid which is shared by more values, as by a row, stands in several blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bitfront.quant.storage.packed import Packed

REMEDY = (
    "quantize with group_size=32, 64 or 128, or with -1 where rows have a multiple of 32 values; quant.exclude= leaves "
    "a tensor as it is"
)


@dataclass(frozen=True)
class Blocks:
    """A tensor.

    Attributes:
        codes: uint8 or int16 ``[rows, columns]``.
        lo, step: float32 ``[rows, blocks of a row]``.
        largest: the largest code that its widths have.
    """

    codes: np.ndarray
    lo: Tensor
    step: Tensor
    largest: int

    @classmethod
    def of(cls, packed: Packed, size: int) -> Blocks | None:
        """Cut into blocks; None where a block would not lie within a row and a group.

        Args:
            packed: a tensor.
            size: values of a block.
        """
        if len(packed.shape) != 2 or packed.axes or packed.shape[1] % size or _shared(packed) % size:
            return None
        (rows, columns), groups, values = packed.shape, *packed.codes.shape
        padded = groups * values // rows if packed.rows else columns  # a row in memory
        codes = packed.codes.reshape(-1)[: rows * padded].view(rows, padded)[:, :columns]
        starts = torch.arange(rows)[:, None] * padded + torch.arange(0, columns, size)
        lo, step, largest = Packed.grid(packed.bits, packed.lo, packed.span, groups)
        lo, step = (x.expand(groups, 1)[starts // values, 0] for x in (lo, step))
        return cls(codes.numpy(), lo, step, int(largest.max()))

    @property
    def size(self) -> int:
        """Values of a block."""
        return self.codes.shape[1] // self.lo.shape[1]

    def moved(self, lo: Tensor, step: Tensor) -> float:
        """How far values lie from these with other floats, at most, in steps of their grids. (They are linear in the
        code, so that the first or the last one differs most.)"""
        first = lo - self.lo
        last = first + (step - self.step) * self.largest
        return relative(torch.maximum(first.abs(), last.abs()), self.step, self.lo)


def relative(error: Tensor, step: Tensor, lo: Tensor) -> float:
    """The largest error in steps of its grid; of a grid that is one value, in that."""
    unit = torch.where(step != 0, step, lo).abs()
    return float((error / torch.where(unit > 0, unit, 1.0)).max())


def _shared(packed: Packed) -> int:
    """Consecutive values that have one grid."""
    groups, values = packed.codes.shape
    return values * (groups // packed.lo.numel()) if len(packed.bits.unique()) == 1 else values
