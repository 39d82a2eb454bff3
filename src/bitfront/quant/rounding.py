"""Rounding to nearest between the extremes of each group: what ``rtn`` stores and ``ste`` trains through."""

from __future__ import annotations

import torch
from torch import Tensor

from bitfront.quant.packed import Packed, grouped, middle_code
from bitfront.quant.scales import PLAIN, Scales


def min_max(w: Tensor, group_size: int, bits: int = 1, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Smallest weight and range of each group of ``w``, ``[groups]`` each; if symmetric, those of the grid of so many
    bits whose middle code stands for 0."""
    lo, hi = torch.aminmax(grouped(w, group_size), dim=1)
    if not symmetric:
        return lo, hi - lo
    levels, middle = 2**bits - 1, middle_code(bits)
    scale = torch.maximum(-lo / middle, hi / (levels - middle))
    return -middle * scale, levels * scale


@torch.no_grad()
def round_to_nearest(w: Tensor, bits: int, group_size: int, scales: Scales = PLAIN) -> Packed:
    """Quantize ``w`` (any shape) to ``bits`` bits between the extremes of each group (``packed.grouped``).

    Args:
        w: finite weights.
        bits: 1..15.
        group_size: as in ``grouped``.
        scales: how the range is to be stored; if symmetric, it is widened so that the middle code stands for 0.
    """
    w = w.float()
    return on_stored_grid(w, bits, *min_max(w, group_size, bits, scales.symmetric), group_size, scales)


def on_stored_grid(w: Tensor, bits: int, lo: Tensor, span: Tensor, group_size: int, scales: Scales = PLAIN) -> Packed:
    """Round ``w`` to nearest on the grids, ``[groups]``, that are left when these are stored as they can be."""
    lo, span = by_rows(lo, w.shape), by_rows(span, w.shape)
    scales = scales.fitting(lo, span, bits)
    lo, span = (x.flatten() for x in scales.stored(lo, span))
    return Packed.nearest(w, torch.tensor([bits], device=w.device), lo, span, group_size, scales.table)


def by_rows(x: Tensor, shape: torch.Size) -> Tensor:
    """Numbers ``[groups]`` as ``[rows, groups of a row]``; all in a column where groups cross rows."""
    rows = shape[0] if len(shape) > 1 and len(x) % shape[0] == 0 else len(x)
    return x.reshape(rows, -1)
