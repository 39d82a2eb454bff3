"""Rounding to nearest between the extremes of each group: what ``rtn`` stores and ``ste`` trains through."""

from __future__ import annotations

import torch
from torch import Tensor

from bitfront.quant.storage.packed import Packed, grouped, middle_code
from bitfront.quant.storage.scales import PLAIN, Scales


def min_max(
    w: Tensor, group_size: int, bits: int = 1, symmetric: bool = False, round_zero: bool = False
) -> tuple[Tensor, Tensor]:
    """Smallest value and range, ``[groups]`` each, of the grid of so many bits from the smallest to the largest weight
    of each group of ``w``; as ``spanning`` where 0 is to be a value."""
    return spanning(*torch.aminmax(grouped(w, group_size), dim=1), bits, symmetric, round_zero)


def spanning(lo: Tensor, hi: Tensor, bits: int, symmetric: bool, round_zero: bool) -> tuple[Tensor, Tensor]:
    """Smallest value and range of the grid from ``lo`` to ``hi``.

    Args:
        lo, hi: any shape.
        bits: of its codes.
        symmetric: widen it, so that the middle code stands for 0.
        round_zero: widen it to 0 and move it by at most half the distance of two values, so that a code stands for 0.
    """
    levels = 2**bits - 1
    if symmetric:
        middle = middle_code(bits)
        scale = torch.maximum(-lo / middle, hi / (levels - middle))
        return -middle * scale, levels * scale
    if not round_zero:
        return lo, hi - lo
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    scale = (hi - lo) / levels
    return (lo * reciprocal(scale)).round_().mul_(scale), levels * scale


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale; 0 where all codes mean the same."""
    return torch.where(scale == 0, 0.0, 1 / scale)


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


def on_stored_grid(
    w: Tensor, bits: int | Tensor, lo: Tensor, span: Tensor, group_size: int, scales: Scales = PLAIN
) -> Packed:
    """Round ``w`` to nearest on the grids, ``[groups]``, that are left when these are stored as they can be; ``bits``
    is of all, or ``[groups]``."""
    widths = torch.as_tensor(bits, device=w.device).reshape(-1)
    lo, span = by_rows(lo, w.shape), by_rows(span, w.shape)
    scales = scales.fitting(lo, span, widths if len(widths) == 1 else widths.view_as(span))
    lo, span = (x.flatten() for x in scales.stored(lo, span))
    return Packed.nearest(w, widths, lo, span, group_size, scales.table)


def by_rows(x: Tensor, shape: torch.Size) -> Tensor:
    """Numbers ``[groups]`` as ``[rows, groups of a row]``; all in a column where groups cross rows."""
    rows = shape[0] if len(shape) > 1 and len(x) % shape[0] == 0 else len(x)
    return x.reshape(rows, -1)


def fitted_range(
    w: Tensor, group_size: int, bits: int, symmetric: bool = False, round_zero: bool = False
) -> tuple[Tensor, Tensor]:
    """Smallest value and range of the grid on which rounding to nearest has the least squared error, by Lloyd's
    alternation of rounding and least squares from shares of the full range.

    Args:
        w: finite weights.
        group_size, bits, symmetric, round_zero: of the grid, as in ``min_max``.

    Returns:
        ``[groups]`` each.
    """
    groups, levels = grouped(w.float(), group_size), 2**bits - 1
    tied = symmetric or round_zero
    mean = torch.zeros_like(groups[:, :1]) if tied else groups.mean(1, keepdim=True)
    centred = groups - mean
    lo, hi = (x[:, None] for x in torch.aminmax(centred, dim=1))
    first, span = spanning(lo, hi, bits, symmetric, round_zero)
    full = span / levels
    middle: Tensor | float = middle_code(bits) if symmetric else levels / 2
    if round_zero and not symmetric:
        middle = (-first * reciprocal(full)).round_()
    best = [full, mean + first, torch.full_like(full, torch.inf)]  # scale, zero, error
    for share in torch.linspace(1.0, 0.25, 16).tolist():
        scale, zero = full * share, mean + first * share
        for _ in range(5):
            a = (groups - zero).mul_(reciprocal(scale)).round_().clamp_(0, levels).sub_(middle)
            centre = torch.zeros_like(mean) if tied else a.mean(1, keepdim=True)
            power = (a - centre).square().sum(1, keepdim=True)
            scale = torch.where(power > 0, ((a - centre) * centred).sum(1, keepdim=True) / power, scale)
            zero = mean - (centre + middle) * scale
            error = (a.add_(middle).mul_(scale).add_(zero).sub_(groups)).square_().sum(1, keepdim=True)
            better = error < best[2]
            best = [torch.where(better, new, old) for new, old in zip((scale, zero, error), best, strict=True)]
    return best[1][:, 0], best[0][:, 0] * levels
