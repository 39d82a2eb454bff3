"""Widths by DiffQ, values by LSQ: the gradients of both, and the way from the one to the other."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import bitfront
from bitfront.quant.core import Method
from bitfront.quant.methods.diffq import DiffQ
from bitfront.quant.methods.diffq_lsq import DiffQLSQ, DiffQLSQQuantizer

MIB = 2**20
EVERY = {"min_size": 0.0005}


def quantizer_of(w: Tensor, **options: object) -> DiffQLSQQuantizer:
    quantizer = DiffQLSQ(scale_dtype="float32", **options).quantizer(w)  # type: ignore[arg-type]
    with torch.no_grad():
        quantizer.grid.uniform_(-0.1, 0.1)
        quantizer.logits.add_(torch.linspace(-1, 1, len(quantizer.logits)))
    return quantizer


def test_the_gradient_of_a_width_is_that_of_the_expected_loss() -> None:
    """Of ``|w_train - w|² / 2``: a mean over the uniform distribution."""
    torch.manual_seed(0)
    w = torch.randn(4, 5000)
    quantizer = quantizer_of(w, init_bits=3)

    def expected(widths: Tensor) -> Tensor:
        lo, span = (x[:, None] for x in quantizer.grids(widths))
        step = span / (torch.exp2(widths)[:, None] - 1)
        noises = (torch.arange(200) + 0.5) / 200 - 0.5
        losses = [((w + step * e).clamp(lo, lo + span) - w).double().square().sum(1) / 2 for e in noises]
        return torch.stack(losses).mean(0)

    with torch.no_grad():
        slope = (expected(quantizer.widths() + 1e-2) - expected(quantizer.widths() - 1e-2)) / 2e-2
    widths = quantizer.widths()
    (chain,) = torch.autograd.grad(widths.sum(), quantizer.logits)
    for _ in range(40):
        ((quantizer.surrogate(w) - w).square().sum() / 2 / 40).backward()
    assert quantizer.logits.grad is not None
    torch.testing.assert_close((quantizer.logits.grad / chain).double(), slope, rtol=0.02, atol=0.0)


@pytest.mark.parametrize("noise", ["uniform", "rounding"])
def test_with_whole_widths_it_is_learned_step_size(noise: str) -> None:
    """Esser et al. 2020, eq. 3, for a grid with a float zero: of the middle, and of the range in units of itself."""
    torch.manual_seed(0)
    w = torch.randn(6, 50, requires_grad=True)
    quantizer = quantizer_of(w, init_bits=3, noise=noise)
    quantizer.hold(w.detach())
    with torch.no_grad():
        quantizer.grid.uniform_(-0.1, 0.1)
    outer = torch.randn(6, 50)
    seen = quantizer.surrogate(w)
    seen.backward(outer)
    assert len(quantizer.widths().unique()) > 1
    torch.testing.assert_close(seen.detach(), quantizer.encode(w.detach()).decode())
    with torch.no_grad():
        lo, span = (x[:, None] for x in quantizer.grids(quantizer.widths()))
        below, above = w < lo, w > lo + span
        moved = torch.where(below | above, quantizer.fitted[1].gather(0, quantizer.whole.long()[None] - 1).T, 0.0)
        stretched = torch.where(below, -span / 2, torch.where(above, span / 2, seen - w))
    assert quantizer.grid.grad is not None and w.grad is not None
    torch.testing.assert_close(quantizer.grid.grad, torch.stack([(outer * x).sum(1) for x in (moved, stretched)]))
    torch.testing.assert_close(w.grad, torch.where(below | above, 0.0, outer))


def test_rounding_in_the_place_of_noise_is_what_is_stored() -> None:
    w = torch.randn(8, 64)
    quantizer = quantizer_of(w, init_bits=3, noise="rounding")
    whole, between = (quantizer.grids(b)[1] for b in (quantizer.widths().round(), quantizer.widths()))
    assert not torch.equal(whole, between)
    torch.testing.assert_close(quantizer.surrogate(w).detach(), quantizer.encode(w).decode())


def test_a_row_without_weights_stays_one() -> None:
    w = torch.randn(4, 32)
    w[1] = 0
    quantizer = DiffQLSQ().quantizer(w)
    for _ in range(2):
        seen = quantizer.surrogate(w)
        assert torch.isfinite(seen).all() and torch.equal(seen[1], w[1])
        assert torch.equal(quantizer.encode(w).decode()[1], w[1])
        quantizer.hold(w)


def learned(method: Method, max_size: float = 0.0, steps: int = 100) -> tuple[bitfront.QuantizedModel, list[Tensor]]:
    """A network that learns to be what it was, of layers that are not equally important; and its widths after each
    step."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    exact = copy.deepcopy(network)
    model = bitfront.prepare(network, method, max_size=max_size, steps=steps).train()
    optimizer = model.optimizer(torch.optim.Adam(network.parameters(), 1e-3))
    widths = []
    for n in range(steps):
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(n))
        optimizer.zero_grad()
        (F.mse_loss(model(x), exact(x)) + model.penalty()).backward()
        optimizer.step()
        widths.append(torch.cat([q.widths().detach() for q in model.quantizers]))  # type: ignore[operator]
    return model, widths


@pytest.mark.parametrize("noise", ["uniform", "rounding"])
def test_widths_come_to_a_size_and_stay_while_values_learn(noise: str, tmp_path: Path) -> None:
    size = 0.0032
    model, widths = learned(DiffQLSQ(learning=0.4, noise=noise, **EVERY), size)
    assert not torch.equal(widths[38], widths[38].round())
    assert torch.equal(widths[39], widths[39].round())
    assert all(torch.equal(w, widths[39]) for w in widths[39:])
    assert 0.98 * size * MIB <= model.save(tmp_path / "training") <= size * MIB
    kept = {name: packed.bits for name, packed in model.encode().items()}
    assert 0.98 * size * MIB <= model.eval().save(tmp_path / "net") == (tmp_path / "net").stat().st_size <= size * MIB
    assert all(torch.equal(packed.bits, kept[name]) for name, packed in model.encode().items())


def test_a_penalty_decides_how_small_it_gets_and_widths_then_stay() -> None:
    sizes = []
    for penalty in (0.1, 3.0):
        model, widths = learned(DiffQLSQ(penalty=penalty, **EVERY))
        assert torch.equal(widths[-1], widths[49]) and torch.equal(widths[49], widths[49].round())
        sizes.append(model.eval().megabytes().item())
    assert sizes[1] < 0.8 * sizes[0]


def test_at_the_same_size_it_is_nearer_than_learned_widths_alone(tmp_path: Path) -> None:
    errors = []
    for method in (DiffQ(lr=0.05, group_size=0, **EVERY), DiffQLSQ(**EVERY)):
        model, _ = learned(method, 0.0032, 300)
        torch.manual_seed(0)
        exact = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
        x = torch.randn(512, 32, generator=torch.Generator().manual_seed(1000))
        errors.append(F.mse_loss(model.eval()(x), exact(x)).item())
    assert errors[1] < 0.7 * errors[0]


def test_a_state_has_all_that_the_rest_of_the_training_needs() -> None:
    model, _ = learned(DiffQLSQ(**EVERY), 0.0032, 60)
    torch.manual_seed(1)
    other = bitfront.prepare(copy.deepcopy(model.network), DiffQLSQ(**EVERY), max_size=0.0032, steps=60).train()
    other.load_state_dict(model.state_dict())
    x = torch.randn(4, 32)
    assert torch.equal(model(x), other(x))
    assert other.steering and other.steering.held
