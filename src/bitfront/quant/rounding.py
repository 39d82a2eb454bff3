"""Rounding to nearest between the extremes of each group: what ``rtn`` stores and ``ste`` trains through."""

from __future__ import annotations

import torch
from torch import Tensor

from bitfront.quant.packed import Packed, grouped, middle_code
from bitfront.quant.scales import EXACT, Scales


def min_max(w: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Smallest weight and range of each group of ``w``: ``[groups]`` each."""
    lo, hi = torch.aminmax(grouped(w, group_size), dim=1)
    return lo, hi - lo


@torch.no_grad()
def round_to_nearest(
    w: Tensor, bits: int, group_size: int, symmetric: bool = False, dtype: torch.dtype = EXACT, table: int = 0
) -> Packed:
    """Quantize ``w`` (any shape) to ``bits`` bits between the extremes of each group (``packed.grouped``).

    Args:
        w: finite weights.
        bits: 1..15.
        group_size: as in ``grouped``.
        symmetric: widen the range so that the middle code stands for 0.
        dtype, table: in which the range is stored, where it can be (``Scales.fitting``).
    """
    w = w.float()
    lo, span = min_max(w, group_size)
    if symmetric:
        levels, middle = 2**bits - 1, middle_code(bits)
        scale = torch.maximum(-lo / middle, (lo + span) / (levels - middle))
        lo, span = -middle * scale, levels * scale
    return on_stored_grid(w, bits, lo, span, group_size, dtype, table)


def on_stored_grid(
    w: Tensor, bits: int, lo: Tensor, span: Tensor, group_size: int, dtype: torch.dtype = EXACT, table: int = 0
) -> Packed:
    """Round ``w`` to nearest on the grids, ``[groups]``, that are left when these are stored."""
    lo, span = by_rows(lo, w.shape), by_rows(span, w.shape)
    scales = Scales.fitting(dtype, table, lo, span, bits)
    lo, span = scales.stored(lo).flatten(), scales.stored(span).flatten()
    return Packed.nearest(w, torch.tensor([bits], device=w.device), lo, span, group_size, scales.table)


def by_rows(x: Tensor, shape: torch.Size) -> Tensor:
    """Numbers ``[groups]`` as ``[rows, groups of a row]``; all in a column where groups cross rows."""
    rows = shape[0] if len(shape) > 1 and len(x) % shape[0] == 0 else len(x)
    return x.reshape(rows, -1)
