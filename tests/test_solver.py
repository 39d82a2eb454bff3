"""The layer solver against closed forms, brute force and independent references in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bitfront.errors import BitfrontError
from bitfront.quant.engine.calibration import PostTraining
from bitfront.quant.engine.sensitivity import error
from bitfront.quant.layers import solver
from bitfront.quant.layers.inputs import Moments
from bitfront.quant.layers.solver import Curvature, Grid, Layer, Solution
from bitfront.quant.layers.uses import NATURAL, Form
from bitfront.quant.methods.decoupleq import DecoupleQ
from bitfront.quant.methods.gptq import GPTQ
from bitfront.quant.methods.rtn import RTN
from bitfront.quant.storage.packed import Packed
from bitfront.quant.storage.rounding import round_to_nearest
from bitfront.quant.storage.scales import Scales


def moments(columns: int, seed: int, samples: int | None = None, batch: int = 1) -> Tensor:
    """``H`` of correlated inputs of uneven power."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(batch, columns, columns, generator=g, dtype=torch.float64)
    gain = torch.exp(0.7 * torch.randn(columns, generator=g, dtype=torch.float64))
    x = torch.randn(batch, samples or 4 * columns, columns, generator=g, dtype=torch.float64) @ mix * gain
    return x.transpose(1, 2) @ x / x.shape[1]


def layer(
    rows: int = 12, columns: int = 48, bits: int = 2, size: int | None = None, seed: int = 0, **options: Any
) -> Layer:
    torch.manual_seed(seed)
    curvature = Curvature(moments(columns, seed), 0.01)
    return Layer(torch.randn(1, rows, columns), curvature, bits, size or columns, **options)


def exact(w: Tensor, q: Tensor, H: Tensor) -> Tensor:
    """The loss of each row, float64."""
    error = (q - w).double()
    return ((error @ H.double()) * error).sum(-1)


def start(problem: Layer) -> Solution:
    grid = problem.shrunk()
    return problem.solution(problem.feed_back(problem.w, grid, 0.01), grid)


def textbook_gptq(w: Tensor, H: Tensor, order: Tensor, lo: Tensor, step: Tensor, levels: int) -> Tensor:
    """Optimal brain surgeon column by column, the inverse of H updated by hand. w ``[rows, columns]``; float64."""
    w, inverse = w.double().clone(), torch.linalg.inv(H.double())
    codes = torch.zeros_like(w)
    for j in order.tolist():
        codes[:, j] = ((w[:, j] - lo) / step).round().clamp(0, levels)
        error = (w[:, j] - (lo + step * codes[:, j])) / inverse[j, j]
        w -= error[:, None] * inverse[j]
        inverse = inverse - inverse[:, j : j + 1] * inverse[j] / inverse[j, j]
        inverse[j, j] = 1.0  # done with
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("columns", [5, 64, 150])
def test_feedback_is_optimal_brain_surgeon(columns: int, act_order: bool) -> None:
    H = moments(columns, 1)
    curvature = Curvature(H, 0.01, act_order)
    problem = Layer(torch.randn(1, 20, columns), curvature, 3, columns)
    grid = problem.min_max()
    codes = problem.feed_back(problem.w, grid, 0.0)[0].T
    w, lo, step = problem.w[0].T, grid.zero[0, 0].double(), grid.scale[0, 0].double()
    wanted = textbook_gptq(w, curvature.H[0], curvature.order[0], lo, step, 7)
    same = (codes == wanted).all(1)  # float32 may round a near tie to the other side, and the row then goes its own way
    assert same.float().mean() >= 0.8
    values = [lo[:, None] + step[:, None] * c.double() for c in (codes, wanted)]
    ours, theirs = (exact(w, v, curvature.H[0]).sum() for v in values)
    assert ours == pytest.approx(theirs.item(), rel=0.05)


@pytest.mark.parametrize("move", ["feed_back", "descend"])
def test_blocks_change_nothing(move: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = layer(columns=130, bits=3, size=65)
    grid = problem.shrunk()

    def run() -> Tensor:
        if move == "feed_back":
            return problem.feed_back(problem.w, grid, 0.01)
        return problem.descend(problem.nearest(grid), grid, 2)

    blocked = run()
    monkeypatch.setattr(solver, "BLOCK", 1)
    assert (blocked == run()).float().mean() > 0.995  # but for near ties


def test_gptq_with_uncorrelated_inputs_is_rounding_to_nearest() -> None:
    w = torch.randn(30, 40)
    for bits, size in ((2, -1), (4, 8), (8, -1)):
        method = GPTQ(bits=bits, group_size=size, scale_dtype="float32")
        packed, _ = method.solve(w, Moments(torch.eye(40).double()[None] * 3, 100))
        nearest = round_to_nearest(w, bits, size)
        assert (packed.codes != nearest.codes).float().mean() < 2e-3  # ties
        torch.testing.assert_close(packed.decode(), nearest.decode(), atol=float(nearest.span.max()) / 3, rtol=0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [48, 16, 8])
def test_fit_is_dense_least_squares(size: int, symmetric: bool) -> None:
    problem = layer(bits=3, size=size, symmetric=symmetric)
    found = start(problem)
    grid = problem.fit(found.codes, found)
    root = torch.linalg.cholesky(problem.H[0].double()).T  # |root e|² = eᵀ H e
    member = torch.eye(48 // size, dtype=torch.float64).repeat_interleave(size, 0)  # [columns, groups]
    for row in range(problem.rows):
        codes = found.codes[0, :, row].double()[:, None]
        design = member * (codes - problem.middle) if symmetric else torch.cat([member * codes, member], 1)
        best = torch.linalg.lstsq(root @ design, root @ problem.w[0, :, row].double()[:, None]).solution[:, 0]
        error = design @ best - problem.w[0, :, row].double()
        wanted = error @ problem.H[0].double() @ error
        assert problem.solution(found.codes, grid).loss[0, row].item() == pytest.approx(wanted.item(), rel=1e-4)
        scale = best[: problem.groups]
        torch.testing.assert_close(grid.scale[0, :, row].double(), scale, rtol=1e-3, atol=1e-4)
        if symmetric:
            torch.testing.assert_close(grid.zero, -problem.middle * grid.scale)


@pytest.mark.parametrize("size", [48, 16])
def test_rows_without_bias_have_the_size_of_what_they_stand_for(size: int) -> None:
    problem = layer(size=size)
    codes = start(problem).codes
    fitted = problem.solution(codes, problem.fit(codes, start(problem)))
    found = problem.unbiased(fitted)
    felt = (problem.H @ problem.w).double()
    power = (felt * problem.w).sum(1)
    torch.testing.assert_close((felt * problem.values(codes, found)).sum(1), power, rtol=1e-4, atol=0.0)
    # Least squares is a projection: it has lost its error's share of the power, and pays with that share of the error.
    share = fitted.loss / power
    torch.testing.assert_close(found.loss / power, share / (1 - share), rtol=1e-3, atol=0.0)
    torch.testing.assert_close(problem.unbiased(found).scale, found.scale, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("method", [GPTQ(bits=2, grid="mse", unbiased=True), DecoupleQ(symmetric=True, unbiased=True)])
def test_without_bias_as_it_is_stored(method: GPTQ) -> None:
    torch.manual_seed(3)
    w, H = torch.randn(10, 48), moments(48, 3)
    w[4] = 0.0
    values = [replace(method, unbiased=u).solve(w, Moments(H, 1))[0].decode().double() for u in (True, False)]
    gains = [((q @ H[0]) * w.double()).sum(1) / ((w.double() @ H[0]) * w.double()).sum(1) for q in values]
    rows = torch.arange(10) != 4
    torch.testing.assert_close(gains[0][rows], torch.ones(9, dtype=torch.float64), rtol=5e-3, atol=0.0)
    assert gains[1][rows].mean() < 0.99
    assert not values[0][4].any()


def test_fit_of_the_zeros_alone_is_dense_least_squares() -> None:
    problem = layer(bits=3, size=16)
    found = start(problem)
    scale = found.scale * 1.1
    grid = problem.fit(found.codes, found, fixed=scale)
    assert torch.equal(grid.scale, scale)
    root = torch.linalg.cholesky(problem.H[0].double()).T
    member = torch.eye(3, dtype=torch.float64).repeat_interleave(16, 0)
    for row in range(problem.rows):
        rest = problem.w[0, :, row].double() - (member @ scale[0, :, row].double()) * found.codes[0, :, row].double()
        best = torch.linalg.lstsq(root @ member, root @ rest[:, None]).solution[:, 0]
        torch.testing.assert_close(grid.zero[0, :, row].double(), best, rtol=1e-3, atol=1e-4)


def test_descent_ends_where_no_single_code_can_improve() -> None:
    problem = layer(rows=4, columns=10, bits=2)
    found = start(problem)
    codes = problem.descend(found.codes, found, sweeps=50)
    loss = problem.solution(codes, found).loss
    for column in range(10):
        for value in range(4):
            changed = codes.clone()
            changed[:, column] = value
            assert (problem.solution(changed, found).loss >= loss * (1 - 1e-5)).all()


def test_every_move_that_cannot_raise_the_loss_does_not() -> None:
    for seed in range(20):
        problem = layer(bits=1 + seed % 4, size=(48, 12)[seed % 2], seed=seed, symmetric=seed % 3 == 0)
        now = start(problem)
        for _ in range(4):
            codes = problem.descend(now.codes, now)
            moved = problem.solution(codes, now)
            assert (moved.loss <= now.loss * (1 + 1e-5)).all()
            now = problem.solution(codes, problem.fit(codes, moved))
            assert (now.loss <= moved.loss * (1 + 1e-5)).all()


def test_relaxation_finds_the_minimum_in_the_box() -> None:
    problem, ridge = layer(bits=2), 0.01
    grid = problem.shrunk()
    found = problem.relax(grid, ridge, 200)[0].double()
    lo = grid.zero[0].double().expand(48, -1)
    hi = lo + grid.scale[0].double() * 3
    H, w = problem.H[0].double(), problem.w[0].double()
    x = w.clamp(lo, hi)
    rate = 1 / (torch.linalg.eigvalsh(H)[-1] + ridge)
    for _ in range(20000):  # plain projected gradient
        x = (x - rate * (H @ (x - w) + ridge * (x - (lo + hi) / 2))).clamp(lo, hi)

    def objective(x: Tensor) -> float:
        return (((x - w) * (H @ (x - w))).sum() + ridge * (x - (lo + hi) / 2).square().sum()).item()

    assert objective(found) == pytest.approx(objective(x), rel=1e-3)
    assert (found >= lo - 1e-5).all() and (found <= hi + 1e-5).all()


@pytest.mark.parametrize("level", [0, 1, 2])
def test_no_layer_is_worse_than_with_gptq_and_the_loss_only_falls(level: int) -> None:
    """On 200 random layers of many shapes, widths, groups; for the paper's slow first level on 20."""
    for seed in range(20 if level == 1 else 200):
        g = torch.Generator().manual_seed(seed)
        rows, columns = (int(torch.randint(1, n, (1,), generator=g)) for n in (20, 25))
        columns *= 2
        w = torch.randn(rows, columns, generator=g) * 10.0 ** torch.randint(-4, 3, (1,), generator=g)
        seen = Moments(moments(columns, seed, samples=columns // 2 + 40 * (seed % 3)), 100)
        common: dict[str, Any] = {"bits": 1 + seed % 5, "group_size": -1 if seed % 2 else 2, "symmetric": seed % 7 == 0}
        common["scale_dtype"] = "float32"  # which rounds nothing: else the last step may cost a little
        gptq, _ = GPTQ(**common).solve(w, seen)
        found, log = DecoupleQ(**common, level=level, K=2).solve(w, seen)
        H = seen.curvature(0.01, True).H[0]
        ours, theirs = (exact(w, p.decode(), H) for p in (found, gptq))
        assert (ours <= theirs * (1 + 1e-4) + 1e-12 * theirs.max()).all(), seed
        losses = [loss for name, loss in log["steps"].items() if name != "rtn"]
        assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses)), seed


def test_the_papers_levels() -> None:
    seen = Moments(moments(64, 3), 256)
    w = torch.randn(40, 64)

    def loss(kind: type[GPTQ] = DecoupleQ, **options: Any) -> float:
        return seen.relative_loss(w, kind(bits=2, scale_dtype="float32", **options).solve(w, seen)[0].decode())

    gptq = loss(GPTQ)
    assert loss(level=2, N=1) == pytest.approx(gptq)
    assert loss(level=2, N=4) < 0.9 * gptq
    assert loss(level=1, N=4, M=50, K=4) < loss(level=1, N=4, M=50, K=0)
    assert loss(level=1, N=4, M=50, K=4) < loss(level=2, N=4)  # figure 2 of the paper: level 1 wins for K > 4
    assert loss(N=4) < 1.1 * loss(level=1, N=4, M=50, K=4)  # at a fraction of the cost


def test_units_of_weights_and_inputs_do_not_matter() -> None:
    """The official thresholds are absolute: at mean diag H = 1e-12 its least squares fails."""
    H, w = moments(40, 2), torch.randn(10, 40)
    for method in (GPTQ(bits=2), DecoupleQ(bits=2), DecoupleQ(bits=2, level=1), DecoupleQ(bits=3, group_size=8)):
        usual, _ = method.solve(w, Moments(H, 100))
        for scale in (2.0**-40, 2.0**40):
            small, _ = method.solve(w * 2.0**-10, Moments(H * scale / H.diagonal(dim1=1, dim2=2).mean(), 100))
            torch.testing.assert_close(small.decode() * 2.0**10, usual.decode(), rtol=1e-2, atol=2e-2)


def test_the_order_of_columns_does_not_matter_under_act_order() -> None:
    H, w = moments(40, 2)[0], torch.randn(10, 40)
    mixed = torch.randperm(40)
    seen, seen_mixed = Moments(H[None], 100), Moments(H[mixed][:, mixed][None], 100)
    for method in (GPTQ(bits=3), DecoupleQ(bits=3)):
        straight, permuted = method.solve(w, seen)[0].decode(), method.solve(w[:, mixed], seen_mixed)[0].decode()
        assert seen.relative_loss(w, straight) == pytest.approx(
            seen_mixed.relative_loss(w[:, mixed], permuted), rel=0.05
        )
        assert (straight[:, mixed] - permuted).abs().lt(1e-3).float().mean() > 0.9


def test_groups_of_a_convolution_are_problems_of_their_own() -> None:
    H, w = moments(9, 5, batch=3), torch.randn(6, 9)
    H = H / H.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]  # damping is relative to the mean over all groups
    method = DecoupleQ(bits=2)
    together, _ = method.solve(w.view(6, 1, 3, 3), Moments(H, 100))
    apart = [method.solve(w[2 * i : 2 * i + 2], Moments(H[i : i + 1], 100))[0].decode() for i in range(3)]
    assert together.shape == (6, 1, 3, 3)
    torch.testing.assert_close(together.decode().view(6, 9), torch.cat(apart), rtol=1e-3, atol=1e-3)


def test_rows_in_parts_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    w, seen = torch.randn(30, 40), Moments(moments(40, 2), 100)
    whole, log = DecoupleQ(bits=2).solve(w, seen)
    monkeypatch.setattr(solver, "WEIGHTS", 7 * 40)
    parts, log_parts = DecoupleQ(bits=2).solve(w, seen)
    assert seen.relative_loss(w, parts.decode()) == pytest.approx(seen.relative_loss(w, whole.decode()), rel=0.02)
    assert list(log["steps"]) == list(log_parts["steps"])


METHODS = [GPTQ(bits=2), DecoupleQ(bits=2), DecoupleQ(bits=2, group_size=4), DecoupleQ(bits=2, level=1),
           DecoupleQ(bits=2, level=2, symmetric=True), GPTQ(bits=2, grid="mse", round_zero=True)]  # fmt: skip


def degenerate(name: str) -> tuple[Tensor, Tensor]:
    w, H = torch.randn(8, 24), moments(24, 4)[0]
    if name == "zero rows":
        w[2] = w[5] = 0
    elif name == "all zero":
        w.zero_()
    elif name == "constant rows":
        w[1], w[4] = 0.7, -0.2
    elif name == "constant groups":
        w[:, 4:8] = 0.3
    elif name == "dead inputs":
        H[:, [3, 7]] = H[[3, 7]] = 0
    elif name == "no input at all":
        H.zero_()
    elif name == "few samples":
        H = moments(24, 4, samples=5)[0]
    elif name == "one sample":
        H = moments(24, 4, samples=1)[0]
    elif name == "inputs that sum to zero":  # as after a layer norm: zeros have no effect
        H = H - H.mean(0, keepdim=True)
        H = H - H.mean(1, keepdim=True)
    elif name == "tiny inputs":
        H = H / H.diagonal().mean() * 1e-12
    elif name == "bfloat16":
        w = w.bfloat16()
    elif name == "one row":
        w = w[:1]
    elif name == "large weights":
        w = w * 1e6
    return w, H


@pytest.mark.parametrize(
    "method", METHODS, ids=lambda m: f"{type(m).__name__} {m.group_size} {m.grid} {getattr(m, 'level', '')}"
)
@pytest.mark.parametrize(
    "name",
    ["zero rows", "all zero", "constant rows", "constant groups", "dead inputs", "no input at all", "few samples",
     "one sample", "inputs that sum to zero", "tiny inputs", "bfloat16", "one row", "large weights"],
)  # fmt: skip
@pytest.mark.parametrize("damping", [0.01, 0.0])
def test_degenerate_layers_are_solved(name: str, method: GPTQ, damping: float) -> None:
    w, H = degenerate(name)
    found, log = replace(method, damping=damping).solve(w, Moments(H[None], 5))
    values = found.decode()
    assert torch.isfinite(values).all()
    seen = Moments(H[None], 5)
    worst = seen.relative_loss(w, round_to_nearest(w, 2, method.group_size).decode())
    assert seen.relative_loss(w, values) <= max(2 * worst, 1e-6)
    flat = (w == w[:, :1]).all(1)
    assert log["flat_rows"] == int(flat.sum())
    torch.testing.assert_close(values[flat], w[flat].float(), rtol=1e-3, atol=1e-6)  # of float16
    assert log["dead_inputs"] == {"dead inputs": 2, "no input at all": 24}.get(name, 0)


@pytest.mark.parametrize("method", METHODS[:3], ids=repr)
def test_weights_of_dead_inputs_do_not_disturb_the_others(method: GPTQ) -> None:
    w, H = degenerate("dead inputs")
    usual, _ = method.solve(w, seen := Moments(H[None], 100))
    w[:, [3, 7]] *= 100
    found, _ = method.solve(w, seen)
    assert seen.relative_loss(w, found.decode()) == pytest.approx(seen.relative_loss(w, usual.decode()), rel=0.1)
    assert (found.decode()[:, [3, 7]].abs() <= found.decode().abs().amax(1, True)).all()


def test_one_column() -> None:
    w = torch.randn(8, 1)
    for method in (GPTQ(bits=2), DecoupleQ(bits=2), DecoupleQ(bits=2, level=2)):
        found, _ = method.solve(w, Moments(torch.ones(1, 1, 1).double(), 5))
        torch.testing.assert_close(found.decode(), w, rtol=1e-3, atol=1e-5)  # one weight has its own grid


def test_a_damping_that_is_too_small_is_raised_and_recorded() -> None:
    H = moments(24, 4, samples=5)
    _, log = GPTQ(bits=2, damping=0.0).solve(torch.randn(8, 24), Moments(H, 5))
    assert log["damping"] > 0
    _, log = GPTQ(bits=2, damping=0.01).solve(torch.randn(8, 24), Moments(H, 5))
    assert log["damping"] == 0.01


def test_inputs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(BitfrontError, match="not finite"):
        Curvature(torch.full((1, 3, 3), torch.nan))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scales_are_solved_again_after_rounding_them(dtype: str) -> None:
    w, seen = torch.randn(20, 48), Moments(moments(48, 1), 200)
    exactly, _ = DecoupleQ(bits=4, group_size=16, scale_dtype="float32").solve(w, seen)
    found, _ = DecoupleQ(bits=4, group_size=16, scale_dtype=dtype).solve(w, seen)
    kind = getattr(torch, dtype)
    assert found.lo.dtype == found.span.dtype == kind
    rounded = Packed(exactly.codes, exactly.bits, exactly.lo.to(kind), exactly.span.to(kind), exactly.shape)
    H = seen.curvature(0.01, True).H[0]
    assert exact(w, found.decode(), H).sum() < exact(w, rounded.decode(), H).sum()
    again = Packed.from_bytes(found.to_bytes(), found.layout())
    assert torch.equal(again.decode(), found.decode())
    assert found.nbytes == exactly.nbytes - 4 * found.lo.numel()


@pytest.mark.parametrize(
    "method",
    [
        GPTQ(symmetric=True, scale_dtype="float32"),
        DecoupleQ(symmetric=True, bits=3, group_size=12, scale_dtype="float32"),
    ],
)
def test_symmetric_grids_keep_zero(method: GPTQ) -> None:
    found, _ = method.solve(torch.randn(20, 48), Moments(moments(48, 1), 200))
    middle = 2 ** (method.bits - 1)
    torch.testing.assert_close(found.lo, -middle * found.span / (2**method.bits - 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grid", ["minmax", "mse"])
@pytest.mark.parametrize("kind", [RTN, GPTQ])
def test_with_a_whole_zero_point_a_code_stands_for_0(kind: type[RTN], grid: str) -> None:
    torch.manual_seed(0)
    w = torch.randn(40, 48) + torch.linspace(-5, 5, 40)[:, None]  # of one sign, too
    w[:, ::7] = 0.0
    inputs = None if kind is RTN else Moments(moments(48, 1), 200)
    for bits in (1, 2, 4):
        options: dict[str, Any] = {"bits": bits, "group_size": 12, "grid": grid, "scale_dtype": "float32"}
        found, _ = kind(**options, round_zero=True).solve(w, inputs)
        point = -found.lo * (2**bits - 1) / found.span
        torch.testing.assert_close(point, point.round(), rtol=0, atol=1e-4)
        assert (point.round() >= 0).all() and (point.round() <= 2**bits - 1).all()
        if kind is RTN:
            assert found.decode()[:, ::7].abs().max() < 1e-5


def test_the_whole_zero_point_is_the_official_gptqs() -> None:
    w, levels = torch.randn(40, 48) + torch.linspace(-3, 3, 40)[:, None], 7
    lo, hi = w.amin(1, True).clamp(max=0), w.amax(1, True).clamp(min=0)
    scale = (hi - lo) / levels
    zero = (-lo / scale).round()
    wanted = scale * (((w / scale).round() + zero).clamp(0, levels) - zero)
    found, _ = RTN(bits=3, round_zero=True, scale_dtype="float32").solve(w, None)
    torch.testing.assert_close(found.decode(), wanted)


def test_the_range_with_the_least_error() -> None:
    torch.manual_seed(0)
    for bits in (1, 2, 4):
        for zero in (False, True):
            w, errors = torch.randn(50, 64), {}
            for grid in ("minmax", "mse"):
                packed, _ = RTN(bits=bits, grid=grid, round_zero=zero, scale_dtype="float32").solve(w, None)
                errors[grid] = (packed.decode() - w).square().sum(1)
            assert (errors["mse"] <= errors["minmax"] * 1.0001).all()
            assert errors["mse"].sum() < (0.8 if bits < 4 else 1.0) * errors["minmax"].sum()
    w = torch.randn(4, 100_000)
    error = RTN(bits=2, grid="mse").solve(w, None)[0].decode() - w
    assert error.square().mean().item() == pytest.approx(0.1188, rel=0.02)  # of a Gaussian: Max 1960, table II


@pytest.mark.parametrize("zero", [False, True])
def test_gptqs_range_weighs_errors_by_the_inputs(zero: bool) -> None:
    """Where these are uncorrelated, the diagonal of H is all of the loss."""
    torch.manual_seed(0)
    w, power = torch.randn(30, 40), torch.rand(40) ** 4 + 1e-3

    def loss(grid: str, inputs: Tensor) -> Tensor:
        method = GPTQ(bits=2, grid=grid, round_zero=zero, damping=0.0, scale_dtype="float32")
        packed, _ = method.solve(w, Moments(torch.diag(inputs)[None].double(), 100))
        return ((packed.decode() - w).square() * power).sum(1)

    found = loss("mse", power)
    for other in (loss("minmax", power), loss("mse", torch.ones(40))):
        assert (found <= other * 1.0001).all() and found.sum() < 0.95 * other.sum()


def test_half_floats_hold_the_range_with_the_least_error_as_they_hold_the_whole() -> None:
    torch.manual_seed(0)
    w, seen = torch.randn(40, 64) * 0.02 + 0.01, Moments(moments(64, 1), 200)
    for size, symmetric in itertools.product((-1, 16), (False, True)):
        options: dict[str, Any] = {"bits": 8, "group_size": size, "symmetric": symmetric, "grid": "mse"}
        half, exact = (GPTQ(**options, scale_dtype=dtype).solve(w, seen)[0] for dtype in ("float16", "float32"))
        assert half.lo.dtype == torch.float16
        assert seen.relative_loss(w, half.decode()) < 1.5 * seen.relative_loss(w, exact.decode())
    for grid, dtype in (("minmax", torch.float16), ("mse", torch.float32)):  # which finds a quarter of the range
        assert GPTQ(bits=8, grid=grid).solve(w + 0.15, seen)[0].lo.dtype == dtype


@pytest.mark.parametrize("symmetric", [False, True])
def test_what_a_width_costs_is_tried_in_the_same_bytes_and_near_its_error(symmetric: bool) -> None:
    torch.manual_seed(0)
    w, seen = torch.randn(60, 128), Moments(moments(128, 1), 500)
    shares = []
    for form in ({}, {"group_size": 32}, {"group_size": 32, "scale_bits": 6}):
        for bits in (1, 2, 3, 4, 8):
            method = DecoupleQ(bits=bits, symmetric=symmetric, **form)
            solved, tried = method.solve(w, seen)[0], method.tried(w, seen)
            assert tried.nbytes == solved.nbytes and tried.lo.dtype == solved.lo.dtype
            part = method.tried(w, seen, every=7)
            assert part.nbytes == solved.nbytes and part.lo.dtype == solved.lo.dtype
            torch.testing.assert_close(part.decode()[::7], tried.decode()[::7])
            few = (w - part.decode())[::7].double()
            power = ((few @ seen.H) * few).sum().item() * 60 / len(few)
            assert error(part.decode(), w, seen, every=7) == pytest.approx(power, rel=1e-4)
            shares.append(seen.relative_loss(w, solved.decode()) / seen.relative_loss(w, tried.decode()))
    assert max(shares) <= 1.001 and max(shares) < 2 * min(shares)  # errors of two widths differ by four


def test_what_saw_nothing_is_stored_as_what_did() -> None:
    """So that a size that was chosen for the one is kept by the other; rows are no whole number of groups here."""
    w, seen = torch.randn(24, 50), Moments(moments(50, 1), 200)
    nothing = Moments.of_nothing(w, NATURAL)
    assert nothing is not None and nothing.count == 0
    for form in ({}, {"group_size": 16}, {"group_size": 16, "scale_bits": 6}):
        packed = [GPTQ(bits=2, **form).solve(w, inputs)[0] for inputs in (seen, nothing)]
        assert packed[0].nbytes == packed[1].nbytes
    turned = Moments.of_nothing(w, Form((), (1, 0)))
    assert turned is not None and turned.columns == 24
    assert Moments.of_nothing(torch.randn(4, 5, 6), Form((), (1, 0, 2))) is None


def test_decoupleq_starts_from_the_gptq_that_it_is_asked_for() -> None:
    w, seen = torch.randn(20, 48), Moments(moments(48, 1), 200)
    options: dict[str, Any] = {"bits": 2, "grid": "mse", "round_zero": True, "scale_dtype": "float32"}
    (_, ours), (_, gptqs), (_, usual) = (
        method.solve(w, seen) for method in (DecoupleQ(**options), GPTQ(**options), DecoupleQ(bits=2))
    )
    assert ours["steps"]["gptq"] == pytest.approx(gptqs["steps"]["gptq"])
    assert ours["steps"]["gptq"] != pytest.approx(usual["steps"]["gptq"])


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (RTN, {"grid": "kl"}, "choices: minmax, mse"),
        (GPTQ, {"bits": 9}, "1..8"),
        (GPTQ, {"group_size": 0}, "row by row"),
        (GPTQ, {"scale_dtype": "int8"}, "choices: float32, float16, bfloat16"),
        (GPTQ, {"damping": -1.0}, "not negative"),
        (DecoupleQ, {"level": 3}, "choices: 0, 1, 2"),
        (DecoupleQ, {"N": 0}, "N is positive"),
        (RTN, {"J": -1}, "J is not negative"),
        (RTN, {"samples": 0}, "positive"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    method: type[PostTraining], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BitfrontError, match=message):
        method(**options)


def test_a_grid_of_one_value_has_no_inverse() -> None:
    problem = layer()
    flat = Grid(torch.zeros(1, 1, 12), torch.ones(1, 1, 12))
    assert (problem.nearest(flat) == 0).all() and (problem.feed_back(problem.w, flat, 0.0) == 0).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_of_unknown_inputs_are_rounded_on_the_best_grid(symmetric: bool) -> None:
    w = torch.randn(50, 64) * torch.rand(50, 1) + (0 if symmetric else 3)
    for bits in (1, 2, 3, 8):
        exact: dict[str, Any] = {"bits": bits, "symmetric": symmetric, "scale_dtype": "float32"}
        (found, log), (plain, _) = (kind(**exact).solve(w, None) for kind in (DecoupleQ, GPTQ))
        assert log == {} and torch.equal(
            plain.decode(), round_to_nearest(w, bits, -1, Scales(symmetric=symmetric)).decode()
        )
        errors = [(p.decode() - w).square().sum(1) for p in (found, plain)]
        assert (errors[0] <= errors[1] * 1.01).all() and (bits > 2 or errors[0].sum() < 0.8 * errors[1].sum())
        again = Packed.nearest(w, torch.tensor([bits]), found.lo, found.span, -1)
        assert torch.equal(again.codes, found.codes)
    w = torch.randn(4, 100_000)
    error = DecoupleQ(bits=2).solve(w, None)[0].decode() - w
    assert error.square().mean().item() == pytest.approx(0.1188, rel=0.02)  # of a Gaussian: Max 1960, table II
    constant, _ = DecoupleQ(bits=2).solve(torch.full((3, 8), 0.7), None)
    torch.testing.assert_close(constant.decode(), torch.full((3, 8), 0.7), rtol=1e-3, atol=0)  # of float16


@pytest.mark.parametrize(("columns", "groups"), [(64, 2), (64, 32)])
def test_rows_are_solved_in_parts_of_bounded_size(columns: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the weights, and of the matrix ``[groups, groups]`` that each row has."""
    monkeypatch.setattr(solver, "WEIGHTS", 4096)
    w, seen = torch.randn(100, columns), Moments(moments(columns, 1, batch=2), 200)
    parts = solver.in_parts(seen.rows(w), groups)
    sizes = [part.shape[0] * part.shape[1] * max(columns, groups**2) for part in parts]
    assert max(sizes) <= 4096 < sum(sizes)
    method = DecoupleQ(bits=2, group_size=columns // groups)
    in_parts = method.solve(w, seen)[0]
    monkeypatch.undo()
    torch.testing.assert_close(in_parts.decode(), method.solve(w, seen)[0].decode(), rtol=1e-3, atol=1e-3)
