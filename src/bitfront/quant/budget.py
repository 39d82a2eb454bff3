"""Widths for a size: of the options that each tensor has, those with the least predicted loss whose bytes fit together
(a multiple-choice knapsack).

The sums of one option of each tensor are built up tensor by tensor, and of all sums with as many bytes or fewer only
the best is kept. Where that leaves more than ``STATES``, of neighbours in size the best is kept, with its exact bytes:
a choice always fits, and with few tensors it is the optimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STATES = 1 << 12


@dataclass(frozen=True)
class Option:
    """One way to store a tensor.

    Attributes:
        bits: its width.
        nbytes: of the entry in the file.
        loss: that is predicted; the losses of all tensors are in the same unit.
    """

    bits: int
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
