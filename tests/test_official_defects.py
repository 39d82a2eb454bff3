"""The official DiffQ package's defects, each shown absent here. Names follow the list B1-B18 of its issue reports and
code review: what goes wrong there stands in each docstring."""

from __future__ import annotations

import pickle
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, ConvNet, TiedGPT
from torch import nn

from bitfront.cells.check import check
from bitfront.errors import BitfrontError
from bitfront.quant.methods.diffq import DiffQ, DiffQQuantizer
from bitfront.quant.methods.lsq import LSQ
from bitfront.quant.methods.rtn import RTN
from bitfront.quant.methods.ste import STE
from bitfront.quant.model import eligible
from bitfront.quant.optimizer import Joint
from bitfront.quant.storage.artifact import Artifact


def stored_widths(path: Path) -> dict[str, torch.Tensor]:
    return {name: packed.bits for name, packed in Artifact.load(path).packed.items()}


def test_b1_buffers_are_in_the_file(tmp_path: Path) -> None:
    """Batch norm statistics are lost, the restored network is wrong."""
    network = ConvNet().train()
    for _ in range(5):
        network(torch.randn(8, 3, 8, 8) * 3 + 1)
    model = DiffQ(min_size=0.0002).attach(network).eval()
    model.save(tmp_path / "a", {})
    fresh = ConvNet().eval()
    Artifact.load(tmp_path / "a").load_into(fresh)
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(fresh(x), model(x))


def test_b2_groups_of_15_bits_survive(tmp_path: Path) -> None:
    """Packing skips width 15: such groups come back as uninitialised memory."""
    model = DiffQ(min_size=0.0).attach(nn.Linear(64, 8, bias=False)).eval()
    nn.init.constant_(next(model.quantizers.parameters()), 50.0)
    model.save(tmp_path / "a", {})
    assert (stored_widths(tmp_path / "a")["weight"] == 15).all()
    fresh = nn.Linear(64, 8, bias=False)
    Artifact.load(tmp_path / "a").load_into(fresh)
    torch.testing.assert_close(fresh.weight, model.network.weight, rtol=0, atol=1e-4)


def test_b3_files_load_without_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state pickles a class, which torch.load refuses since 2.6."""
    DiffQ(min_size=0.0).attach(nn.Linear(8, 8)).eval().save(tmp_path / "a", {})

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr(pickle, "load", refused)
    monkeypatch.setattr(pickle, "loads", refused)
    monkeypatch.setattr(torch, "load", refused)
    Artifact.load(tmp_path / "a").load_into(nn.Linear(8, 8))


def test_b4_one_group_for_the_whole_tensor(tmp_path: Path) -> None:
    """group_size=0 packs but cannot be restored."""
    model = DiffQ(min_size=0.0, group_size=0).attach(nn.Linear(9, 7)).eval()
    model.save(tmp_path / "a", {})
    fresh = nn.Linear(9, 7)
    Artifact.load(tmp_path / "a").load_into(fresh)
    x = torch.randn(3, 9)
    assert torch.equal(fresh(x), model(x))


def test_b5_widths_outside_the_learned_range(tmp_path: Path) -> None:
    """extra_bits below zero wraps around in the table of widths; a fractional min_bits breaks packing."""
    model = DiffQ(min_size=0.0, extra_bits=-3).attach(nn.Linear(16, 16)).eval()
    nn.init.uniform_(model.quantizers[0].logits, -10.0, 1.0)
    model.save(tmp_path / "a", {})
    widths = stored_widths(tmp_path / "a")["weight"]
    assert widths.min() == 1 and torch.equal(widths, model.quantizers[0].stored_widths().to(torch.uint8))
    with pytest.raises(BitfrontError, match=r"min_bits is 1\.\.15, got 2\.5"):
        DiffQ(min_bits=2.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [RTN, STE, LSQ])
def test_b6_fractional_bits_are_refused(method: type) -> None:
    """4.5 bits quantize to one number of levels and restore from another."""
    with pytest.raises(BitfrontError, match=r"bits is 1\.\.15, got 4\.5"):
        method(bits=4.5)
    with pytest.raises(BitfrontError, match="whole number"):
        check([f"quant={method.__name__.lower()}", "bits=4.5"])


@pytest.mark.parametrize("method", [DiffQ(min_size=0.0001), LSQ(min_size=0.0001, lr=1e-3)])
def test_b7_tied_weights_have_one_parameter_that_is_stepped_once(method: DiffQ | LSQ) -> None:
    """The logits of a tied weight are twice in the optimizer and move twice as fast."""
    model = method.attach(TiedGPT())
    own = list(model.quantizers.parameters())
    assert len(own) == len(set(map(id, own))) == len(model.names)
    optimizer = method.optimizer(own)
    assert optimizer is not None
    before = own[0].detach().clone()
    (model(torch.randint(40, (4, 6))).square().sum() + model.megabytes()).backward()
    optimizer.step()
    moved = (own[0] - before).abs().max().item()
    assert moved <= optimizer.param_groups[0]["lr"] * 1.001


def test_b7_excluding_either_name_of_a_tied_weight_excludes_it() -> None:
    """Excluded by its second name, it is left without noise in training but quantized."""
    assert "embedding.weight" in eligible(TiedGPT(), 0.0)
    for pattern in ("embedding.*", "head.*"):
        assert "embedding.weight" not in eligible(TiedGPT(), 0.0, [pattern])


def test_b8_nothing_to_quantize(tmp_path: Path) -> None:
    """Evaluation raises when no tensor is large enough."""
    model = DiffQ(min_size=1.0).attach(nn.Linear(4, 4)).eval()
    x = torch.randn(2, 4)
    assert torch.equal(model(x), model.network(x))
    model.save(tmp_path / "a", {})
    assert not Artifact.load(tmp_path / "a").packed


@pytest.mark.parametrize("training", [True, False])
def test_b9_a_failing_forward_leaves_the_weights_alone(training: bool) -> None:
    """An exception in a forward leaves quantized or noisy weights behind."""
    model = DiffQ(min_size=0.0).attach(nn.Linear(4, 4)).train(training)
    before = model.network.weight.detach().clone()
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5))
    assert torch.equal(model.network.weight, before) and isinstance(model.network.weight, nn.Parameter)
    assert model(torch.randn(2, 4)).shape == (2, 4)


def test_b10_small_parameters_keep_their_value() -> None:
    """Each evaluation rounds the small parameters to half precision for good."""
    network = nn.Linear(64, 64)
    before = network.bias.detach().clone()
    model = DiffQ(min_size=0.001).attach(network).eval()
    model(torch.randn(2, 64))
    assert torch.equal(network.bias, before)
    assert torch.equal(model.artifact({}).raw["bias"], before)


def test_b11_evaluation_quantizes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every evaluation forward copies and quantizes all weights again."""
    calls = []
    encode = DiffQQuantizer.encode
    monkeypatch.setattr(DiffQQuantizer, "encode", lambda self, w: calls.append(1) or encode(self, w))
    model = DiffQ(min_size=0.0).attach(nn.Linear(8, 8, bias=False)).eval()
    for _ in range(5):
        model(torch.randn(2, 8))
    assert len(calls) == 1


def test_b12_parts_of_the_network_are_quantized_too(tmp_path: Path) -> None:
    """Calling a submodule by itself skips the quantization."""
    network = TiedGPT()
    model = DiffQ(min_size=0.0001).attach(network).eval()
    model.save(tmp_path / "a", {})
    fresh = TiedGPT()
    Artifact.load(tmp_path / "a").load_into(fresh)
    tokens = torch.arange(40)
    assert torch.equal(fresh.embedding(tokens), model.weights()["embedding.weight"])
    assert not torch.equal(fresh.embedding(tokens), network.embedding(tokens))


def test_b12_channels_last_weights(tmp_path: Path) -> None:
    """Weights in channels_last memory raise."""
    torch.manual_seed(0)
    plain = DiffQ(min_size=0.0001).attach(ConvNet()).eval()
    torch.manual_seed(0)
    model = DiffQ(min_size=0.0001).attach(ConvNet().to(memory_format=torch.channels_last)).eval()
    for name, w in plain.weights().items():
        assert torch.equal(model.weights()[name], w)
    model.train()(torch.randn(2, 3, 8, 8)).sum().backward()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm])
def test_b12_weight_norm_is_refused(norm: object) -> None:
    """The factors are quantized instead of the weight."""
    with pytest.raises(BitfrontError, match="weight norm"):
        DiffQ(min_size=0.0).attach(norm(nn.Linear(8, 8)))  # type: ignore[operator]


def test_b12_gradients_equal_those_of_the_same_function_written_out() -> None:
    """Recomputation without the noise gives wrong gradients silently; ours are those of f(x; Q(w))."""
    model = DiffQ(min_size=0.0, group_size=4).attach(nn.Linear(8, 8, bias=False)).train()
    x, w, quantizer = torch.randn(3, 8), model.network.weight, model.quantizers[0]
    torch.manual_seed(5)
    model(x).square().sum().backward()
    ours = [w.grad.clone(), quantizer.logits.grad.clone()]
    w.grad = quantizer.logits.grad = None
    torch.manual_seed(5)
    (x @ quantizer.surrogate(w).T).square().sum().backward()
    for mine, reference in zip(ours, [w.grad, quantizer.logits.grad], strict=True):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("group_size", [8, 7, 64])
def test_b13_groups_that_do_not_divide(group_size: int, tmp_path: Path) -> None:
    """A group size that does not divide some tensor raises deep inside."""
    model = DiffQ(min_size=0.0, group_size=group_size).attach(nn.Linear(5, 3))
    model.train()(torch.randn(2, 5)).sum().backward()
    model.eval().save(tmp_path / "a", {})
    fresh = nn.Linear(5, 3)
    Artifact.load(tmp_path / "a").load_into(fresh)
    x = torch.randn(2, 5)
    assert torch.equal(fresh(x), model(x))


def test_b14_lsq_steps_start_from_the_loaded_weights_and_zeros_are_fine() -> None:
    """Steps come from random weights, before the checkpoint is loaded; an all-zero tensor gives NaN."""
    network = nn.Linear(16, 16, bias=False)
    nn.init.constant_(network.weight, 3.0)
    model = LSQ(min_size=0.0).attach(network)
    assert model.quantizers[0].step.item() == pytest.approx(2 * 3.0 / 7**0.5)
    nn.init.zeros_(network.weight)
    model = LSQ(min_size=0.0).attach(network).train()
    model(torch.randn(2, 16)).sum().backward()
    assert torch.isfinite(model.eval()(torch.randn(2, 16))).all() and torch.isfinite(network.weight.grad).all()


def test_b14_a_step_stays_positive_when_an_optimizer_overshoots() -> None:
    """Nothing keeps the step positive."""
    model = LSQ(min_size=0.0, bits=3).attach(nn.Linear(16, 16, bias=False))
    step = model.quantizers[0].step
    before = model.eval()(torch.ones(1, 16)).detach()
    step.data.neg_()
    assert torch.equal(model.train().eval()(torch.ones(1, 16)), before)


def test_b15_the_test_split_chooses_nothing() -> None:
    """The validation set is the test set. (That a resumed run does not advance its schedule twice, test_run shows.)"""
    from bitfront.data.images import digits

    rows = {split: {bytes(x.numpy().tobytes()) for x in digits(split).pixels} for split in ("train", "valid", "test")}
    sizes = {split: len(digits(split)) for split in rows}
    assert sum(sizes.values()) == 1797
    assert not rows["test"] & rows["valid"] and not rows["test"] & rows["train"] and not rows["valid"] & rows["train"]


def test_b16_quantization_aware_training_is_aware() -> None:
    """The option for it quantizes after training instead."""
    model = STE(min_size=0.0, bits=2).attach(nn.Linear(16, 16)).train()
    assert len(model.weights()["weight"].unique()) <= 4
    assert model.weights()["weight"].requires_grad


def test_b17_gradients_of_widths_are_unscaled() -> None:
    """Their gradients escape unscaling, because they live in an optimizer of their own. Ours take the factor out."""
    weights, logits = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(3))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    both = torch.optim.SGD([weights], 0.1), torch.optim.Adam([logits], 0.01)
    chain = Joint(*both, lambda: None, scaler)
    scaler.scale(weights.sum() + logits.sum()).backward()
    scaler.step(chain)
    assert logits.grad is not None and logits.grad.tolist() == [1.0, 1.0, 1.0]
    assert weights.tolist() == pytest.approx([0.9, 0.9]) and logits.tolist() == pytest.approx([-0.01] * 3)
    scaler.update()
    scaler.scale(weights.sum() + (logits * torch.tensor([1.0, float("inf"), 1.0])).sum()).backward()
    scaler.step(chain)  # an overflow, which the scaler does not see
    assert logits.tolist() == pytest.approx([-0.01] * 3)


def test_b18_nothing_has_to_be_compiled() -> None:
    """Wheels exist for few versions of Python, all else needs a compiler."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert project["build-system"]["build-backend"] == "hatchling.build"  # which packs files, without a hook of ours
    assert "hooks" not in project["tool"]["hatch"]["build"]
    kinds = {path.suffix for path in (REPOSITORY / "src" / "bitfront").rglob("*") if path.is_file()}
    assert kinds <= {".py", ".pyc", ".typed", ".html", ".css", ".js"}
