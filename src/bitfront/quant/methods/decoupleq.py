"""decoupleQ (Guo et al. 2024, arXiv 2404.12759): whole-numbered codes on a float grid that is no longer tied to the
extremes of the weights, solved for alternately.

    min over codes, scale, zero of  tr((Ŵ - W) H (Ŵ - W)ᵀ),     Ŵ = scale · codes + zero      (equation 6)

``level=0``, our procedure, per round: relax the problem to real numbers inside the box of the grid, drawn a little to
the centre of the box; round the result column by column; coordinate descent over the codes; least squares for the
grid. A row keeps the best it has seen, GPTQ's solution among it, so that no row is worse than GPTQ's. Last, the grid is
rounded to the type that it is stored in, zeros and codes are fitted to what became of it.

``level=1`` and ``level=2`` are the paper's procedures: from GPTQ, N - 1 times codes for the grid, then the grid for
the codes, each kept per row if better. At level 2 the codes come from rounding with feedback (equation 11); at level 1
from M steps of projected gradient on all columns, then column by column rounding with K steps on the later ones
(equation 10, algorithm 2).

Where nothing is known of the inputs, or each row is an output (look-ups of embeddings), weights are rounded to nearest,
on the grid that is best for ``H = 1``.

Differs from the official code: relative thresholds and step sizes throughout, so that the unit of weights and inputs
does not matter; rows of zeros and constant groups are solved; gradient steps are preconditioned by the diagonal
instead of Adam with an absolute rate; the first grid is searched per group by the diagonal of ``H``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from bitfront.quant.layers.inputs import Moments
from bitfront.quant.layers.solver import Grid, Layer, Solution
from bitfront.quant.methods.gptq import GPTQ, Found
from bitfront.quant.storage.packed import Packed
from bitfront.quant.storage.rounding import fitted_range, on_stored_grid
from bitfront.ranges import Ranges

CENTRE = 0.015  # strength of the pull to the centre of the box, and damping of the feedback, for one level
RELAXED = 8  # steps of ``relax``
POLISH = 2  # of coordinate descent and least squares at the end


@dataclass(kw_only=True)
class DecoupleQ(GPTQ):
    """decoupleQ.

    Attributes:
        level: 0, our procedure; 1 or 2, the paper's first- or second-level approximation.
        N: rounds, the start by GPTQ being the first.
        M: at level 1, gradient steps before rounding.
        K: at level 1, gradient steps after each column.
        grid, round_zero: of the start by GPTQ, as there.
    """

    bits: int = 2
    level: int = 0
    N: int = 2
    M: int = 50
    K: int = 1
    J: int = 4
    per_layer: ClassVar[tuple[str, ...]] = (*GPTQ.per_layer, "level", "N", "M", "K")
    ranges: ClassVar[Ranges] = {"level": (0, 1, 2), "N": "1..", "M": "0..", "K": "0.."}

    def solve(self, w: Tensor, inputs: Moments | None) -> tuple[Packed, dict[str, Any]]:
        if inputs is not None:
            return super().solve(w, inputs)
        lo, span = fitted_range(w, self.group_size, self.bits, self.symmetric)
        return on_stored_grid(w, self.bits, lo, span, self.group_size, self.scales), {}

    def quick(self, layer: Layer) -> Found:
        """In the range that our rounds start from: these make its error smaller by a third at 1 and 2 bits, and by
        less at more."""
        grid = layer.as_stored(layer.shrunk())
        return [("gptq", layer.solution(layer.feed_back(layer.w, grid, 0.0), grid))]

    def steps(self, layer: Layer) -> Found:
        steps = super().steps(layer)
        gptq = steps[-1][1]
        steps += [(f"round {n + 1}", best) for n, best in enumerate(self._rounds(layer, gptq))]
        best = steps[-1][1]
        for n in range(POLISH if self.level == 0 else 0):
            codes = layer.descend(best.codes, best)
            best = layer.solution(codes, layer.fit(codes, best)).or_better(best)
            steps.append((f"descent {n + 1}", best))
        return [*steps, ("stored", layer.stored(best).or_better(gptq))]

    def _rounds(self, layer: Layer, best: Solution) -> Iterator[Solution]:
        """The best solution of each row after each round."""
        if self.level:
            yield from self._paper(layer, best)
            return
        ridge = CENTRE / layer.levels**2
        grid = layer.shrunk()
        for _ in range(self.N - 1):
            codes = layer.feed_back(layer.relax(grid, ridge, RELAXED), grid, ridge)
            codes = layer.descend(codes, grid)
            grid = layer.fit(codes, grid)
            best = layer.solution(codes, grid).or_better(best)
            yield best

    def _paper(self, layer: Layer, best: Solution) -> Iterator[Solution]:
        """Algorithm 1, after its start by GPTQ."""
        grid: Grid = best
        for n in range(self.N - 1):
            if n == 0:
                grid = layer.shrunk()
                grid = layer.fit(layer.nearest(grid), grid)
            if self.level == 2:
                codes = layer.feed_back(layer.w, grid, self.damping)
            else:
                codes = layer.project(grid, self.M, self.K)
            best = layer.solution(codes, grid).or_better(best)
            best = layer.solution(best.codes, layer.fit(best.codes, best)).or_better(best)
            grid = best
            yield best
