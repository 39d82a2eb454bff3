"""Downloading data sets, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchaudio
import torchvision
from conftest import cli
from PIL import Image

from bitfront.data.fetch import fetch
from bitfront.data.images import class_folders
from bitfront.errors import BitfrontError


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


def test_unknown_sets_and_options_are_refused() -> None:
    for words, answer in (
        (("imagenet",), "choices: cifar10, cifar100, librispeech"),
        (("cifar10", "folder=x"), "unknown option"),
    ):
        result = cli("fetch", *words)
        assert result.returncode == 1 and answer in result.stderr
    assert "librispeech" in cli("fetch").stdout
