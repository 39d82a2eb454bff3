"""What every method must keep, on every tiny network. Methods are found by their yaml files."""

from __future__ import annotations

import copy
import pickle
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TiedGPT, attach
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import Tensor, nn

from bitfront.cells import compose
from bitfront.cells.flow import build_method
from bitfront.quant.core import Float, Method, Trained
from bitfront.quant.model import MB, QuantizedModel
from bitfront.quant.storage.artifact import Artifact

Tiny = tuple[type[nn.Module], Tensor]
MIN_SIZE = 100 * 4 / MB  # tensors of more than 100 values


@pytest.fixture(params=compose.options("quant"))
def method(request: pytest.FixtureRequest) -> Method:
    return replace(build_method(compose.load([f"quant={request.param}"])), min_size=MIN_SIZE)


@pytest.mark.parametrize("name", compose.options("quant"))
def test_the_yaml_holds_the_defaults_of_the_class(name: str) -> None:
    node = OmegaConf.to_container(compose.files(quant=name).quant, resolve=True)
    method = get_class(node.pop("_target_"))()
    useless = {"min_size", "exclude", "include", "layers", "reestimate_bn"} if isinstance(method, Float) else set()
    assert node == {f.name: getattr(method, f.name) for f in fields(method) if f.init and f.name not in useless}


def scattered(model: QuantizedModel) -> QuantizedModel:
    """The model with its quantizers' parameters away from their start, so that widths and steps differ."""
    with torch.no_grad():
        for parameter in model.quantizers.parameters():
            parameter.mul_(1 + torch.rand_like(parameter)).add_(2 * torch.randn_like(parameter) * (parameter < 0))
    return model


def test_evaluation_is_what_a_fresh_network_computes_from_the_file(method: Method, tiny: Tiny, tmp_path: Path) -> None:
    network, x = tiny
    model = scattered(attach(method, network(), x)).eval()
    model.save(tmp_path / "a", {})
    fresh = network()
    Artifact.load(tmp_path / "a").load_into(fresh)
    assert torch.equal(fresh.eval()(x), model(x))
    fresh.load_state_dict(fresh.state_dict())  # names are the float network's


def test_saving_twice_gives_the_same_bytes(method: Method, tiny: Tiny, tmp_path: Path) -> None:
    model = attach(method, tiny[0](), tiny[1]).eval()
    sizes = [model.save(tmp_path / name, {"a": 1}) for name in "ab"]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sizes[0] == (tmp_path / "a").stat().st_size


def test_size_by_the_rule_is_the_payload(method: Method, tiny: Tiny) -> None:
    model = scattered(attach(method, tiny[0](), tiny[1])).eval()
    artifact = model.artifact({})
    buffers = sum(b.numel() * b.itemsize for b in model.network.buffers())
    rule = model.megabytes().item() * MB
    # The rule counts one float per LSQ step where the file has two, and 8 bits for a table; each stream of a
    # width ends on a byte.
    assert abs(artifact.payload - buffers - rule) <= 20 * len(model.names) + 1


def test_gradients_reach_weights_and_quantizers(method: Method, tiny: Tiny) -> None:
    network, x = tiny
    model = attach(method, network(), x).train()
    if not isinstance(method, Trained):
        assert not list(model.quantizers.parameters())
        return
    (model(x).square().sum() + model.megabytes()).backward()
    for name, quantizer, w in model.items():
        assert w.grad is not None and w.grad.abs().sum() > 0, name
        for parameter in quantizer.parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_float_weights_survive_every_mode(method: Method, tiny: Tiny) -> None:
    network, x = tiny
    model = attach(method, network(), x)
    before = copy.deepcopy(dict(model.network.named_parameters()))
    for mode in (True, False, True):
        model.train(mode)(x)
    assert all(torch.equal(p, before[name]) for name, p in model.network.named_parameters())


def test_pickle_and_deepcopy(method: Method, tiny: Tiny) -> None:
    network, x = tiny
    model = attach(method, network(), x).eval()
    expected = model(x)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)


def test_new_weights_are_seen_in_evaluation_mode(method: Method, tiny: Tiny) -> None:
    network, x = tiny
    model, other = attach(method, network(), x).eval(), attach(method, network(), x).eval()
    model(x), other(x)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(x), other(x))
    third = attach(method, network(), x).eval()
    nn.ModuleDict({"inside": model}).load_state_dict({f"inside.{k}": v for k, v in third.state_dict().items()})
    assert torch.equal(model(x), third(x))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    copied = copy.deepcopy(model).train().eval()
    assert torch.equal(model(x), copied(x))


def test_tied_weights_are_drawn_stored_and_counted_once(method: Method, tmp_path: Path) -> None:
    model = attach(method, TiedGPT(), torch.randint(40, (4, 6)))
    seen: list[Tensor] = []
    model.network.embedding.register_forward_pre_hook(lambda module, _: seen.append(module.weight))
    model.network.head.register_forward_pre_hook(lambda module, _: seen.append(module.weight))
    model.train()(torch.randint(40, (2, 3)))
    assert seen[0] is seen[1]
    assert model.names.count("embedding.weight") == (0 if not model.names else 1) and "head.weight" not in model.names
    model.eval().save(tmp_path / "a", {})
    artifact = Artifact.load(tmp_path / "a")
    assert artifact.tied == {"head.weight": "embedding.weight"}


def test_which_tensors_are_quantized(method: Method, tiny: Tiny) -> None:
    def names(**options: Any) -> set[str]:
        return set(attach(replace(method, **options), tiny[0](), tiny[1]).names)

    own = dict(tiny[0]().named_parameters())
    matrices = {name for name, p in own.items() if p.dim() > 1}
    if quantized := names(min_size=0.0):
        assert quantized == matrices
        assert names(min_size=0.0, include=["*"]) == own.keys()
        assert names(min_size=0.0, include=["out.*"]) == matrices | {name for name in own if name.startswith("out.")}
        assert names(include=["*"]) == {name for name, p in own.items() if p.numel() > 100}
        some = names(exclude=["*weight*", "out.*"], include=["*"], min_size=0.0)
        assert some == {name for name in own if "weight" not in name and not name.startswith("out.")}


def test_bfloat16_weights(method: Method, tiny: Tiny, tmp_path: Path) -> None:
    network, x = tiny
    x = x.bfloat16() if x.is_floating_point() else x
    model = attach(method, network().bfloat16(), x)
    assert model.train()(x).dtype == torch.bfloat16
    expected = model.eval()(x)
    model.save(tmp_path / "a", {})
    fresh = network().bfloat16().eval()
    Artifact.load(tmp_path / "a").load_into(fresh)
    assert torch.equal(fresh(x), expected)


def test_a_network_with_nothing_to_quantize_is_float(method: Method, tiny: Tiny) -> None:
    network, x = tiny
    model = attach(replace(method, min_size=1.0), network(), x).eval()
    assert torch.equal(model(x), model.network(x))
    assert model.megabytes().item() == sum(p.numel() * 4 for p in model.network.parameters()) / MB


def test_checkpointing_networks_are_refused() -> None:
    from bitfront.errors import BitfrontError

    network = TiedGPT()
    network.grad_checkpointing = True
    with pytest.raises(BitfrontError, match="checkpointing"):
        QuantizedModel(network, {})
