"""The layer problem of post-training quantization, and the moves that solve it.

A layer's inputs enter through their second moments ``H = E[x xᵀ]`` alone (decoupleQ, arXiv 2404.12759, equation 6):

    minimise  tr((Ŵ - W) H (Ŵ - W)ᵀ),     Ŵ[r, j] = scale[r, g(j)] * code[r, j] + zero[r, g(j)],

codes 0..levels, float scale (of either sign) and zero per row or per group ``g`` of consecutive columns. Rows are
independent. The moves, each a handful of ``W H`` products:

    ``feed_back``  rounds column by column and lets the later columns make up for the error (GPTQ, 2210.17323)
    ``relax``      solves the problem without integers, inside the box that the codes span
    ``descend``    moves one code at a time to its best value: the loss cannot rise
    ``fit``        the best scale and zero for given codes, in closed form: the loss cannot rise

Tensors are kept with columns first, ``[batch, columns, rows]``, so that a column is contiguous; ``batch`` are the
groups of a grouped convolution, each with its own ``H``. Everything is float32 but the factorizations, sums and
small systems, which are float64 with relative thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from bitfront.errors import BitfrontError
from bitfront.quant.storage.packed import middle_code
from bitfront.quant.storage.rounding import reciprocal, spanning
from bitfront.quant.storage.scales import PLAIN, Scales

BLOCK = 64  # columns that are worked on one by one before the rest is updated in one product
WEIGHTS = 1 << 25  # worked on at once: more rows are solved in turn, which bounds the memory
MOST = 2.0  # times a row is made larger or smaller: of one that has lost half its power, the rest is noise
LEAST = 0.25  # of a group's range: what ``shrunk`` may leave of it
PULL, OVERSHOOT = 0.03, 1.6  # of the alternating directions in ``relax``
NOTHING, IDLE = 1e-12, 1e-6  # relative to the mean: inputs up to the one are always zero; the weight that these get


class Curvature:
    """``H`` of a layer's inputs, normalised and damped, with its factorizations, each computed once.

    Args:
        H: ``[batch, columns, columns]``, any float type, positive semidefinite.
        damping: added to the diagonal of each entry of the batch, relative to its mean. The damped ``H`` is what all
            losses are measured in.
        act_order: work on the columns by falling ``H[j, j]`` (GPTQ's "act-order") instead of from left to right.
        padding: inputs to append that are always zero.

    Attributes:
        mean: of the diagonal of the ``H`` given, ``[batch]``; losses times this are in the layer's own unit.
        dead: which inputs are always zero, ``[batch, columns]``; their weights do not matter.
        raised: what had to be added to a ridge until a factorization succeeded.

    Raises:
        BitfrontError: ``H`` is not finite.
    """

    def __init__(self, H: Tensor, damping: float = 0.0, act_order: bool = True, padding: int = 0) -> None:
        if not torch.isfinite(H).all():
            raise BitfrontError("the inputs of the layer are not finite")
        H64 = H.double()
        diagonal = H64.diagonal(dim1=1, dim2=2)
        self.mean = diagonal.mean(1)
        H64 = torch.nn.functional.pad(H64 / torch.where(self.mean > 0, self.mean, 1.0)[:, None, None], (0, padding) * 2)
        diagonal = H64.diagonal(dim1=1, dim2=2)
        self.dead = diagonal <= NOTHING
        diagonal.copy_(torch.where(self.dead, IDLE, diagonal + damping))
        self.H = H64.float()
        self.diagonal = self.H.diagonal(dim1=1, dim2=2)
        self.raised = 0.0
        columns = torch.arange(H64.shape[1], device=H.device).expand(len(H), -1)
        self.order = self.diagonal.argsort(dim=1, descending=True, stable=True) if act_order else columns
        self.back = self.order.argsort(dim=1)
        rows = self.H.gather(1, self.order[:, :, None].expand_as(self.H))
        self.ordered = rows.gather(2, self.order[:, None, :].expand_as(self.H))
        self._feedback: dict[float, Tensor] = {}
        self._inverse: dict[float, tuple[Tensor, Tensor]] = {}

    def feedback(self, ridge: float) -> Tensor:
        """How an error in one column is made up for by the later ones, in working order: unit upper triangular.

        The rows of the upper Cholesky factor of ``(H + ridge)⁻¹``, each divided by its diagonal. One factorization:
        with the order reversed, ``H + ridge = R Rᵀ`` for an upper triangular ``R``, and the factor sought is ``R⁻¹``. A
        ridge too small for the factorization is raised tenfold until it succeeds, and that is kept in ``raised``.
        """
        if ridge not in self._feedback:
            lower, tried = self._lower(ridge)
            self.raised = max(self.raised, tried - ridge)
            eye = torch.eye(lower.shape[1], dtype=lower.dtype, device=lower.device).expand_as(lower)
            factor = torch.linalg.solve_triangular(lower, eye, upper=False)
            del lower, eye  # of wide layers, the largest there is
            factor /= factor.diagonal(dim1=1, dim2=2)[:, :, None].clone()
            self._feedback[ridge] = factor.flip(1, 2).float()
        return self._feedback[ridge]

    def _lower(self, ridge: float) -> tuple[Tensor, float]:
        """The Cholesky factor of ``H + ridge`` in reversed order, float64, and the ridge with which there is one."""
        while True:
            H = self.ordered.flip(1, 2).double()
            H.diagonal(dim1=1, dim2=2).add_(ridge)
            lower, failed = torch.linalg.cholesky_ex(H)
            if not failed.any():
                return lower, ridge
            ridge = max(10 * ridge, 1e-6)

    @cached_property
    def largest(self) -> Tensor:
        """Largest eigenvalue of ``H`` scaled to a unit diagonal, ``[batch]``."""
        unit = self.ordered.diagonal(dim1=1, dim2=2).rsqrt()
        return torch.linalg.eigvalsh(self.ordered * unit[:, :, None] * unit[:, None, :])[:, -1]

    def inverse(self, ridge: float) -> tuple[Tensor, Tensor]:
        """``(H + ridge + P)⁻¹`` and the diagonal ``P`` that makes it well-conditioned, for ``relax``."""
        if ridge not in self._inverse:
            P = PULL * (self.diagonal + ridge)
            lower = torch.linalg.cholesky(self.H + torch.diag_embed(P + ridge))
            self._inverse[ridge] = torch.cholesky_inverse(lower), P
        return self._inverse[ridge]


@dataclass
class Grid:
    """Where the values are.

    Attributes:
        scale: distance of neighbouring values, ``[batch, groups, rows]``.
        zero: value of code 0, same shape.
    """

    scale: Tensor
    zero: Tensor

    def ranges(self, levels: int) -> tuple[Tensor, Tensor]:
        """``lo`` and ``span`` as ``Packed`` has them, ``[batch · rows, groups]``."""
        lo, scale = (x.transpose(1, 2).reshape(-1, x.shape[1]) for x in (self.zero, self.scale))
        return lo, scale * levels


@dataclass
class Solution(Grid):
    """A grid and the codes on it.

    Attributes:
        codes: whole numbers as float32, ``[batch, columns, rows]``.
        loss: of each row, float64 ``[batch, rows]``.
    """

    codes: Tensor
    loss: Tensor

    def or_better(self, other: Solution) -> Solution:
        """This, but for the rows in which the other one is better, or this is out of what can be stored."""
        better = (other.loss < self.loss) | self.loss.isnan()
        scale, zero, codes = (
            torch.where(better[:, None], getattr(other, name), getattr(self, name))
            for name in ("scale", "zero", "codes")
        )
        return Solution(scale, zero, codes, torch.where(better, other.loss, self.loss))

    def repeated(self, every: int, rows: int) -> Solution:
        """Of so many rows, each of these that many times."""
        if every == 1:
            return self
        at = torch.arange(rows, device=self.codes.device) // every
        return Solution(*(getattr(self, field.name)[..., at] for field in fields(self)))


class Layer:
    """The problem of some rows of a layer.

    Args:
        w: ``[batch, rows, columns]``.
        curvature: of their inputs.
        bits: 1..8.
        group_size: columns that share a scale and a zero; divides the columns.
        symmetric: tie the zero to the scale, so that the middle code means 0.
        scales: how the grid is stored.
    """

    def __init__(
        self,
        w: Tensor,
        curvature: Curvature,
        bits: int,
        group_size: int,
        symmetric: bool = False,
        scales: Scales = PLAIN,
    ) -> None:
        self.scales = scales
        self.w = w.float().transpose(1, 2).contiguous()
        self.curvature, self.H, self.symmetric = curvature, curvature.H, symmetric
        self.bits, self.levels = bits, 2**bits - 1
        self.middle = middle_code(bits)
        self.batch, self.columns, self.rows = self.w.shape
        self.group_size, self.groups = group_size, self.columns // group_size
        self.group = curvature.order // group_size  # of each column, in working order
        if curvature.dead.any():
            self._bound_dead()

    def values(self, codes: Tensor, grid: Grid) -> Tensor:
        """What the codes mean, ``[batch, columns, rows]``."""
        return self._grouped(codes).mul(grid.scale[:, :, None]).add_(grid.zero[:, :, None]).view_as(codes)

    def solution(self, codes: Tensor, grid: Grid) -> Solution:
        """Codes and grid with the loss of each row."""
        error = self.values(codes, grid).sub_(self.w)
        return Solution(grid.scale, grid.zero, codes, (self.H @ error).mul_(error).sum(1, dtype=torch.float64))

    @property
    def power(self) -> Tensor:
        """Of the outputs, as a loss: ``[batch, rows]``."""
        return (self.w * (self.H @ self.w)).sum(1, dtype=torch.float64)

    def min_max(self, round_zero: bool = False) -> Grid:
        """From the smallest to the largest weight of each group, as ``rounding.spanning`` has it."""
        lo, hi = torch.aminmax(self._grouped(self.w), dim=2)
        zero, span = spanning(lo, hi, self.bits, self.symmetric, round_zero)
        return Grid(span / self.levels, zero)

    def as_stored(self, grid: Grid) -> Grid:
        """The grid that is left of one when its zero and span are stored."""
        stored = self.scales.stored(*grid.ranges(self.levels))
        zero, span = (x.float().view(self.batch, -1, self.groups).transpose(1, 2) for x in stored)
        return Grid(span / self.levels, zero)

    def stored(self, solution: Solution) -> Solution:
        """A solution on a grid that survives storing: the zeros, then the codes are fitted to the rounded scales."""
        grid, codes = self.as_stored(solution), solution.codes
        if not self.scales.exact:
            grid = self.as_stored(self.fit(codes, grid, fixed=grid.scale))
            codes = self.descend(codes, grid)
        return self.solution(codes, grid)

    def unbiased(self, solution: Solution) -> Solution:
        """A solution whose rows are scaled such that an output has, on the mean, the size of what it stands for:
        ``ŵᵀ H w = wᵀ H w``. The least error is on the side of less, by its share of the output's power, in every row
        alike, which adds up from layer to layer where errors at random do not."""
        felt = self.H @ self.w
        wanted, got = ((felt * x).sum(1, dtype=torch.float64) for x in (self.w, self.values(solution.codes, solution)))
        gain = torch.where((wanted > 0) & (got > 0), wanted / got, 1.0).clamp(1 / MOST, MOST)[:, None].float()
        grid = self.as_stored(Grid(solution.scale * gain, solution.zero * gain))
        return self.solution(solution.codes, grid)

    def shrunk(self, round_zero: bool = False, steps: int = 16, least: float = LEAST) -> Grid:
        """The part of each group's range in which rounding to nearest costs least, by the diagonal of ``H`` alone."""
        full, w = self.min_max(round_zero), self._grouped(self.w)
        weight = self._grouped(self.curvature.diagonal[:, :, None])
        best, lowest = full, torch.full_like(full.scale, torch.inf)
        centre = torch.zeros_like(full.zero) if self.symmetric or round_zero else w.mean(2)
        for share in torch.linspace(1.0, least, steps).tolist():
            grid = Grid(full.scale * share, centre + (full.zero - centre) * share)
            codes = (w - grid.zero[:, :, None]).mul_(reciprocal(grid.scale)[:, :, None]).round_().clamp_(0, self.levels)
            error = codes.mul_(grid.scale[:, :, None]).add_(grid.zero[:, :, None]).sub_(w)
            cost = error.square_().mul_(weight).sum(2)
            better = cost < lowest
            lowest = torch.where(better, cost, lowest)
            best = Grid(torch.where(better, grid.scale, best.scale), torch.where(better, grid.zero, best.zero))
        return best

    def nearest(self, grid: Grid) -> Tensor:
        """Every weight to the nearest value."""
        w = self._grouped(self.w)
        codes = w.sub(grid.zero[:, :, None]).mul_(reciprocal(grid.scale)[:, :, None])
        return codes.round_().clamp_(0, self.levels).view_as(self.w)

    def relax(self, grid: Grid, ridge: float, steps: int) -> Tensor:
        """The best real values inside the box that the grid spans, drawn a little to its centre.

        Minimises ``(x - w)ᵀ H (x - w) + ridge |x - centre|²`` over the box by alternating directions (ADMM): a product
        with a cached inverse, then a projection. The pull to the centre leaves room to both sides for the errors that
        ``feed_back`` will hand on; without it many columns sit at the edge and can only give way to one side.

        Returns:
            Targets for ``feed_back``, ``[batch, columns, rows]``.
        """
        inverse, pull = self.curvature.inverse(ridge)
        edges = grid.zero, grid.zero + grid.scale * self.levels
        lo, hi = (self._each(edge) for edge in (torch.minimum(*edges), torch.maximum(*edges)))
        fixed = inverse @ (self.H @ self.w).add_(lo + hi, alpha=ridge / 2)
        step = inverse * pull[:, None, :]
        inside = self.w.clamp(lo, hi)
        debt, x, room = torch.zeros_like(inside), torch.empty_like(inside), torch.empty_like(inside)
        for _ in range(steps):
            torch.baddbmm(fixed, step, torch.sub(inside, debt, out=room), out=x)
            debt.add_(torch.lerp(inside, x, OVERSHOOT, out=x))
            torch.clamp(debt, lo, hi, out=inside)
            debt.sub_(inside)
        return inside

    def feed_back(self, target: Tensor, grid: Grid, ridge: float) -> Tensor:
        """Round column after column to the nearest value; hand each error on to the later columns (GPTQ).

        Args:
            target: what to round, ``[batch, columns, rows]``: the weights, or what ``relax`` gives.
            grid: of the values. Groups belong to the columns as stored, also when the order differs.
            ridge: damping of the feedback, on top of the curvature's.

        Returns:
            Codes, same shape.
        """
        feedback = self.curvature.feedback(ridge)
        scale, zero, inverse, offset = self._ordered_grid(grid)
        target, codes = self._ordered(target), torch.empty_like(target)
        columns, scales, zeros = codes.unbind(1), scale.unbind(1), zero.unbind(1)
        inverses, offsets = inverse.unbind(1), offset.unbind(1)
        for start, stop in self._blocks():
            rest, factor = target[:, start:stop], feedback[:, start:stop, start:stop]
            errors = torch.empty_like(rest)
            for i, (here, error) in enumerate(zip(rest.unbind(1), errors.unbind(1), strict=True)):
                j = start + i
                torch.addcmul(offsets[j], here, inverses[j], out=columns[j]).round_().clamp_(0, self.levels)
                torch.addcmul(zeros[j], columns[j], scales[j], out=error).sub_(here)
                if j + 1 < stop:
                    rest[:, i + 1 :].baddbmm_(factor[:, i, i + 1 :, None], error[:, None])
            if stop < self.columns:
                target[:, stop:].baddbmm_(feedback[:, start:stop, stop:].transpose(1, 2), errors)
        return self._unordered(codes)

    def project(self, grid: Grid, M: int, K: int) -> Tensor:
        """The paper's algorithm 2: projected gradient, then rounding column by column with more of it in between.

        Args:
            grid: of the values.
            M: steps on all columns before rounding.
            K: steps on the columns still to come after each.

        Returns:
            Codes.
        """
        scale, zero, inverse, offset = self._ordered_grid(grid)
        edges = zero, zero + scale * self.levels
        lo, hi = torch.minimum(*edges), torch.maximum(*edges)
        w, H = self._ordered(self.w), self.curvature.ordered
        diagonal = H.diagonal(dim1=1, dim2=2)
        rate = 1 / (self.curvature.largest[:, None, None] * diagonal[:, :, None])
        x, codes = w.clamp(lo, hi), torch.empty_like(w)

        def step(start: int) -> None:
            later = x[:, start:]
            later.sub_(rate[:, start:] * (H[:, start:] @ (x - w)))
            torch.clamp(later, lo[:, start:], hi[:, start:], out=later)

        for _ in range(M):
            step(0)
        for j in range(self.columns):
            codes[:, j] = torch.addcmul(offset[:, j], x[:, j], inverse[:, j]).round_().clamp_(0, self.levels)
            x[:, j] = torch.addcmul(zero[:, j], codes[:, j], scale[:, j])
            for _ in range(K if j + 1 < self.columns else 0):
                step(j + 1)
        return self._unordered(codes)

    def descend(self, codes: Tensor, grid: Grid, sweeps: int = 1) -> Tensor:
        """Exact coordinate descent over the integers: each code in turn to its best value, given all others."""
        ordered = self._ordered(codes)
        scale, _, inverse, _ = self._ordered_grid(grid)
        towards = inverse.mul_(-1 / self._ordered(self.curvature.diagonal[:, :, None]))
        H, columns = self.curvature.ordered, ordered.unbind(1)
        scales, steps = scale.unbind(1), towards.unbind(1)
        for _ in range(sweeps):
            error = self.values(self._unordered(ordered), grid).sub_(self.w)
            gradient = self._ordered(self.H @ error)
            for start, stop in self._blocks():
                rest, block = gradient[:, start:stop], H[:, start:stop, start:stop]
                moves = torch.empty_like(rest)
                for i, (slope, move) in enumerate(zip(rest.unbind(1), moves.unbind(1), strict=True)):
                    j = start + i
                    code = torch.addcmul(columns[j], slope, steps[j]).round_().clamp_(0, self.levels)
                    torch.sub(code, columns[j], out=move).mul_(scales[j])
                    columns[j].copy_(code)
                    if j + 1 < stop:
                        rest[:, i + 1 :].baddbmm_(block[:, i, i + 1 :, None], move[:, None])
                if stop < self.columns:
                    gradient[:, stop:].baddbmm_(H[:, stop:, start:stop], moves)
        return self._unordered(ordered)

    def fit(self, codes: Tensor, grid: Grid, fixed: Tensor | None = None) -> Grid:
        """The best scale and zero for given codes (equation 8 of the paper), as a step from the present ones.

        Normal equations per row, with the zeros, whose block is the same for all rows, eliminated (Schur complement).
        Solving for the step makes the right-hand side small, so that rounding errors stay relative to what is left to
        gain. Directions that do not matter (constant codes) keep their present value.

        Args:
            codes: ``[batch, columns, rows]``.
            grid: present scale and zero.
            fixed: hold the scales at this, ``[batch, groups, rows]``, and solve for the zeros alone.
        """
        if fixed is not None:
            shift = (fixed - grid.scale) * self.middle
            grid = Grid(fixed, -self.middle * fixed if self.symmetric else grid.zero - shift)
            if self.symmetric:
                return grid
        a = self._grouped(codes - self.middle)
        slope = self._grouped(self.H @ self.values(codes, grid).sub_(self.w))
        y1, y2 = (x.sum(2, dtype=torch.float64).transpose(1, 2) for x in (slope * a, slope))  # [batch, rows, groups]
        inverse = self._zeros
        if fixed is not None:
            return Grid(grid.scale, grid.zero - _columns_first(inverse @ y2[..., None]))
        P11, P12 = self._products(a)
        if self.symmetric:
            step = _solve(P11, y1, P11)
            scale = grid.scale - _columns_first(step)
            return Grid(scale, -self.middle * scale)
        eliminated = P12 @ inverse
        step = _solve(P11 - eliminated @ P12.transpose(2, 3), y1 - (eliminated @ y2[..., None])[..., 0], P11)
        zero = inverse @ (y2[..., None] - P12.transpose(2, 3) @ step)
        scale = grid.scale - _columns_first(step)
        return Grid(scale, grid.zero - _columns_first(zero) - self.middle * (scale - grid.scale))

    @cached_property
    def _zeros(self) -> Tensor:
        """The inverse of the zeros' block of the normal equations, ``[batch, 1, groups, groups]``."""
        blocks = self.H.view(self.batch, self.groups, self.group_size, self.groups, self.group_size)
        P22 = blocks.sum((2, 4), dtype=torch.float64)[:, None]
        # Relative to the power of the inputs: where they sum to 0, the zero has no effect, and stays.
        power = self._grouped(self.curvature.diagonal[:, :, None]).sum((1, 2, 3), dtype=torch.float64)
        return torch.linalg.pinv(P22, atol=1e-7 * power[:, None], rtol=torch.zeros_like(power[:, None]), hermitian=True)

    def _products(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """The block of the scales, and that between scales and zeros, ``[batch, rows, groups, groups]`` each.

        Args:
            a: codes around their middle, in groups.
        """
        P11 = torch.empty(self.batch, self.rows, self.groups, self.groups, device=a.device, dtype=torch.float64)
        P12 = torch.empty_like(P11)
        for i in range(self.groups):
            Ha = self._grouped(self.H[:, :, i * self.group_size : (i + 1) * self.group_size] @ a[:, i])
            P11[:, :, i] = (Ha * a).sum(2, dtype=torch.float64).transpose(1, 2)
            P12[:, :, i] = Ha.sum(2, dtype=torch.float64).transpose(1, 2)
        return P11, P12

    def _bound_dead(self) -> None:
        """Keep the weights of dead inputs, which do not matter, from widening the range of those that do."""
        dead, w = self._grouped(self.curvature.dead[:, :, None]), self._grouped(self.w)
        lo = torch.where(dead, torch.inf, w).amin(2, keepdim=True)
        hi = torch.where(dead, -torch.inf, w).amax(2, keepdim=True)
        self.w = torch.where(dead & (lo <= hi), w.clamp(lo, hi), w).view_as(self.w)

    def _blocks(self) -> list[tuple[int, int]]:
        return [(start, min(start + BLOCK, self.columns)) for start in range(0, self.columns, BLOCK)]

    def _grouped(self, x: Tensor) -> Tensor:
        return x.view(self.batch, self.groups, self.group_size, -1)

    def _each(self, x: Tensor) -> Tensor:
        """Per group to per column."""
        return x.repeat_interleave(self.group_size, 1) if self.groups > 1 else x.expand_as(self.w)

    def _ordered(self, x: Tensor) -> Tensor:
        return x.gather(1, self.curvature.order[:, :, None].expand_as(x))

    def _unordered(self, x: Tensor) -> Tensor:
        return x.gather(1, self.curvature.back[:, :, None].expand_as(x))

    def _ordered_grid(self, grid: Grid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scale, zero, 1 / scale and -zero / scale of each column, in working order."""
        inverse = reciprocal(grid.scale)
        index = self.group[:, :, None].expand(-1, -1, self.rows)
        scale, zero, inverse, offset = (
            x.gather(1, index) for x in (grid.scale, grid.zero, inverse, -grid.zero * inverse)
        )
        return scale, zero, inverse, offset


def in_parts(w: Tensor, groups: int) -> tuple[Tensor, ...]:
    """``[batch, rows, columns]``, of so many groups a row, as so many rows as may be worked on at once."""
    return w.split(max(1, WEIGHTS // (w.shape[0] * max(w.shape[2], groups**2))), dim=1)


def joined(parts: Sequence[Solution]) -> Solution:
    """One solution of those of parts."""
    return Solution(*(torch.cat([getattr(part, field.name) for part in parts], -1) for field in fields(Solution)))


def _columns_first(x: Tensor) -> Tensor:
    """``[batch, rows, groups, 1]`` to ``[batch, groups, rows]``, float32."""
    return x[..., 0].transpose(1, 2).float()


def _solve(matrix: Tensor, y: Tensor, reference: Tensor) -> Tensor:
    """Solve positive semidefinite systems; a variable that does not matter, relative to ``reference``, stays 0."""
    size, needed = matrix.diagonal(dim1=2, dim2=3), reference.diagonal(dim1=2, dim2=3)
    idle = size <= 1e-9 * needed.clamp_min(1e-300)
    # Scaled to a unit diagonal, with a relative ridge, so that nearly equal directions share their step.
    unit = torch.where(idle, 0.0, size.clamp_min(1e-300).rsqrt())
    matrix = matrix * unit[..., :, None] * unit[..., None, :] + torch.diag_embed(idle + 1e-9)
    lower, failed = torch.linalg.cholesky_ex(matrix)
    step = torch.cholesky_solve((y * unit)[..., None], torch.where(failed[..., None, None] > 0, 1.0, lower))
    return torch.where(failed[..., None, None] > 0, 0.0, step) * unit[..., None]
