"""Public data sets, downloaded into the folders that the tasks read, where torchvision or torchaudio know them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitfront.downloads import moved


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
