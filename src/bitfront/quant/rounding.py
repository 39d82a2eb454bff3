"""Rounding to nearest between the extremes of each group: what ``rtn`` stores and ``ste`` trains through."""

from __future__ import annotations

import torch
from torch import Tensor

from bitfront.quant.packed import Packed, as_stored, grouped, middle_code


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
