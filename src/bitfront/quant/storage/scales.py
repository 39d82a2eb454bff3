"""How ``lo`` and ``span`` of a tensor's grids are stored: as floats, or, where a row has several grids, as whole
numbers of few bits relative to a float16 of the row for each of the two (GGUF's K-quants have such tables):

    x = top * q / (2**bits - 1),        top: the number of the row with the largest magnitude

What is stored so stays the same when it is stored again: ``top`` is one of the numbers itself, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

EXACT = torch.float32
EXACTLY = 0.25  # of the distance of two values: what the type of a grid may move it by


def told(dtype: torch.dtype) -> str:
    """A type as headers and settings name it: "float16"."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Scales:
    """The form.

    Attributes:
        dtype: of what ``stored`` gives; float32 for tables.
        table: bits of the whole numbers; 0 for floats of ``dtype``.
        symmetric: ``lo`` is a multiple of ``span``, and stays so.
    """

    dtype: torch.dtype = EXACT
    table: int = 0
    symmetric: bool = False

    @property
    def exact(self) -> bool:
        """Whether nothing is rounded."""
        return self.dtype == EXACT and not self.table

    def stored(self, lo: Tensor, span: Tensor) -> tuple[Tensor, Tensor]:
        """What is left of them, ``[rows, scales of a row]``, when they are stored; infinite where they are too large
        for that."""
        if not self.table:
            return lo.to(self.dtype), span.to(self.dtype)
        q, tops = coarse(span, self.table)
        q_lo, tops_lo = coarse(lo, self.table)
        return fine(q if self.symmetric else q_lo, tops_lo, self.table), fine(q, tops, self.table)

    def fitting(self, lo: Tensor, span: Tensor, bits: int | Tensor) -> Scales:
        """This form, or the next one that a tensor's grids can have: no table where rows have one grid, or very
        different ones; float32 where ``dtype`` would move the values by ``EXACTLY`` or more.

        Args:
            lo, span: ``[rows, scales of a row]``.
            bits: of the codes, of all or of each scale.
        """
        if self.table and lo.shape[1] > 1 and self._tabulates(lo.float(), span.float()):
            return replace(self, dtype=EXACT)
        moved = EXACTLY * span.float().abs() / (2**bits - 1)
        moved = torch.where(moved > 0, moved, lo.float().abs() / 100)  # all values of the grid are one
        holds = all(_holds(self.dtype, x, moved) for x in (lo, span))
        return replace(self, dtype=self.dtype if holds else EXACT, table=0)

    def _tabulates(self, lo: Tensor, span: Tensor) -> bool:
        """Whether the table has all rows' grids: their tops as float16 to less than a quarter of a unit, their ``lo``
        of one sign, and no ``span`` that it would change by more than ``EXACTLY``."""
        units = [top(x).abs() / (2**self.table - 1) for x in (lo, span)]
        if not all(_holds(torch.float16, top(x), unit / 4) for x, unit in zip((lo, span), units, strict=True)):
            return False
        new_lo, new_span = self.stored(lo, span)
        return bool(((new_lo - lo).abs() <= units[0]).all() and ((new_span - span).abs() <= EXACTLY * span.abs()).all())


def _holds(dtype: torch.dtype, x: Tensor, error: Tensor) -> bool:
    return bool(((x.to(dtype).float() - x).abs() <= error).all())


PLAIN = Scales()


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
