"""Widths for a size: of the options that each tensor has, those with the least predicted loss whose bytes fit together
(a multiple-choice knapsack).

The better one of two. The sums of one option of each tensor are built up tensor by tensor, and of all sums with as many
bytes or fewer only the best is kept; of more than ``STATES``, of neighbours in size the best, with its exact bytes:
with few tensors that is the optimum. Or a price of a byte decides for each tensor by itself (Lagrange), and
what is left over is spent step by step, which is close with many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STATES = 1 << 12
HALVINGS = 60


@dataclass(frozen=True)
class Option:
    """One way to store a tensor.

    Attributes:
        which: of the tensor's.
        nbytes: of the entry in the file.
        loss: that is predicted; the losses of all tensors are in the same unit.
    """

    which: int
    nbytes: int
    loss: float


def allocate(options: Sequence[Sequence[Option]], limit: int) -> list[Option] | None:
    """An option for each tensor.

    Args:
        options: of each tensor, at least one.
        limit: bytes of all together.

    Returns:
        The choice, or None if even the smallest ones are larger.
    """
    kept = [_front(some) for some in options]
    room = limit - sum(some[0].nbytes for some in kept)
    if room < 0:
        return None
    return min(_summed(kept, room), _priced(kept, room), key=lambda chosen: sum(option.loss for option in chosen))


def _summed(kept: Sequence[Sequence[Option]], room: int) -> list[Option]:
    """By sums, with so many bytes to spend beyond the smallest options."""
    sizes, losses = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # of each state, the state before and the option
    for some in kept:
        more = np.array([o.nbytes - some[0].nbytes for o in some])
        added = sizes[:, None] + more, losses[:, None] + np.array([o.loss for o in some])
        order = np.lexsort((added[1].ravel(), added[0].ravel()))
        order = order[added[0].ravel()[order] <= room]
        order = order[_best(added[0].ravel()[order], added[1].ravel()[order], room)]
        sizes, losses = (x.ravel()[order] for x in added)
        steps.append((order // len(some), order % len(some)))
    state, chosen = len(sizes) - 1, []
    for some, (before, option) in zip(reversed(kept), reversed(steps), strict=True):
        chosen.append(some[option[state]])
        state = before[state]
    return chosen[::-1]


def _priced(kept: Sequence[Sequence[Option]], room: int) -> list[Option]:
    """By one price of a byte for all, the lowest that fits, and what is left for the best steps that fit still."""

    def at(log_price: float) -> list[Option]:
        price = math.exp(log_price)
        return [min(some, key=lambda option: option.loss + price * option.nbytes) for some in kept]

    def spent(chosen: Sequence[Option]) -> int:
        return sum(option.nbytes - some[0].nbytes for option, some in zip(chosen, kept, strict=True))

    low, high = -90.0, 90.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if spent(at(middle)) <= room else (middle, high)
    chosen = at(high)
    left = room - spent(chosen)
    steps = [
        ((now.loss - option.loss) / (option.nbytes - now.nbytes), n, option)
        for n, (some, now) in enumerate(zip(kept, chosen, strict=True))
        for option in some
        if option.nbytes > now.nbytes
    ]
    for _, n, option in sorted(steps, key=lambda step: -step[0]):
        more = option.nbytes - chosen[n].nbytes
        if 0 < more <= left and option.loss < chosen[n].loss:
            chosen[n], left = option, left - more
    return chosen


def _front(options: Sequence[Option]) -> list[Option]:
    """Without those that are no better than a smaller one, by size."""
    front: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.loss)):
        if not front or option.loss < front[-1].loss:
            front.append(option)
    return front


def _best(sizes: np.ndarray, losses: np.ndarray, room: int) -> np.ndarray:
    """Of states by size, those better than all smaller ones; of too many, the last in each of ``STATES`` ranges."""
    lowest = np.minimum.accumulate(losses)
    better = np.flatnonzero(np.r_[True, losses[1:] < lowest[:-1]])
    if len(better) <= STATES:
        return better
    places = sizes[better] * STATES // (room + 1)
    return better[np.r_[places[1:] != places[:-1], True]]
