"""Weights of any usual file, and networks by name."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import ConvNet, TiedGPT
from torch import nn
from torch.optim.swa_utils import AveragedModel

from bitfront.errors import BitfrontError
from bitfront.models import named
from bitfront.quant.core import Float
from bitfront.quant.storage.weights import load_weights


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def without_counts(network: nn.Module) -> dict[str, Any]:
    return {name: t for name, t in network.state_dict().items() if "num_batches" not in name}


CONTENTS: dict[str, Callable[[nn.Module], Any]] = {
    "state": lambda net: net.state_dict(),
    "checkpoint": lambda net: {"epoch": 3, "optimizer": {"lr": 1.0}, "model_state_dict": net.state_dict()},
    "deep": lambda net: {"model": {"state_dict": net.state_dict()}},
    "parallel": lambda net: {"state_dict": nn.DataParallel(net).state_dict()},
    "compiled": lambda net: {f"module._orig_mod.{name}": t for name, t in net.state_dict().items()},
    "average": lambda net: AveragedModel(net).state_dict(),
    "lightning": lambda net: {"state_dict": {f"model.{k}": t for k, t in net.state_dict().items()}, "epoch": 1},
    "counts": without_counts,
    "half": lambda net: {name: t.double() if t.is_floating_point() else t for name, t in net.state_dict().items()},
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_what_torch_saves(tmp_path: Path, kind: str) -> None:
    network, fresh = ConvNet(), ConvNet()
    network(torch.randn(4, 3, 8, 8))  # moves the batch norms
    torch.save(CONTENTS[kind](network), tmp_path / "mine.pth")
    load_weights(tmp_path / "mine.pth", fresh)
    if kind == "counts":
        assert all(torch.equal(t, fresh.state_dict()[name]) for name, t in without_counts(network).items())
    else:
        assert same(network, fresh)


def test_safetensors_and_our_artifact(tmp_path: Path) -> None:
    network, fresh = ConvNet(), ConvNet()
    safetensors.torch.save_file(network.state_dict(), tmp_path / "plain.safetensors")
    load_weights(tmp_path / "plain.safetensors", fresh)
    assert same(network, fresh)
    Float().attach(network).save(tmp_path / "ours.safetensors", {})
    fresh = ConvNet()
    load_weights(tmp_path / "ours.safetensors", fresh)
    assert same(network, fresh)


def test_a_header_of_any_length_is_safetensors(tmp_path: Path) -> None:
    """One of 128 bytes or the like begins as a pickle does."""
    network, begun = nn.Linear(2, 2), set()
    for n in range(64):
        safetensors.torch.save_file(network.state_dict(), tmp_path / "x.safetensors", {"note": "x" * 8 * n})
        begun.add((tmp_path / "x.safetensors").read_bytes()[0])
        fresh = nn.Linear(2, 2)
        load_weights(tmp_path / "x.safetensors", fresh)
        assert same(network, fresh)
    assert 0x80 in begun


def test_a_tied_weight_needs_one_of_its_names(tmp_path: Path) -> None:
    network = TiedGPT()
    for left_out in ("head.weight", "embedding.weight"):
        state = {name: t for name, t in network.state_dict().items() if name != left_out}
        torch.save(state, tmp_path / "mine.pt")
        fresh = TiedGPT()
        load_weights(tmp_path / "mine.pt", fresh)
        assert same(network, fresh) and fresh.head.weight is fresh.embedding.weight


def test_two_weights_of_a_file_are_not_loaded_into_one_that_is_tied(tmp_path: Path) -> None:
    state = TiedGPT().state_dict()
    torch.save(state | {"head.weight": state["head.weight"] + 1}, tmp_path / "x.pth")
    with pytest.raises(BitfrontError, match="ties"):
        load_weights(tmp_path / "x.pth", TiedGPT())


def test_where_only_the_number_of_classes_differs_that_is_said(tmp_path: Path) -> None:
    def network(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(4, inputs), nn.Linear(inputs, outputs))

    for theirs, told in (
        (network(8, 7), "of 7 classes, so give their data, or classes=7"),
        (network(9, 5), "must have"),
    ):
        torch.save(theirs.state_dict(), tmp_path / "x.pth")
        with pytest.raises(BitfrontError, match=told):
            load_weights(tmp_path / "x.pth", network(8, 5))


def test_what_does_not_fit_is_said_and_nothing_loaded(tmp_path: Path) -> None:
    file, network = tmp_path / "mine.pth", ConvNet()
    state = network.state_dict()
    before = {name: t.clone() for name, t in state.items()}
    first, *_, last = state
    others: list[tuple[Any, str]] = [
        ({"state_dict": {**state, first: torch.zeros(1)}}, r"'layers.0.weight' is \[1\], not \[8, 3, 3, 3\]"),
        ({name: t for name, t in state.items() if name != first}, "'layers.0.weight' is missing; it must"),
        ({**state, "more": torch.zeros(1)}, "'more' is not in the network"),
        ({f"x.{name}": t for name, t in state.items()}, r"'layers.0.bias' is missing; .*; and 21 more"),
        ({**state, first: torch.zeros(8, 3, 3, 3, dtype=torch.int8)}, "is torch.int8, not torch.float32"),
        ({**state, last: torch.zeros(7)}, "must have the same layers"),
        ({"epoch": 3}, "holds no state dict"),
        ({"model": argparse.Namespace(), "state_dict": state}, "more than tensors.*net.state_dict()"),
        (network, "more than tensors"),
    ]
    for content, answer in others:
        torch.save(content, file)
        with pytest.raises(BitfrontError, match=answer):
            load_weights(file, network)
    torch.save(state, file)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(BitfrontError):
        load_weights(file, network)
    with pytest.raises(BitfrontError, match="no file"):
        load_weights(tmp_path / "gone.pth", network)
    assert all(torch.equal(t, network.state_dict()[name]) for name, t in before.items())


@pytest.mark.parametrize("name", ["timm.test_resnet", "torchvision.shufflenet_v2_x0_5", "timm.test_vit"])
def test_networks_of_the_libraries_have_as_many_outputs_as_classes(name: str) -> None:
    x = torch.zeros(1, 3, 160, 160)
    assert named.build(name, 3).eval()(x).shape == (1, 3)
    assert named.build(name).eval()(x).shape == (1, 1000)


def test_a_function_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "from torch import nn\ndef net(classes=9):\n    return nn.Linear(2, classes)\nfixed = nn.ReLU"
    (tmp_path / "net_of_mine.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in sys.path if p])
    network = named.build("net_of_mine:net", 4)
    assert isinstance(network, nn.Linear) and network.out_features == 4
    assert isinstance(named.build("net_of_mine:fixed", 4), nn.ReLU)


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["ViTForImageClassification"]}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BitfrontError, match="pip install transformers"):
        named.build(f"hf:{tmp_path}", 4)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BitfrontError, match="names no architecture"):
        named.build(f"hf:{tmp_path}", 4)
