"""What the layers see, in which order they are solved, and what becomes of the network."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import seen_by
from demucs.demucs import Demucs
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchaudio.models import Conformer

from bitfront.errors import BitfrontError
from bitfront.quant.engine import calibration
from bitfront.quant.engine.block import Block
from bitfront.quant.engine.blockwise import Tuning, adam
from bitfront.quant.engine.calibration import PostTraining, calibrate
from bitfront.quant.engine.frozen import Frozen
from bitfront.quant.engine.moving import Moving
from bitfront.quant.engine.plan import Calibration, plan
from bitfront.quant.forwards.captured import Captured
from bitfront.quant.layers.inputs import Accumulator, Moments, Watch
from bitfront.quant.layers.uses import steps
from bitfront.quant.methods.decoupleq import DecoupleQ
from bitfront.quant.methods.gptq import GPTQ
from bitfront.quant.methods.rtn import RTN
from bitfront.quant.model import eligible


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 5), (4, 7, 6)),
        (nn.Linear(6, 5), (4, 6)),
        (nn.Conv1d(6, 8, 3), (4, 6, 11)),
        (nn.Conv1d(6, 8, 5, stride=2, padding=2, dilation=2, groups=2), (4, 6, 21)),
        (nn.Conv1d(6, 6, 5, padding="same", groups=6), (4, 6, 11)),
        (nn.Conv1d(6, 8, 4, padding="same", dilation=2), (4, 6, 11)),
        (nn.Conv1d(6, 8, 3, padding=2, padding_mode="circular"), (4, 6, 11)),
        (nn.Conv2d(6, 8, 3), (4, 6, 9, 7)),
        (nn.Conv2d(6, 8, (3, 1), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (4, 6, 9, 7)),
        (nn.Conv2d(6, 9, 3, padding="same", groups=3), (4, 6, 9, 7)),
        (nn.Conv2d(6, 8, 2, padding="valid"), (4, 6, 9, 7)),
        (nn.Conv2d(6, 12, 3, padding=1, groups=6), (4, 6, 9, 7)),
    ],
    ids=str,
)
def test_the_quadratic_form_is_the_error_of_the_output(
    layer: nn.Module, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """tr(E H Eᵀ) / tr(W H Wᵀ) is what a perturbed weight does to the output: whatever the geometry."""
    x = torch.randn(shape)
    w = layer.weight.detach().clone()
    assert isinstance(w, Tensor)
    layer.bias.data.zero_()
    changed = w + 0.1 * torch.randn_like(w)
    with torch.no_grad():
        right = layer(x)
        layer.weight.copy_(changed)
        wrong = layer(x)
        layer.weight.copy_(w)
    wanted = (wrong - right).square().sum() / right.square().sum()
    assert seen_by(layer, "weight", (x,)).relative_loss(w, changed) == pytest.approx(wanted.item(), rel=1e-4)
    monkeypatch.setattr("bitfront.quant.layers.convolutions.CHUNK", 1)  # sample by sample
    assert seen_by(layer, "weight", (x,)).relative_loss(w, changed) == pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["in_proj_weight", "out_proj.weight"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_shows_what_its_projections_see(name: str, batch_first: bool) -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first).eval()
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        plain = attention(x, x, x)[0]
        with Watch({}, lambda *_: None):
            torch.testing.assert_close(attention(x, x, x)[0], plain, rtol=1e-5, atol=1e-6)
    found = seen_by(attention, name, (x, x, x))
    assert found.H.shape == (1, 8, 8) and found.count == 15
    if name == "in_proj_weight":
        torch.testing.assert_close(
            found.H[0], x.view(-1, 8).T.double() @ x.view(-1, 8).double() / 15, rtol=1e-5, atol=1e-6
        )
        return
    w = attention.out_proj.weight.detach().clone()
    attention.out_proj.bias.data.zero_()
    changed = w + 0.1 * torch.randn_like(w)
    with torch.no_grad():
        right = attention(x, x, x)[0]
        attention.out_proj.weight.copy_(changed)
        wrong = attention(x, x, x)[0]
    wanted = (wrong - right).square().sum() / right.square().sum()
    assert found.relative_loss(w, changed) == pytest.approx(wanted.item(), rel=1e-4)


def test_cross_attention_has_an_input_for_each_part_of_its_projection() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x, memory = torch.randn(3, 5, 8), torch.randn(3, 9, 8)
    found = seen_by(attention, "in_proj_weight", (x, memory, memory))
    for got, wanted in zip(found.H, (x, memory, memory), strict=True):
        rows = wanted.reshape(-1, 8).double()
        torch.testing.assert_close(got, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 5), nn.Conv1d(6, 8, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)], ids=str
)
def test_padding_is_left_out(layer: nn.Module) -> None:
    lengths = [4, 7, 2]
    full = torch.zeros(3, 6, 3, 7) if isinstance(layer, nn.Conv2d) else torch.zeros(3, 6, 7)
    samples = [torch.randn(1, *full.shape[1:-1], n) for n in lengths]
    for x, sample in zip(full, samples, strict=True):
        x[..., : sample.shape[-1]] = sample[0]
    valid = torch.tensor(lengths) / 7
    if isinstance(layer, nn.Linear):
        full, samples = full.transpose(1, 2) + 0, [s.transpose(1, 2) for s in samples]
        full[0, 4:] = 1e3  # what lies in the padding does not matter
    wanted = seen_by(layer, "weight", *[(s,) for s in samples])
    found = seen_by(layer, "weight", (full,), valid=valid)
    torch.testing.assert_close(found.H, wanted.H, rtol=1e-5, atol=1e-5)
    assert found.count == wanted.count
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    if not isinstance(layer, nn.Conv2d):  # which may be of images
        torch.testing.assert_close(seen_by(layer, "weight", (full,), valid=mask).H, found.H)
    if isinstance(layer, nn.Linear):
        for x, known in (  # time first, as in some encoders; all tokens in one axis; of each of some heads
            (full.transpose(0, 1), valid),
            (full.transpose(0, 1), mask),
            (full.flatten(0, 1), mask),
            (full[:, None].expand(3, 2, 7, 6), mask),
        ):
            torch.testing.assert_close(seen_by(layer, "weight", (x,), valid=known).H, wanted.H, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", [torch.arange(7) < torch.tensor([4, 7, 2])[:, None], torch.tensor([0.5, 1.0, 0.2])])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 5), (5, 4, 6)),  # of neither the samples nor the steps
        (nn.Linear(6, 5), (13, 6)),  # tokens that an expert gets
        (nn.Linear(6, 5), (6,)),
        (nn.Conv1d(6, 8, 3), (2, 6, 7)),
    ],
    ids=str,
)
def test_where_padding_cannot_be_told_all_counts_and_that_is_said(
    layer: nn.Module, shape: tuple[int, ...], mask: Tensor
) -> None:
    x, sums = torch.randn(shape), Accumulator("weight", torch.device("cpu"))
    sums.valid = mask
    with torch.no_grad(), Watch({"weight": layer.weight}, sums.add):
        layer(x)
    wanted = seen_by(layer, "weight", (x,))
    assert sums.padded and torch.equal(sums.moments().H, wanted.H) and sums.moments().count == wanted.count


def test_a_mask_of_other_steps_says_nothing_of_images() -> None:
    """As in CLIP, whose texts are padded and whose images have a patch embedding."""
    mask = torch.arange(7) < torch.tensor([4, 7, 2])[:, None]
    inputs = (
        (nn.Conv2d(3, 4, 2, 2), torch.randn(3, 3, 8, 8)),
        (nn.Conv2d(3, 4, 2, 1), torch.randn(3, 3, 8, 7)),  # as wide as the text is long
        (nn.Linear(6, 5), torch.randn(3, 16, 6)),
        (nn.Linear(6, 5), torch.randn(3, 7, 7, 6)),  # either axis could be time
    )
    for layer, x in inputs:
        assert torch.equal(seen_by(layer, "weight", (x,), valid=mask).H, seen_by(layer, "weight", (x,)).H)


def test_a_mask_is_for_a_convolution_with_a_stride_too() -> None:
    """A step counts if one of those that it is made of does."""
    layer, x = nn.Conv1d(2, 3, 2, stride=2), torch.randn(2, 2, 8)
    mask = torch.arange(8) < torch.tensor([3, 8])[:, None]
    found = seen_by(layer, "weight", (x,), valid=mask)
    kept = torch.cat([x[0, :, :4], x[1]], 1).unfold(1, 2, 2).transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(found.H[0], kept.T @ kept / len(kept), rtol=1e-5, atol=1e-6)


def test_a_tied_weight_counts_as_much_for_its_look_up_as_for_its_output() -> None:
    """Solved for the output alone, an embedding may err without limit where the hidden states never point."""
    network = Decoder().eval()
    away = torch.randn(16)
    network.encoder.layers[1].norm2.weight.data.fill_(0.1)  # the states hardly differ from this:
    network.encoder.layers[1].norm2.bias.data = 5 * away
    w = network.embedding.weight.detach().clone()
    batches = [torch.randint(30, (4, 6)) for _ in range(3)]
    hidden: list[Tensor] = []
    network.head.register_forward_pre_hook(lambda _, args: hidden.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for x in batches:
            network(x)
    states = torch.cat(hidden)
    packed, log = calibrate(network, GPTQ(bits=2, min_size=0), Calibration(batches, lambda net, x: net(x)))
    error = packed["embedding.weight"].decode() - w
    output = (states @ error.T).square().sum() / (states @ w.T).square().sum()
    lookup = error.square().sum() / w.square().sum()
    (entry,) = (layer for layer in log["layers"] if layer["name"] == "embedding.weight")
    assert entry["inputs"] == len(states)
    assert entry["loss"] == pytest.approx((output + lookup).item() / 2, rel=1e-3)
    nearest = RTN(bits=2).solve(w, None)[0].decode() - w
    assert lookup < 2 * nearest.square().sum() / w.square().sum()


def test_inputs_that_are_not_finite_are_refused() -> None:
    x = torch.randn(4, 6)
    x[2, 3] = torch.nan
    with pytest.raises(BitfrontError, match=r"calibration inputs of 'weight' hold NaN"):
        seen_by(nn.Linear(6, 5), "weight", (x,))


class Decoder(nn.Module):
    """A language model from stock layers, with a tied output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.encoder(self.embedding(x), mask, is_causal=True))


class Speech(nn.Module):
    """A Conformer between two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 16)
        self.conformer = Conformer(16, 2, 32, 2, 5)
        self.last = nn.Linear(16, 12)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.last(self.conformer(self.first(x), lengths)[0])


def vit() -> nn.Module:
    return VisionTransformer(img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=2, num_heads=2, num_classes=5)


ARCHITECTURES: dict[str, tuple[Any, Any]] = {
    "vit": (vit, lambda: (torch.randn(4, 1, 8, 8),)),
    "resnet": (lambda: ResNet(BasicBlock, (1, 2, 1, 1), 5, channels=(8, 8, 16, 16)),
               lambda: (torch.randn(2, 3, 32, 32),)),
    "lm": (Decoder, lambda: (torch.randint(30, (4, 6)),)),
    "conformer": (Speech, lambda: (torch.randn(4, 9, 10), torch.tensor([9, 4, 7, 9]))),
    "unet": (lambda: Demucs(["a", "b"], audio_channels=1, channels=4, depth=3),
             lambda: (torch.randn(2, 1, 4096),)),
}  # fmt: skip


@pytest.fixture(params=ARCHITECTURES)
def real(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Calibration]:
    """A real architecture, small, with data."""
    network, arguments = ARCHITECTURES[request.param]
    torch.manual_seed(0)
    made = network().eval()
    return request.param, made, Calibration([arguments() for _ in range(3)], lambda net, batch: net(*batch))


def test_every_layer_is_found_without_knowing_the_architecture(real: tuple[str, nn.Module, Calibration]) -> None:
    name, network, data = real
    weights = eligible(network, 0.0)
    weights = {n: w for n, w in weights.items() if w.dim() > 1}
    units = plan(network, weights, data)
    staged = [w for unit in units for stage in unit.stages for w in stage]
    blind = {w for unit in units for w in unit.blind}
    looked_up = {w for unit in units for w in unit.looked_up}
    assert sorted([*staged, *looked_up, *blind]) == sorted(weights)
    assert blind <= {"cls_token"} and looked_up <= {"pos_embed"}
    order = [unit.block for unit in units]
    assert len(set(filter(None, order))) == len([b for b in order if b])
    expected = {
        "vit": ["blocks.0", "blocks.1", "head"],
        "resnet": ["conv1", "layer1.0", "layer2.0", "layer2.1", "layer3.0", "layer4.0", "fc"],
        "lm": ["", "encoder.layers.0", "encoder.layers.1"],
        "conformer": ["first", "conformer.conformer_layers.0", "conformer.conformer_layers.1", "last"],
    }.get(name)
    if expected:
        assert order[-len(expected) :] == expected
    stages = {unit.block: unit.stages for unit in units}
    if name == "vit":
        own = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
        assert stages["blocks.1"] == [[f"blocks.1.{layer}.weight"] for layer in own]


def test_layers_that_share_an_input_share_its_moments() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.o(torch.tanh(self.q(x) + self.k(x)) + self.v(x))

    network = nn.Sequential(Three())
    (unit,) = plan(network, eligible(network, 0.0, ["*bias"]), Calibration([torch.randn(2, 8)], lambda n, b: n(b)))
    assert unit.stages == [["0.q.weight", "0.k.weight", "0.v.weight"], ["0.o.weight"]]


@pytest.mark.parametrize(
    "method",
    [RTN(bits=8), GPTQ(bits=8, propagation=1.0), DecoupleQ(bits=8, J=1), DecoupleQ(bits=2, J=2)],
    ids=["rtn", "gptq", "decoupleq", "2 bits"],
)
def test_real_architectures_are_quantized(real: tuple[str, nn.Module, Calibration], method: Any) -> None:
    _, network, data = real
    batch = data.batches[0]
    with torch.no_grad():
        wanted = data.run(network, batch)
    model = replace(method, min_size=0.0005).attach(network, data).eval()
    assert model.names
    with torch.no_grad():
        error = (model(*batch) - wanted).square().mean() / wanted.square().mean()
    assert error < (1e-2 if method.bits == 8 else 10)
    assert {layer["name"] for layer in model.log["layers"]} == set(model.names)
    for layer in model.log["layers"]:
        assert ("loss" in layer) == (layer["inputs"] > 0) and "propagation" not in layer
    for block in model.log["blocks"]:
        if "held_out" in block:
            assert min(block["held_out"]) == block["held_out"][block["best_epoch"]]


def small() -> tuple[nn.Module, Calibration]:
    """A network of three blocks with data that it is not indifferent to."""
    torch.manual_seed(0)
    layer = [nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(3)]
    network = nn.Sequential(nn.ModuleDict({"in": nn.Linear(16, 16)})["in"], nn.Sequential(*layer)).eval()
    mix = torch.randn(16, 16)
    return network, Calibration([torch.randn(16, 16) @ mix for _ in range(9)], lambda net, batch: net(batch))


def output(network: nn.Module, data: Calibration) -> Tensor:
    with torch.no_grad():
        return torch.cat([network(batch) for batch in data.batches])


def test_the_block_wise_stage_brings_the_output_closer() -> None:
    errors = {}
    for epochs in (0, 20):
        network, data = small()
        wanted = output(network, data)
        method = DecoupleQ(bits=2, J=epochs, block_lr=0.01, min_size=0.0, scale_dtype="float32")
        model = method.attach(network, data).eval()
        errors[epochs] = (output(model, data) - wanted).square().mean().item()
        held_out = [block["held_out"] for block in model.log["blocks"] if "held_out" in block]
        assert len(held_out) == (3 if epochs else 0)
        assert all(min(losses) < 0.97 * losses[0] and len(losses) <= 21 for losses in held_out)
    assert errors[20] < 0.8 * errors[0]


def test_codes_stay_and_norms_learn_in_the_block_wise_stage_also_in_bfloat16() -> None:
    """The official code trains norms in half precision, where steps this small are lost."""
    network, data = small()
    network.bfloat16()
    data.batches = [batch.bfloat16() for batch in data.batches]
    untuned = DecoupleQ(bits=2, min_size=0.0005, J=0).attach(copy.deepcopy(network), data)
    before = {name: p.clone() for name, p in network.named_parameters()}
    tuned = DecoupleQ(bits=2, min_size=0.0005, J=30, block_lr=1e-3).attach(network, data)
    first = "1.0.1.weight"
    assert torch.equal(tuned.encode()[first].codes, untuned.encode()[first].codes)
    assert not torch.equal(tuned.encode()[first].span, untuned.encode()[first].span)
    norm = network.get_parameter("1.0.0.weight")
    assert norm.dtype == torch.bfloat16 and not torch.equal(norm, before["1.0.0.weight"])
    assert torch.equal(network.get_parameter("1.0.1.bias"), before["1.0.1.bias"])


def test_tuning_is_never_worse_on_what_is_held_out_and_refuses_what_is_not_finite() -> None:
    network, data = small()
    model = DecoupleQ(bits=4, J=3, block_lr=0.5, min_size=0.0005).attach(network, data)  # far too fast
    for block in model.log["blocks"]:
        if "held_out" in block:
            assert block["best_epoch"] == 0 and max(block["held_out"]) > block["held_out"][0]
    network, data = small()
    with pytest.raises(BitfrontError, match=r"block's output is not finite.*lower quant\.block_lr"):
        DecoupleQ(bits=4, J=20, block_lr=1e30, min_size=0.0005).attach(network, data)


def test_the_block_wise_stage_makes_up_for_the_errors_of_earlier_blocks() -> None:
    def error(**options: Any) -> float:
        network, data = small()
        wanted = output(network, data)
        model = DecoupleQ(bits=2, min_size=0.0005, **options).attach(network, data).eval()
        return (output(model, data) - wanted).square().mean().item()

    without, paper, ours = error(J=0), error(J=8, target="block"), error(J=8)
    assert ours < 0.95 * paper < 0.9 * without
    with pytest.raises(BitfrontError, match="no target=layer; choices: network, block"):
        DecoupleQ(target="layer")


def tuned(samples: int, **options: Any) -> tuple[float, Any]:
    """Two gated blocks at 2 bits, and the error that is left of what they give."""
    torch.manual_seed(0)
    network = nn.Sequential(*[nn.Sequential(Gated()) for _ in range(2)]).eval()
    data = Calibration([torch.randn(32, 16) for _ in range(samples)], lambda net, batch: net(batch))
    wanted = output(network, data)
    model = DecoupleQ(bits=2, min_size=0.0, block_lr=2e-3, **options).attach(network, data).eval()
    return (output(model, data) - wanted).square().mean().item(), model


def test_what_is_still_float_makes_up_for_the_layers_before_it() -> None:
    without, plain = tuned(9, J=6)
    error, model = tuned(9, J=6, between=6)
    assert error < 0.9 * without
    for name, packed in plain.encode().items():
        first = name in ("0.0.gate.weight", "0.0.up.weight")  # solved before anything is tuned
        assert torch.equal(packed.codes, model.encode()[name].codes) == first
    for block in model.log["blocks"]:
        (between,) = block["between"]  # of two groups of layers
        assert between["held_out"][between["best_epoch"]] == min(between["held_out"]) and len(block["held_out"]) > 1
    alone, _ = tuned(9, J=0, between=6)
    assert alone < tuned(9, J=0)[0]


def test_codes_that_move_bring_a_block_closer() -> None:
    without, plain = tuned(17, J=6)
    error, model = tuned(17, J=6, moving=20)
    assert error < 0.9 * without
    for name, packed in plain.encode().items():
        moved = packed.codes.int() - model.encode()[name].codes.int()
        assert 0 < (moved != 0).float().mean() < 0.5
        assert name[0] == "1" or moved.abs().max() == 1  # the other block was solved on other inputs
    for block in model.log["blocks"]:
        moving = block["moving"]
        assert len(moving["held_out"]) == 21  # which may rise before it falls
        assert block["held_out"][0] == moving["held_out"][moving["best_epoch"]] < moving["held_out"][0]


def test_a_block_is_tuned_in_the_type_that_is_asked_for() -> None:
    def tuned(dtype: str) -> list[float]:
        seen.clear()
        network, data = small()
        for layer in network.modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(lambda _, __, out: seen.add(out.dtype))
        model = DecoupleQ(bits=2, J=3, min_size=0.0005, block_dtype=dtype).attach(network, data)
        return next(block["held_out"] for block in model.log["blocks"] if "held_out" in block)

    seen: set[torch.dtype] = set()
    usual = tuned("auto")
    assert seen == {torch.float32} and usual == tuned("float32")
    half = tuned("bfloat16")
    assert torch.bfloat16 in seen and half == pytest.approx(usual, rel=0.1) and half != usual


def test_a_block_that_is_particular_about_types_says_so() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            out[x[:, 0] > 0] = self.first(x[x[:, 0] > 0])
            return self.second(out)

    data = Calibration([torch.randn(16, 8) for _ in range(3)], lambda net, batch: net(batch))
    options: dict[str, Any] = {"bits": 2, "J": 1, "min_size": 0.0}
    DecoupleQ(**options).attach(nn.Sequential(Picky()), data)
    with pytest.raises(BitfrontError, match=r"cannot be tuned.*give block_dtype=float32"):
        DecoupleQ(**options, block_dtype="bfloat16").attach(nn.Sequential(Picky()), data)


def test_codes_travel_as_far_as_asked_and_with_momentum_not_where_gradients_do_not_agree() -> None:
    def path(momentum: float, gradients: list[float]) -> list[float]:
        block = nn.Sequential(nn.Linear(4, 4, bias=False))
        w = block[0].weight.detach()
        learned = Moving(RTN(bits=4).solve(w, None)[0], w)
        tuning = Tuning(block, {"0.weight": learned}, False)
        optimizer, schedule = adam(tuning, 1e-3, len(gradients), 0.5, momentum)
        places = [learned.place.detach().clone()]
        for gradient in gradients:
            learned.place.grad = torch.full_like(learned.place, gradient)
            optimizer.step()
            schedule.step()
            places.append(learned.place.detach().clone())
        return [(after - before).abs().max().item() for before, after in pairwise(places)]

    n = 20
    falling = [2 * 0.5 / n * (1 - k / n) for k in range(n)]  # which add up to 0.5 (n + 1) / n
    for momentum in (0.0, 0.9):
        assert path(momentum, [1e-6] * n) == pytest.approx(falling, abs=1e-5)
    flips = [(-1.0) ** k for k in range(n)]
    assert path(0.0, flips) == pytest.approx(falling, abs=1e-5)
    left = [0.1 / 1.9 * (1 - (-0.9) ** k) / (1 - 0.9**k) for k in range(1, n + 1)]  # the last 0.05
    assert path(0.9, flips) == pytest.approx([a * b for a, b in zip(falling, left, strict=True)], abs=1e-5)


def test_codes_start_where_they_are_and_move_straight_through() -> None:
    w = torch.randn(6, 10)
    packed, _ = GPTQ(bits=2, group_size=4, symmetric=True).solve(w, Moments(torch.eye(10).double()[None], 10))
    moving = Moving(packed, w)
    assert torch.equal(moving.values(), packed.decode()) and torch.equal(moving.packed.codes, packed.codes)
    moving.values().sum().backward()
    step = packed.grid(packed.bits, packed.lo, packed.span, len(packed.codes))[1]
    here = packed.cut(torch.ones(6, 10)) * torch.from_numpy(packed._kept())
    torch.testing.assert_close(moving.place.grad, here * step)
    moving.place.data += 1
    assert torch.equal(moving.packed.codes, (packed.codes + 1).clamp(max=3))
    moving.place.data += 5
    moving.values()
    assert (moving.place == 3.5).all()  # beyond the box it is at its edge, from where a step leads back


def test_layers_to_come_see_the_tuned_values_of_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = Block.solve_stage, []

    def solve_stage(block: Any, *arguments: Any) -> None:
        seen.extend(
            torch.equal(block.weights[name], packed.decode().to(block.weights[name]))
            for name, packed in block.packed.items()
        )
        real(block, *arguments)

    monkeypatch.setattr(Block, "solve_stage", solve_stage)
    network = nn.Sequential(*[nn.Sequential(Gated()) for _ in range(2)]).eval()
    data = Calibration([torch.randn(32, 16) for _ in range(5)], lambda net, batch: net(batch))
    DecoupleQ(bits=2, min_size=0.0, J=0, between=3, block_lr=1e-2).attach(network, data)
    assert len(seen) == 4 and all(seen)


def test_an_interrupted_calibration_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = DecoupleQ(bits=2, J=2, min_size=0.0005)
    network, data = small()
    whole = method.attach(network, replace(data, states=tmp_path / "whole"))
    assert len(list((tmp_path / "whole").glob("*/*.pt"))) == 4
    network, data = small()

    def failing(*arguments: Any, real: Any = calibration.quantize_block) -> Any:
        if arguments[-1] == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    states = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "quantize_block", failing)
        with pytest.raises(KeyboardInterrupt):
            method.attach(network, replace(data, states=states))
    assert len(list(states.glob("*/*.pt"))) == 2
    network, data = small()
    resumed = method.attach(network, replace(data, states=states))
    whole.save(tmp_path / "a", {})
    resumed.save(tmp_path / "b", {})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert [layer["name"] for layer in resumed.log["layers"]] == [layer["name"] for layer in whole.log["layers"]]
    next(states.glob("*/0001.pt")).write_bytes(b"cut off")
    method.attach(small()[0], replace(data, states=states)).save(tmp_path / "c", {})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes() and next(states.glob("*/0001.pt.damaged"))


def test_layers_can_have_settings_of_their_own() -> None:
    network, data = small()
    layers = {"1.*": {"bits": 3}, "1.2.*": {"bits": 8, "group_size": 4}}
    packed = GPTQ(bits=2, min_size=0.0005, layers=layers).attach(network, data).encode()
    assert {name: int(p.bits[0]) for name, p in packed.items()} == {
        "0.weight": 2, "1.0.1.weight": 3, "1.0.3.weight": 3, "1.1.1.weight": 3, "1.1.3.weight": 3, "1.2.1.weight": 8,
        "1.2.3.weight": 8,
    }  # fmt: skip
    assert packed["1.2.1.weight"].codes.shape[1] == 4


def test_a_row_that_is_shorter_than_a_group_is_a_group() -> None:
    """So that one group size goes with networks that have small layers, too, and long biases."""
    found = {}
    for size in (-1, 32):
        network, data = small()
        network[0].bias.data[:] = torch.linspace(-1, 1, 16)
        method = GPTQ(bits=2, group_size=size, min_size=0.0, include=["*bias"])
        found[size] = method.attach(network, data).encode()
    assert found[32].keys() == found[-1].keys()
    for name in ("0.weight", "0.bias", "1.0.1.weight"):
        assert torch.equal(found[32][name].decode(), found[-1][name].decode())


def test_a_smoke_runs_network_need_not_have_the_layers_that_settings_name() -> None:
    network, data = small()
    method = GPTQ(bits=2, min_size=0.0005, layers={"1.2.*": {"bits": 8}, "fc.*": {"bits": 3}}).fitting(network)
    assert method.layers == {"1.2.*": {"bits": 8}}
    assert method.attach(network, data).encode()["1.2.1.weight"].bits.tolist() == [8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": {"nothing.*": {"bits": 8}}}, r"no quantized tensor matches 'nothing\.\*'; there are 0\.weight"),
        ({"layers": {"1.*": {"J": 8}}}, "layers sets bits, group_size, .* not 'J'"),
        ({"layers": {"1.*": {"bits": 80}}}, "bits is 1..8, got 80"),
    ],
)
def test_settings_that_do_not_fit_the_network_are_refused_before_any_work(
    options: dict[str, Any], message: str
) -> None:
    network, data = small()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(BitfrontError, match=message):
        GPTQ(min_size=0.0005, **options).attach(network, data)
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())


def test_a_damaged_network_or_sample_is_refused() -> None:
    network, data = small()
    data.batches[4][3, 2] = torch.inf
    with pytest.raises(BitfrontError, match=r"inputs of '0\.weight' hold NaN or infinity"):
        GPTQ(min_size=0.0005).attach(network, data)
    with pytest.raises(BitfrontError, match="needs calibration data"):
        GPTQ().attach(network)


def test_fine_tuning_trains_values_and_norms_alone() -> None:
    network, data = small()
    model = DecoupleQ(bits=2, J=0, sft=True, min_size=0.0005).attach(network, data)
    assert {name for name, p in model.network.named_parameters() if p.requires_grad} == {
        f"1.{n}.0.{kind}" for n in range(3) for kind in ("weight", "bias")
    }
    before = model.eval().encode()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, y = data.batches[0], torch.randn(16, 16)
    losses = []
    for _ in range(50):
        loss = (model.train()(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    after = model.eval().encode()
    assert all(torch.equal(after[name].codes, p.codes) for name, p in before.items())
    assert all(not torch.equal(after[name].lo, p.lo) for name, p in before.items())


def test_codes_are_fine_tuned_too_if_asked() -> None:
    network, data = small()
    method = DecoupleQ(bits=2, J=0, sft=True, sft_codes=True, min_size=0.0005)
    model = method.attach(network, data)
    before = model.eval().encode()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, y = data.batches[0], torch.randn(16, 16)
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model.train()(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    seen = (model(x) - y).square().mean()
    after = model.eval().encode()
    assert all(not torch.equal(after[name].codes, p.codes) for name, p in before.items())
    torch.testing.assert_close((model.eval()(x) - y).square().mean(), seen)  # what is stored is what was trained
    for option in ({"sft_codes": True}, {"distill": 0.5}):
        with pytest.raises(BitfrontError, match="is of fine-tuning; give sft=true"):
            DecoupleQ(**option)


def test_values_that_are_learned_as_they_are_follow_the_gradient_of_scale_and_zero() -> None:
    """SGD on w = s (code - middle) + z, as in the paper; in relative units a scale of 0.01 moves 10,000 times less."""
    w, x = 0.01 * torch.randn(6, 8), torch.randn(8)
    packed, _ = GPTQ(bits=2, scale_dtype="float32").solve(w, Moments(torch.eye(8).double()[None], 10))
    s, z = (packed.span / 3).clone().requires_grad_(), (packed.lo + 2 * packed.span / 3).clone().requires_grad_()
    ((s[:, None] * (packed.codes.view(6, 8).float() - 2) + z[:, None]) @ x).square().sum().backward()
    frozen = Frozen(packed, True, relative=False)
    (frozen.values() @ x).square().sum().backward()
    assert frozen.gain is not None and frozen.shift is not None and s.grad is not None and z.grad is not None
    torch.testing.assert_close(frozen.gain.grad.flatten(), s.grad)  # type: ignore[union-attr]
    torch.testing.assert_close(frozen.shift.grad.flatten(), z.grad)  # type: ignore[union-attr]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trainable_values_start_where_they_were_solved(symmetric: bool, dtype: torch.dtype) -> None:
    w = torch.randn(6, 8)
    w[2] = 0.5  # a row of one value has a span of 0
    method = GPTQ(bits=3, symmetric=symmetric, scale_dtype=str(dtype).removeprefix("torch."))
    packed, _ = method.solve(w, Moments(torch.eye(8).double()[None], 10))
    frozen = Frozen(packed, True, symmetric)
    torch.testing.assert_close(
        frozen.values(), packed.decode(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
    )
    frozen.values().square().sum().backward()
    assert frozen.gain is not None and frozen.shift is not None
    assert frozen.gain.grad is not None and (frozen.shift.grad is None) == symmetric
    if symmetric:  # 0 stays a value, whatever the gain
        frozen.gain.data.mul_(1.3)
        grid = frozen.packed
        torch.testing.assert_close(grid.lo.float() + 4 * grid.span.float() / 7, torch.zeros(6), rtol=0, atol=0.02)


class Gated(nn.Module):
    """A gated layer whose output projection is registered first and used last."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.gate, self.up = nn.Linear(24, 16), nn.Linear(16, 24), nn.Linear(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.sigmoid(self.gate(x)) * self.up(x))


def test_stages_follow_the_order_of_use_not_of_registration() -> None:
    network = nn.Sequential(Gated(), Gated())
    data = Calibration([torch.randn(4, 16)], lambda net, batch: net(batch))
    units = plan(network, eligible(network, 0.0, ["*bias"]), data)
    assert [unit.stages for unit in units] == [
        [[f"{n}.gate.weight", f"{n}.up.weight"], [f"{n}.down.weight"]] for n in range(2)
    ]


class Tied(nn.Module):
    """An output layer inside a block, tied to the embedding outside."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.body = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 30, bias=False))
        self.body[3].weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.embedding(x))


def test_a_tied_weight_can_be_tuned_in_a_block_that_knows_it_by_another_name() -> None:
    network = Tied().eval()
    data = Calibration([torch.randint(30, (8, 5)) for _ in range(3)], lambda net, batch: net(batch))
    model = DecoupleQ(bits=3, J=2, min_size=0.0005).attach(network, data)
    assert set(model.names) == {"embedding.weight", "body.0.weight"}
    assert network.body[3].weight is network.embedding.weight


def test_a_padded_encoder_is_calibrated_without_its_fast_path() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.encoder(x, src_key_padding_mask=mask)

    network = Padded().eval()
    mask = torch.arange(7) >= torch.tensor([7, 3, 5])[:, None]
    data = Calibration([(torch.randn(3, 7, 16), mask)] * 3, lambda net, batch: net(*batch))
    data.valid = lambda batch: 1 - batch[1].float().mean(1)
    model = DecoupleQ(bits=4, J=1, min_size=0.0005).attach(network, data)
    assert all(layer["inputs"] == 3 * 15 for layer in model.log["layers"])
    assert torch.backends.mha.get_fastpath_enabled()


def test_rounding_of_a_share_lets_no_padding_in() -> None:
    for time in (*range(1, 300), 4999):
        lengths = torch.arange(1, time + 1)
        cpu = torch.device("cpu")
        assert torch.equal(steps(lengths / time, time, time, cpu).sum(1), lengths)
        halves = steps(lengths / time, time, -(-time // 2), cpu).sum(1)
        assert time % 2 or torch.equal(halves, -(-lengths // 2))  # a step of which half is padding counts


def test_padding_in_time_first_conformer_layers_counts_nowhere() -> None:
    layer = Conformer(16, 2, 32, 1, 3).conformer_layers[0].eval()  # whose input is [time, samples, features]
    lengths = torch.tensor([7, 11, 4])
    valid, padding = lengths / 11, torch.arange(11) >= lengths[:, None]
    x = torch.randn(11, 3, 16)
    spoiled = x + 1e3 * padding.T[:, :, None]
    for name in ("ffn1.sequential.1.weight", "self_attn.in_proj_weight"):
        (clean, dirty) = (seen_by(layer, name, (y, padding), valid=valid) for y in (x, spoiled))
        assert clean.count == dirty.count == lengths.sum()
        torch.testing.assert_close(dirty.H, clean.H)
    weight = layer.ffn2.sequential[4].weight
    packed, _ = GPTQ(bits=4).solve(weight.detach(), Moments(torch.eye(32).double()[None], 10))
    tuning = Tuning(layer, {"ffn2.sequential.4.weight": Frozen(packed, True)}, False)
    with torch.no_grad():
        target = layer(x, padding)
        clean, dirty = (
            tuning._error(Captured((x, padding), {}, valid), [wanted], [1.0], tuning._stored())
            for wanted in (target, target + 1e3 * padding.T[:, :, None])
        )
    assert 0 < clean < 1
    torch.testing.assert_close(dirty, clean)


def test_time_is_where_a_blocks_last_layer_leaves_it() -> None:
    class Turned(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Conv1d(6, 6, 3, padding=1), nn.ReLU()) for _ in range(2)])
            self.more = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(2)])
            self.turned = nn.ModuleList([nn.Sequential(Turned(6, 6, 1)) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            x = x.transpose(1, 2)
            for layer in (*self.more, *self.turned):
                x = layer(x)
            return x

    network = Blocks()
    data = Calibration([torch.randn(2, 6, 9)], lambda net, x: net(x))
    units = plan(network, eligible(network, 0.0, ["bias"]), data)
    assert [unit.time_last for unit in units] == [True, True, *[False] * 4]


@pytest.mark.parametrize("time_last", [False, True])
def test_padding_counts_in_no_block_loss(time_last: bool) -> None:
    block: nn.Module = nn.Sequential(nn.Conv1d(6, 6, 1)) if time_last else nn.Sequential(nn.Linear(6, 6))
    x, valid = torch.randn(2, 20, 6), torch.tensor([0.5, 1.0])
    x = x.transpose(1, 2) if time_last else x
    weight = block[0].weight.detach().clone()
    packed, _ = GPTQ(bits=8).solve(weight, Moments(torch.eye(6).double()[None], 10))
    block[0].weight.data.copy_(packed.decode())
    tuning = Tuning(block, {"0.weight": Frozen(packed, True)}, time_last)
    with torch.no_grad():
        target = block(x)
    for frame, counts in ((3, True), (15, False)):
        wrong = target.clone()
        (wrong[0, :, frame] if time_last else wrong[0, frame])[...] += 5
        with torch.no_grad():
            loss = tuning._error(Captured((x,), {}, valid), [wrong], [1.0], tuning._stored())
        assert (loss.item() > 0.1) == counts


def test_a_block_with_several_outputs_and_arguments_is_tuned() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor, *, scale: float, skip: Tensor | None = None) -> tuple[Tensor, dict[str, Any]]:
            y = torch.tanh(self.first(x) * scale)
            return self.second(y), {"skip": y if skip is None else y + skip, "length": len(x)}

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Two(), Two()])

        def forward(self, x: Tensor) -> Tensor:
            skip = None
            for layer in self.layers:
                x, other = layer(x, scale=0.5, skip=skip)
                skip = other["skip"]
            return x

    data = Calibration([torch.randn(8, 16) for _ in range(4)], lambda net, batch: net(batch))
    model = DecoupleQ(bits=2, J=3, min_size=0.0005).attach(Whole().eval(), data)
    assert [block["name"] for block in model.log["blocks"]] == ["layers.0", "layers.1"]
    assert all("held_out" in block for block in model.log["blocks"])


def test_a_block_that_is_called_several_times_sees_all_its_inputs() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(16, 16), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(self.block(x)))

    data = Calibration([torch.randn(8, 16) for _ in range(4)], lambda net, batch: net(batch))
    model = GPTQ(bits=2, J=1, min_size=0.0005).attach(Shared().eval(), data)
    assert model.log["layers"][0]["inputs"] == 4 * 8 * 3


def test_states_belong_to_method_settings_network_and_data(tmp_path: Path) -> None:
    """In one folder: each calibration gives what it gives without, and finds its own states again."""
    other = Calibration([x + 1 for x in small()[1].batches], small()[1].run)
    trained = small()[0]
    trained[0].weight.data += 0.1
    variants: dict[str, tuple[PostTraining, nn.Module, Calibration]] = {
        "first": (RTN(bits=2, J=1, min_size=0.0005), *small()),
        "method": (GPTQ(bits=2, J=1, min_size=0.0005), *small()),
        "settings": (GPTQ(bits=4, J=1, min_size=0.0005), *small()),
        "blocks": (GPTQ(bits=4, J=1, min_size=0.0005), small()[0], replace(small()[1], blocks=["1"])),
        "network": (GPTQ(bits=4, J=1, min_size=0.0005), trained, small()[1]),
        "data": (GPTQ(bits=4, J=1, min_size=0.0005), small()[0], other),
    }
    for method, network, data in variants.values():
        alone = method.attach(copy.deepcopy(network), data).encode()
        for _ in range(2):
            kept = method.attach(copy.deepcopy(network), replace(data, states=tmp_path)).encode()
            assert all(torch.equal(kept[name].decode(), alone[name].decode()) for name in alone)
    assert len(list(tmp_path.iterdir())) == len(variants)


def test_what_cannot_be_quantized_is_refused_before_any_work() -> None:
    network, data = small()
    forwards = 0

    def counted(net: nn.Module, batch: Tensor) -> Tensor:
        nonlocal forwards
        forwards += 1
        return net(batch)

    data = replace(data, run=counted)
    network[0] = nn.utils.parametrizations.weight_norm(network[0])
    with pytest.raises(BitfrontError, match="computes its weight"):
        GPTQ(min_size=0.0).attach(network, data)
    network, _ = small()
    network[1][0][1].weight.data[3, 2] = torch.nan
    with pytest.raises(BitfrontError, match=r"'1\.0\.1\.weight' holds NaN"):
        RTN(min_size=0.0).attach(network, data)
    with pytest.raises(BitfrontError, match="needs calibration data"):
        GPTQ().attach(small()[0], replace(data, batches=[]))
    assert forwards == 0
