"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): round column after column, and let the columns still to come make up
for each error.

    W[:, k] += (q_j - w_j) U[j, k] / U[j, j]  for k > j,      Uᵀ U = (H + damping · mean diag H)⁻¹

Differs from the official code: one factorization; columns are worked on in blocks; a damping that is too small is
raised until the factorization succeeds, and recorded; groups always belong to the columns as stored ("static
groups"), also under act-order, and their grid is that of the original weights; the weights of inputs that are always
zero are rounded to nearest. The official grid, whose zero point is a whole number, is ``round_zero``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitfront.quant.core import check
from bitfront.quant.layers.inputs import Moments
from bitfront.quant.layers.solver import LEAST, Layer, Solution, in_parts, joined
from bitfront.quant.layers.uses import Form
from bitfront.quant.methods.rtn import RTN
from bitfront.quant.storage.packed import Packed, code_dtype
from bitfront.quant.storage.rounding import by_rows, min_max
from bitfront.quant.storage.scales import Scales
from bitfront.ranges import Ranges

Found = list[tuple[str, Solution]]  # after each step, by name; the last one counts
Steps = Callable[[Layer], Found]


@dataclass(kw_only=True)
class GPTQ(RTN):
    """GPTQ.

    Attributes:
        bits: 1..8.
        group_size: consecutive weights of a row that share scale and zero; -1 for the row. What is left over at the end
            of a row is a shorter group.
        symmetric, scale_dtype, scale_bits, round_zero: as in ``RTN``.
        grid: as there; errors are weighed by the diagonal of ``H``.
        damping: added to the diagonal of ``H`` relative to its mean, also where ``propagation`` needs its inverse.
        act_order: work on the columns by falling ``H[j, j]``.
        hessian: whether all of what a layer sees counts alike ("inputs"), or as much as the output of its block
            ("block") or of the network ("fisher") feels it (``felt``).
        unbiased: rows are scaled in the end such that their outputs are not made smaller (``Layer.unbiased``).
    """

    damping: float = 0.01
    act_order: bool = True
    hessian: str = "inputs"
    unbiased: bool = False
    sees_inputs: ClassVar[bool] = True
    per_layer: ClassVar[tuple[str, ...]] = (*RTN.per_layer, "damping", "act_order", "unbiased")
    ranges: ClassVar[Ranges] = {"bits": "1..8", "damping": "[0, inf)", "hessian": ("inputs", "block", "fisher")}

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.group_size != 0, "group_size is n or -1 (a row) for this method, which solves row by row")

    @property
    def feels(self) -> str:
        return {"inputs": "", "block": "block", "fisher": "end"}[self.hessian]

    def wanted(self, w: Tensor, inputs: Moments | None) -> Tensor:
        return inputs.wanted(w, self.propagation, self.damping) if inputs else w

    def solve(self, w: Tensor, inputs: Moments | None) -> tuple[Packed, dict[str, Any]]:
        return super().solve(w, inputs) if inputs is None else self.solve_by(self.steps, w, inputs)

    def tried(self, w: Tensor, inputs: Moments | None, every: int = 1) -> Packed:
        return self.solve(w, inputs)[0] if inputs is None else self.solve_by(self.quick, w, inputs, every)[0]

    def solve_by(self, steps: Steps, w: Tensor, inputs: Moments, every: int = 1) -> tuple[Packed, dict[str, Any]]:
        """``solve`` by other steps; of every so many rows the first, whose codes the others have, too."""
        size = min(self.group_size, inputs.columns) if self.group_size > 0 else inputs.columns
        padding = -inputs.columns % size
        curvature = inputs.curvature(self.damping, self.act_order, padding)
        rows, wanted = (
            # as if the inputs of what is appended were always zero
            torch.cat([x, x[..., -1:].expand(-1, -1, padding)], 2)
            for x in map(inputs.rows, (w.float(), self.wanted(w, inputs)))
        )
        flat = (rows == rows[..., :1]).all(2)
        scales = self._fitting(rows, size)

        def in_all(loss: Tensor) -> float:
            return (loss * curvature.mean[:, None]).sum().item()

        solutions: list[Solution] = []
        log, power = dict[str, float](), 0.0
        for part in in_parts(wanted[:, ::every], wanted.shape[2] // size):
            layer = Layer(part, curvature, self.bits, size, self.symmetric, scales)
            found = steps(layer)
            if self.unbiased:
                found = [*found, ("unbiased", layer.unbiased(found[-1][1]))]
            for name, solution in found:
                log[name] = log.get(name, 0.0) + in_all(solution.loss)
            power += in_all(layer.power)
            solutions.append(found[-1][1])
        power = power or 1.0
        about = {
            "steps": {name: loss / power for name, loss in log.items()},
            "damping": self.damping + curvature.raised,
            "dead_inputs": int(curvature.dead.sum()) - padding * inputs.batch,
            "flat_rows": int(flat.sum()),
        }
        solution = joined(solutions).repeated(every, rows.shape[1])
        return packed(solution, w.shape, self.bits, scales, padding, inputs.form), about

    def _fitting(self, rows: Tensor, size: int) -> Scales:
        """How ranges are stored, whatever the inputs are, on which the bytes of a file must not depend."""
        lines = torch.Size((rows.shape[0] * rows.shape[1], rows.shape[2]))
        lo, span = (by_rows(x, lines) for x in min_max(rows, size, self.bits, self.symmetric, self.round_zero))
        scales = self.scales.fitting(lo, span, self.bits)
        if self.grid == "minmax" or scales.table:
            return scales
        # Of what a search may find, floats move the values most at one of its two ends.
        tied = self.symmetric or self.round_zero
        centre = 0.0 if tied else by_rows(rows.unflatten(2, (-1, size)).mean(3).flatten(), lines)
        return scales.fitting(centre + (lo - centre) * LEAST, span * LEAST, self.bits)

    def quick(self, layer: Layer) -> Found:
        """As ``steps``, in less time."""
        return self.steps(layer)

    def steps(self, layer: Layer) -> Found:
        """The solution after each step."""
        grid = layer.as_stored((layer.shrunk if self.grid == "mse" else layer.min_max)(self.round_zero))
        nearest = layer.solution(layer.nearest(grid), grid)
        return [("rtn", nearest), ("gptq", layer.solution(layer.feed_back(layer.w, grid, 0.0), grid))]


def packed(solution: Solution, shape: torch.Size, bits: int, scales: Scales, padding: int, form: Form) -> Packed:
    """A solution as it is stored, without the columns of padding; its rows are the tensor's in a form."""
    levels = 2**bits - 1
    codes = solution.codes.transpose(1, 2).reshape(solution.scale.numel(), -1).to(code_dtype(levels))
    lo, span = (x.flatten() for x in scales.stored(*solution.ranges(levels)))
    width = torch.tensor([bits], dtype=torch.uint8, device=codes.device)
    found = Packed(codes, width, lo, span, shape, 0, scales.table, form.view, form.axes)
    lines = len(solution.loss) * solution.loss.shape[1]
    return replace(found, rows=lines) if padding or lines != found.lines else found
