"""GSQ: the soft codes against their closed forms, and the method as a whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitfront.quant.engine.plan import Calibration
from bitfront.quant.layers.inputs import Moments
from bitfront.quant.methods.gptq import GPTQ
from bitfront.quant.methods.gsq import GSQ, SHARPNESS, TEMPERATURE, Soft
from bitfront.quant.storage.packed import Packed


def solved(bits: int) -> tuple[Tensor, Packed]:
    w = torch.randn(8, 24)
    packed, _ = GPTQ(bits=bits, group_size=10, symmetric=True, grid="mse").solve(
        w, Moments(torch.eye(24).double()[None], 10)
    )
    return w, packed


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_soft_codes_start_at_those_they_were_given_and_end_there_as_it_gets_cold(bits: int) -> None:
    _, packed = solved(bits)
    soft = Soft(packed, seed=3)
    assert torch.equal(soft.packed.codes, packed.codes) and torch.equal(soft.packed.decode(), packed.decode())
    assert len(soft.logits) == (2**bits if bits < 3 else 5)
    assert (soft.temperature, soft.sharpness) == (TEMPERATURE[0], SHARPNESS[0])
    soft.at(1.0)
    assert (soft.temperature, soft.sharpness) == pytest.approx((TEMPERATURE[1], SHARPNESS[1]))
    soft.temperature, soft.sharpness = 1e-6, 1e6
    torch.testing.assert_close(soft.learned_codes(), packed.codes.float())
    torch.testing.assert_close(soft.values(), packed.decode())


def test_soft_codes_are_drawn_as_often_as_their_logits_say() -> None:
    _, packed = solved(3)
    soft = Soft(packed, std=0.02)
    soft.temperature, soft.sharpness = 1e-3, 60.0  # cold: each draw is nearly a code
    draws = torch.stack([soft.learned_codes().detach() for _ in range(3000)])
    inside = (60.0 * soft.logits.detach()).masked_fill(soft.outside, -torch.inf).softmax(0)
    expected = soft.first + torch.einsum("kij,k->ij", inside, torch.arange(5.0))
    assert ((draws - draws.round()).abs() < 1e-2).float().mean() > 0.98
    assert draws.min() >= 0 and draws.max() <= 7  # none outside of the grid
    assert (draws.mean(0) - expected).abs().max() < 0.15
    again = Soft(packed, std=0.02)
    assert torch.equal(again.logits, soft.logits)


def test_the_chance_of_the_given_code_at_the_start_is_the_papers() -> None:
    """0.91 where there are neighbours on both sides, without the noise: 3 nats to the next, 12 to those after them."""
    codes, bits = torch.full((1, 4), 4, dtype=torch.uint8), torch.tensor([3])
    packed = Packed(codes, bits, torch.tensor([-4.0]), torch.tensor([7.0]), torch.Size((1, 4)))
    soft = Soft(packed, std=0.01, strength=6.0)
    flat = Soft(packed, std=1e-9, strength=6e7)  # next to no noise
    chance = (SHARPNESS[0] * flat.logits).softmax(0)[2, 0, 0].item()
    assert chance == pytest.approx(1 / (1 + 2 * 2.718281828**-3 + 2 * 2.718281828**-12), abs=1e-3)
    assert (soft.logits - flat.logits).abs().max() < 0.05


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24)) for _ in range(2)]).eval()


def quantized(**options: Any) -> tuple[float, Any]:
    net, data = network(), Calibration([torch.randn(64, 24) for _ in range(9)], lambda net, x: net(x))
    with torch.no_grad():
        wanted = [net(x) for x in data.batches]
        model = GSQ(group_size=12, min_size=0.0, **options).attach(net, data).eval()
        return sum((model(x) - y).square().mean().item() for x, y in zip(data.batches, wanted, strict=True)), model


def test_it_brings_blocks_closer_than_gptq_and_is_gptq_without_a_step() -> None:
    before, untuned = quantized(moving=0)
    torch.manual_seed(0)
    net, data = network(), Calibration([torch.randn(64, 24) for _ in range(9)], lambda net, x: net(x))
    same = GPTQ(bits=2, group_size=12, symmetric=True, grid="mse", damping=0.1, act_order=False, min_size=0.0)
    plain = same.attach(net, data)
    for name, packed in plain.encode().items():
        assert torch.equal(packed.codes, untuned.encode()[name].codes)
    after, model = quantized(moving=40)
    assert after < 0.9 * before
    assert [len(block["moving"]["held_out"]) for block in model.log["blocks"]] == [41, 41]
    kept, model = quantized(moving=40, keep_codes=["*.0.weight"])
    first = model.encode()["0.0.weight"]
    assert torch.equal(first.codes, plain.encode()["0.0.weight"].codes)
    assert not torch.equal(first.span, plain.encode()["0.0.weight"].span)  # the scales learn
    assert after < kept < before


def test_what_is_in_no_block_of_several_layers_stays_as_gptq_leaves_it() -> None:
    torch.manual_seed(0)
    flat, x = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), torch.randn(8, 6)
    found = [
        GSQ(min_size=0.0, moving=n).attach(copy.deepcopy(flat), Calibration([x], lambda net, batch: net(batch)))
        for n in (0, 3)
    ]
    for name, packed in found[0].encode().items():
        assert torch.equal(packed.decode(), found[1].encode()[name].decode())
