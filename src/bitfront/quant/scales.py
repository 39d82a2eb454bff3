"""How ``lo`` and ``span`` of a tensor's grids are stored: as floats, or, where a row has several grids, as whole
numbers of few bits relative to a float16 of the row for each of the two (GGUF's K-quants have such tables):

    x = top * q / (2**bits - 1),        top: the number of the row with the largest magnitude

What is stored so stays the same when it is stored again: ``top`` is one of the numbers itself, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EXACT = torch.float32
EXACTLY = 0.25  # of the distance of two values: what the type of a grid may move it by


@dataclass(frozen=True)
class Scales:
    """The form.

    Attributes:
        dtype: of what ``stored`` gives; float32 for tables.
        table: bits of the whole numbers; 0 for floats of ``dtype``.
    """

    dtype: torch.dtype = EXACT
    table: int = 0

    def stored(self, x: Tensor) -> Tensor:
        """What is left of ``lo`` or ``span``, ``[rows, scales of a row]``, when it is stored; infinite where it is too
        large for that."""
        return fine(*coarse(x, self.table), self.table) if self.table else x.to(self.dtype)

    @classmethod
    def fitting(cls, dtype: torch.dtype, table: int, lo: Tensor, span: Tensor, bits: int) -> Scales:
        """The form that is asked for, or the next one that a tensor's grids can have: no table where rows have one grid
        or a row is out of float16's range, float32 where ``dtype`` would move the values by ``EXACTLY`` or more.

        Args:
            dtype, table: as asked for.
            lo, span: ``[rows, scales of a row]``.
            bits: of the codes.
        """
        if table and lo.shape[1] > 1 and all(_holds(torch.float16, top(x), top(x).abs() / 100) for x in (lo, span)):
            return cls(EXACT, table)
        moved = EXACTLY * span.float().abs() / (2**bits - 1)
        moved = torch.where(moved > 0, moved, lo.float().abs() / 100)  # all values of the grid are one
        return cls(dtype if all(_holds(dtype, x, moved) for x in (lo, span)) else EXACT)


def _holds(dtype: torch.dtype, x: Tensor, error: Tensor) -> bool:
    return bool(((x.to(dtype).float() - x).abs() <= error).all())


def top(x: Tensor) -> Tensor:
    """Of each row of ``[rows, n]``, the number with the largest magnitude, ``[rows, 1]``."""
    return x.gather(1, x.abs().argmax(1, keepdim=True))


def coarse(x: Tensor, table: int) -> tuple[Tensor, Tensor]:
    """Numbers in few bits; those of the other sign than the row's ``top`` become 0.

    Args:
        x: ``[rows, n]``.
        table: bits, 1..8.

    Returns:
        The whole numbers, uint8 ``[rows, n]``, and the tops, float16 ``[rows, 1]``.
    """
    tops = top(x.float()).half()
    share = x.float() / torch.where(tops == 0, 1.0, tops.float())
    return (share * (2**table - 1)).round_().clamp_(0, 2**table - 1).to(torch.uint8), tops


def fine(q: Tensor, tops: Tensor, table: int) -> Tensor:
    """What ``coarse`` has left, float32 ``[rows, n]``."""
    return (q.float() / (2**table - 1)).mul_(tops.float())
