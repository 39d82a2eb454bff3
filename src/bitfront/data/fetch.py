"""Public data sets, downloaded into the folders that the tasks read, where torchvision or torchaudio know them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitfront.errors import BitfrontError


def fetch(name: str, root: Path, subset: str) -> Path:
    """Download a set and bring it into its layout.

    Args:
        name: one of ``SETS``.
        root: of the data sets.
        subset: of LibriSpeech.

    Returns:
        Its folder.

    Raises:
        BitfrontError: there is no such subset, no network, no room, or the download is damaged.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        return SETS[name](root, subset)
    except (OSError, RuntimeError, ValueError) as error:
        raise BitfrontError(
            f"could not fetch {name} ({type(error).__name__}: {error}); it needs a network and room in '{root}'; or "
            "copy the set there from a machine that has it"
        ) from None


def cifar(name: str) -> Callable[[Path, str], Path]:
    """CIFAR-10 or -100 as class folders of PNG files, lossless."""

    def get(root: Path, subset: str) -> Path:
        from torchvision import datasets

        def write(temporary: str) -> None:
            kind: Any = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
            for part in ("train", "test"):
                images = kind(temporary, train=part == "train", download=True)
                numbers = dict.fromkeys(images.classes, 0)
                for label in images.classes:
                    (Path(temporary) / name / part / label).mkdir(parents=True)
                for image, target in images:
                    label = images.classes[target]
                    image.save(Path(temporary) / name / part / label / f"{numbers[label]:04}.png")
                    numbers[label] += 1

        return moved(root, name, write)

    return get


def moved(root: Path, name: str, write: Callable[[str], Any]) -> Path:
    """The folder ``root/name``, if it is not there from what ``write`` leaves below a temporary folder."""
    folder = root / name
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as temporary:
            write(temporary)
            folder.parent.mkdir(exist_ok=True)
            os.replace(Path(temporary) / name, folder)
    return folder


def librispeech(root: Path, subset: str) -> Path:
    """A subset of LibriSpeech, ``LibriSpeech/<subset>/<speaker>/<chapter>/*.flac``."""
    from torchaudio.datasets import LIBRISPEECH

    return moved(root, f"LibriSpeech/{subset}", lambda temporary: LIBRISPEECH(temporary, url=subset, download=True))


def musdb18hq(root: Path, subset: str) -> Path:
    """MUSDB18-HQ, ``musdb18hq/{train,test}/<song>/*.wav``."""
    from torchaudio.datasets import MUSDB_HQ

    def write(temporary: str) -> None:
        for part in ("train", "test"):
            MUSDB_HQ(temporary, part, download=True)

    return moved(root, "musdb18hq", write)


SETS: dict[str, Callable[[Path, str], Path]] = {
    "cifar10": cifar("cifar10"),
    "cifar100": cifar("cifar100"),
    "librispeech": librispeech,
    "musdb18hq": musdb18hq,
}
