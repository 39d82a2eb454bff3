"""Closed forms: sizes, gradients and noise as the papers define them, against numbers computed by hand or published."""

from __future__ import annotations

import copy
import math
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from conftest import attach
from torch import Tensor, nn

from bitfront.quant.core import Float, Trained
from bitfront.quant.engine.frozen import Frozen
from bitfront.quant.methods.diffq import DiffQ, DiffQQuantizer
from bitfront.quant.methods.lsq import LSQ, LSQQuantizer
from bitfront.quant.methods.rtn import RTN
from bitfront.quant.methods.ste import STE
from bitfront.quant.model import MB, QuantizedModel, eligible
from bitfront.quant.storage.rounding import round_to_nearest


@cache
def published(name: str) -> nn.Module:
    return timm.create_model(name)


def size(name: str, method: Trained | Float) -> float:
    return method.attach(published(name)).megabytes().item()


def at_floor(name: str, method: DiffQ) -> float:
    model = method.attach(published(name))
    for parameter in model.quantizers.parameters():
        nn.init.constant_(parameter, -50.0)
    return model.megabytes().item()


DEIT, B3 = "deit_base_patch16_224", "efficientnet_b3"


@pytest.mark.parametrize(
    ("name", "min_size", "bits", "expected"),
    [
        (DEIT, 0.1, 2, 21.083), (DEIT, 0.1, 3, 31.388), (DEIT, 0.1, 4, 41.693), (DEIT, 0.1, 5, 51.997),
        (DEIT, 0.1, 8, 82.912), (B3, 0.01, 4, 6.271), (B3, 0.01, 8, 12.042), (B3, 0.1, 2, 5.051), (B3, 0.1, 3, 6.438),
        (B3, 0.1, 4, 7.825), (B3, 0.1, 5, 9.212), (B3, 0.1, 8, 13.374),
    ],
)  # fmt: skip
def test_size_rule_of_fixed_widths(name: str, min_size: float, bits: int, expected: float) -> None:
    """The official code's sizes in MB."""
    for method in (STE(bits=bits, min_size=min_size), LSQ(bits=bits, min_size=min_size)):
        assert size(name, method) == pytest.approx(expected, abs=6e-4 if isinstance(method, STE) else 1.5e-3)
    network = published(name)
    weights = eligible(network, min_size)
    rtn = {
        n: Frozen(RTN(bits=bits, group_size=0, scale_dtype="float32").solve(w.detach(), None)[0])
        for n, w in weights.items()
    }
    assert QuantizedModel(network, rtn).megabytes().item() == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize(
    ("name", "min_size", "min_bits", "start8", "start16", "floor"),
    [(DEIT, 0.1, 3, 86.777, 84.844, 31.388), (B3, 0.01, 2, 12.583, 12.313, 3.386), (B3, 0.1, 2, 13.894, 13.634, 5.051)],
)
def test_size_rule_of_diffq(
    name: str, min_size: float, min_bits: int, start8: float, start16: float, floor: float
) -> None:
    """The official code's sizes in MB at initialisation (groups of 8 and 16) and with every width at its minimum."""
    method = DiffQ(group_size=8, min_size=min_size)  # the references' start is with min_bits 2
    assert size(name, method) == pytest.approx(start8, abs=6e-4)
    assert size(name, DiffQ(group_size=16, min_size=min_size)) == pytest.approx(start16, abs=6e-4)
    assert at_floor(name, DiffQ(group_size=8, min_bits=min_bits, min_size=min_size)) == pytest.approx(floor, abs=6e-4)


def test_float_sizes() -> None:
    assert size(DEIT, Float()) == pytest.approx(330.229, abs=6e-4)
    assert size(B3, Float()) == pytest.approx(46.666, abs=6e-4)


@pytest.mark.parametrize("method", [STE(bits=4), LSQ(bits=3), DiffQ()], ids=["ste", "lsq", "diffq"])
def test_the_file_of_deit_is_as_large_as_the_rule_says(method: Trained, tmp_path: Path) -> None:
    model = method.attach(published(DEIT)).eval()
    if isinstance(method, DiffQ):  # widths from min_bits on, as after training
        for parameter in model.quantizers.parameters():
            nn.init.normal_(parameter, -1.5)
    written = model.save(tmp_path / "a", {})
    rule = model.megabytes().item() * MB
    table = sum(len(q.logits) for q in model.quantizers) / 2 if isinstance(method, DiffQ) else 0  # at most, in the rule
    assert rule - table <= written < 1.02 * rule + 2000  # widths have as many bits as they carry
    assert written == (tmp_path / "a").stat().st_size


def test_the_file_has_no_table_where_all_widths_are_equal(tmp_path: Path) -> None:
    """At the start, the rule charges 3 bits per group to tell 8 bits from 2; the file does not."""
    model = DiffQ(group_size=8).attach(nn.Linear(512, 512, bias=False)).eval()
    table = 3 * 512 * 512 / 8 / 8
    assert model.artifact({}).payload == pytest.approx(model.megabytes().item() * MB - table, abs=2)


def test_diffq_widths_start_where_they_should() -> None:
    assert DiffQ().initial_logit() == pytest.approx(-0.15415, abs=1e-5)
    for param in ("bits", "noise"):
        for low, start, high in ((2, 8, 15), (1, 8, 10), (3, 4, 5)):
            method = DiffQ(param=param, min_bits=low, init_bits=start, max_bits=high)
            assert method.widths(torch.tensor(method.initial_logit())).item() == pytest.approx(start, abs=1e-4)
            ends = method.widths(torch.tensor([-80.0, 80.0]))
            assert ends.tolist() == pytest.approx([low, high], abs=1e-4)


def test_diffq_noise_parametrisation_is_linear_in_the_log_of_the_noise() -> None:
    method = DiffQ(param="noise")
    share = torch.sigmoid(torch.tensor([-2.0, 0.3, 1.1]))
    finest, coarsest = 1 / (2**15 - 1), 1 / (2**2 - 1)
    noise = torch.exp(share * math.log(finest) + (1 - share) * math.log(coarsest))
    torch.testing.assert_close(method.widths(torch.logit(share)), torch.log2(1 + 1 / noise), rtol=1e-5, atol=1e-5)


def test_diffq_penalty_gradient() -> None:
    """Per logit, group_size / 2**23 * (max - min) * s (1 - s): 3.081e-6 at the start with groups of 8."""
    model = DiffQ(group_size=8, min_size=0.0).attach(nn.Linear(64, 64, bias=False))
    model.megabytes().backward()
    gradient = next(model.quantizers.parameters()).grad
    assert gradient is not None
    assert gradient.tolist() == pytest.approx([3.081e-6] * 512, rel=1e-3)


@pytest.mark.parametrize(("noise", "deviation"), [("gaussian", 0.5), ("uniform", 1 / math.sqrt(12))])
def test_diffq_noise_statistics(noise: str, deviation: float) -> None:
    w = torch.randn(400, 500)
    quantizer = DiffQQuantizer(w, DiffQ(noise=noise, group_size=4))
    nn.init.constant_(quantizer.logits, quantizer.method.initial_logit() - 1)
    with torch.no_grad():
        step = (w.max() - w.min()) / (2 ** quantizer.widths()[0] - 1)
        error = (quantizer.surrogate(w) - w) / step
    assert error.mean().abs() < 0.01
    assert error.std().item() == pytest.approx(deviation, rel=0.02)
    if noise == "uniform":
        assert error.abs().max() <= 0.5 + 1e-3
    assert not torch.equal(quantizer.surrogate(w), quantizer.surrogate(w))


def test_diffq_gradients() -> None:
    """To the width through the noise, to every weight directly, to the extremes through the range."""
    w = torch.tensor([[0.3, -1.0, 0.2, 0.1], [2.0, 0.5, -0.4, 0.7]], requires_grad=True)
    quantizer = DiffQQuantizer(w, DiffQ(group_size=4))
    outer = torch.randn(2, 4)
    torch.manual_seed(1)
    seen = quantizer.surrogate(w)
    seen.backward(outer)
    with torch.no_grad():
        xi = (seen - w) / (3.0 / (2**8 - 1))
        share = torch.sigmoid(quantizer.logits)
        slope = -math.log(2) * 2**8 / (2**8 - 1) ** 2 * 3.0 * 13 * share * (1 - share)
        expected = outer.clone()
        through_range = (outer * xi).sum() / (2**8 - 1)
        expected[1, 0] += through_range
        expected[0, 1] -= through_range
    assert quantizer.logits.grad is not None and w.grad is not None
    torch.testing.assert_close(quantizer.logits.grad, slope * (outer * xi).sum(1), rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(w.grad, expected, rtol=1e-3, atol=1e-5)


def test_the_absolute_range_of_diffq_rounds_without_a_common_error() -> None:
    """Weights around 0 with one outlier: with the range of the paper all of them err to one side."""
    w = 0.05 * torch.randn(64, 64)
    w[0, 0], w[0, 1] = 1.0, -0.7
    mean = {}
    for name in ("minmax", "absmax"):
        quantizer = DiffQQuantizer(w, DiffQ(group_size=8, range=name))
        nn.init.uniform_(quantizer.logits, -6, 0)  # 2 to 8 bits
        packed = quantizer.encode(w)
        errors = packed.decode() - w
        mean[name] = errors.mean().abs().item() / errors.abs().mean().item()
        assert errors.abs().max() <= 1.0 / 3 + 1e-6  # half a step of 2 bits
    assert packed.lo.item() == -1.0 and packed.span.item() == 2.0
    assert mean["absmax"] < 0.05 < 0.3 < mean["minmax"]
    nn.init.constant_(quantizer.logits, quantizer.method.initial_logit())
    noise = (quantizer.surrogate(w) - w).detach()
    assert noise.std().item() == pytest.approx(0.5 * 2.0 / (2**8 - 1), rel=0.05)


def test_diffq_widths_on_disk_are_rounded_and_extra_bits_only_count_there() -> None:
    w = torch.randn(16, 8)
    quantizer = DiffQQuantizer(w, DiffQ(group_size=8, extra_bits=2))
    nn.init.uniform_(quantizer.logits, -6, 6)
    expected = (quantizer.widths() + 2).round().clamp(1, 15).to(torch.uint8)
    assert torch.equal(quantizer.encode(w).bits, expected)
    plain = DiffQQuantizer(w, DiffQ(group_size=8))
    plain.load_state_dict(quantizer.state_dict())
    torch.manual_seed(3)
    with_extra = quantizer.surrogate(w)
    torch.manual_seed(3)
    assert torch.equal(plain.surrogate(w), with_extra)
    assert quantizer.bits().item() == pytest.approx(plain.bits().item() + 2 * w.numel() + 16, abs=17)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_lsq_start_and_gradients(bits: int) -> None:
    """Esser et al. 2020, eq. 3 and §2.2."""
    w = torch.randn(6, 10, requires_grad=True)
    quantizer = LSQQuantizer(w, bits, 0)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    s = quantizer.step.item()
    assert s == pytest.approx(2 * w.abs().mean().item() / math.sqrt(max(high, 1)))
    outer = torch.randn(6, 10)
    seen = quantizer.surrogate(w)
    seen.backward(outer)
    with torch.no_grad():
        scaled = w / s
        torch.testing.assert_close(seen, scaled.clamp(low, high).round() * s)
        inside = (scaled > low) & (scaled < high)
        slope = torch.where(inside, scaled.round() - scaled, scaled.clamp(low, high))
        scale = 1 / math.sqrt(60 * max(high, 1))
    assert quantizer.step.grad is not None and w.grad is not None
    torch.testing.assert_close(quantizer.step.grad, (outer * slope).sum()[None] * scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(w.grad, outer * inside)


def test_lsq_stores_what_it_trains_with() -> None:
    w = torch.randn(32, 32)
    for size_of_group in (0, -1, 8):
        quantizer = LSQQuantizer(w, 3, size_of_group)
        torch.testing.assert_close(quantizer.encode(w).decode(), quantizer.surrogate(w).detach(), rtol=1e-5, atol=1e-6)


def test_ste_sees_the_stored_weight_and_passes_the_gradient() -> None:
    w = torch.randn(8, 8, requires_grad=True)
    quantizer = STE(bits=3).quantizer(w)
    outer = torch.randn(8, 8)
    seen = quantizer.surrogate(w)
    seen.backward(outer)
    torch.testing.assert_close(seen, round_to_nearest(w, 3, 0).decode())
    assert torch.equal(w.grad, outer)  # type: ignore[arg-type]


def test_rtn_by_hand() -> None:
    packed = round_to_nearest(torch.tensor([-1.0, -0.6, 0.1, 0.4, 2.0]), 2, 0)
    assert packed.codes.flatten().tolist() == [0, 0, 1, 1, 3]
    assert packed.decode().tolist() == [-1, -1, 0, 0, 2]


def regression(model: QuantizedModel, method: Trained | Float, steps: int) -> tuple[float, float]:
    """Loss and size of a model after training on a fixed nonlinear function."""
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(1))
    teacher = torch.Generator().manual_seed(2)
    y = torch.tanh(x @ torch.randn(16, 32, generator=teacher)) @ torch.randn(32, 4, generator=teacher) / 4
    own = list(model.quantizers.parameters())
    extra = method.optimizer(own) if own else None
    main = torch.optim.Adam([*model.network.parameters(), *([] if extra else own)], 3e-3)

    def loss() -> Tensor:
        return nn.functional.mse_loss(model(x), y)

    model.train()
    for _ in range(steps):
        for optimizer in filter(None, (main, extra)):
            optimizer.zero_grad()
        (loss() + method.penalty * model.megabytes()).backward()
        for optimizer in filter(None, (main, extra)):
            optimizer.step()
    model.eval()
    with torch.no_grad():
        return loss().item(), model.megabytes().item()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))


def test_training_through_the_quantizer_beats_rounding_afterwards() -> None:
    network = mlp()
    float_loss, _ = regression(Float().attach(network), Float(), 400)
    rtn = RTN(bits=2, group_size=0, min_size=0.0005)
    rounded, _ = regression(attach(rtn, copy.deepcopy(network), torch.randn(4, 16)), Float(), 0)
    assert rounded > 4 * float_loss
    for method, share in ((STE(bits=2, min_size=0.0005), 0.7), (LSQ(bits=2, min_size=0.0005, lr=1e-3), 0.4)):
        trained, _ = regression(method.attach(copy.deepcopy(network)), method, 400)
        assert trained < share * rounded, type(method).__name__


def test_diffq_trades_size_for_loss_by_the_penalty() -> None:
    results = []
    for penalty in (0.5, 20.0, 500.0):
        method = DiffQ(penalty=penalty, min_size=0.0005, lr=0.05)
        results.append(regression(method.attach(mlp()), method, 400))
    losses, sizes = zip(*results, strict=True)
    assert sizes[0] > sizes[1] > sizes[2]
    assert losses[0] < losses[2]
