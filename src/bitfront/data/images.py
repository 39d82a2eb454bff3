"""Images in memory: scikit-learn's bundled digits, class folders of image files, and generated ones for smoke runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitfront.data.source import KINDS
from bitfront.errors import BitfrontError
from bitfront.shipped import module

SUFFIXES = frozenset(KINDS["images"])
VALID_SHARE, TEST_SHARE = 0.1, 0.2  # of the digits; of a training folder, VALID_SHARE


@dataclass
class Images:
    """Labelled images in memory.

    Attributes:
        pixels: uint8 ``[n, channels, height, width]``.
        labels: int64 ``[n]``.
        crop: shift each image by up to this many pixels, and mirror half of them; 0 leaves them as they are.
    """

    pixels: Tensor
    labels: Tensor
    crop: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A batch: floats in 0..1 ``[batch, channels, height, width]`` and labels ``[batch]``."""
        chosen = torch.as_tensor(indices)
        x = self.pixels[chosen].float() / 255
        return (shift_and_mirror(x, self.crop) if self.crop else x), self.labels[chosen]

    def subset(self, indices: np.ndarray) -> Images:
        """Some of the images."""
        chosen = torch.from_numpy(indices)
        return Images(self.pixels[chosen], self.labels[chosen], self.crop)


def shift_and_mirror(x: Tensor, crop: int) -> Tensor:
    """Pad each image ``[batch, channels, height, width]`` with zeros, cut it out at a random place, mirror half."""
    n, _, height, width = x.shape
    padded = torch.nn.functional.pad(x, (crop, crop, crop, crop))
    rows = torch.randint(2 * crop + 1, (n, 1)) + torch.arange(height)
    columns = torch.randint(2 * crop + 1, (n, 1)) + torch.arange(width)
    columns = torch.where(torch.rand(n, 1) < 0.5, columns, columns.flip(1))
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def digits(split: str) -> Images:
    """scikit-learn's 1,797 scans of handwritten digits (8 x 8, 17 grey levels), split once and for all by class."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    pixels = torch.from_numpy((data.images * (255 / 16)).round().astype(np.uint8))[:, None]
    labels = torch.from_numpy(data.target.astype(np.int64))
    rest, test = train_test_split(np.arange(len(labels)), test_size=TEST_SHARE, stratify=data.target, random_state=0)
    train, valid = train_test_split(
        rest, test_size=VALID_SHARE / (1 - TEST_SHARE), stratify=data.target[rest], random_state=0
    )
    return Images(pixels, labels).subset({"train": train, "valid": valid, "test": test}[split])


def class_folders(root: Path, split: str, classes: int, crop: int) -> Images:
    """Small images of one size in ``root/{train,test}/<class>/*``; a tenth of train, fixed, is the validation split.

    Raises:
        BitfrontError: a folder is missing or has not the expected classes, or the images cannot be read or differ in
            size.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.functional import pil_to_tensor

    try:  # both folders, so that a missing test split is noticed before the training
        folders = {part: ImageFolder(str(root / part), transform=pil_to_tensor) for part in ("train", "test")}
    except FileNotFoundError:
        raise BitfrontError(
            f"no images in '{root}': expected {root}/train/<class>/<image> and {root}/test/<class>/<image>; "
            f"unpack the data set there (`{module('fetch')}` has CIFAR), or give its parent folder with "
            "data_root=<folder>"
        ) from None
    names = folders["train"].classes
    if names != folders["test"].classes or len(names) != classes:
        raise BitfrontError(f"'{root}' needs the same {classes} class folders in train and test; train has {names}")
    files = folders["test" if split == "test" else "train"]
    labels = torch.tensor(files.targets)
    chosen = np.arange(len(files))
    if split != "test":
        validation = np.random.default_rng(0).permutation(len(files))[: int(VALID_SHARE * len(files))]
        chosen = np.sort(validation) if split == "valid" else np.setdiff1d(chosen, validation)
    try:
        pixels = torch.stack([files[i][0] for i in chosen])
    except (OSError, RuntimeError, SyntaxError, ValueError) as error:
        raise BitfrontError(f"could not read the images of '{root}': {error}") from None
    return Images(pixels, labels[torch.from_numpy(chosen)], crop if split == "train" else 0)


def opened(path: str | Path, upright: bool = False) -> Any:
    """An image file in RGB, 8 bits a channel.

    Args:
        path: of the file.
        upright: turned as its EXIF data say. Networks that learned from ImageNet saw its images as they are stored.

    Raises:
        BitfrontError: it cannot be read, is larger than Pillow allows, or has no range of values that is known.
    """
    try:
        return _rgb(path, upright, draft=False)
    except Exception as error:  # of what is broken, Pillow's readers raise anything
        raise BitfrontError(f"could not read '{path}': {error}; copy the file again, or take it out") from None


def fault(path: Path) -> str:
    """Why an image file cannot be read to its end; "" if it can."""
    try:
        _rgb(path, upright=True, draft=True)
    except Exception as error:  # likewise
        return str(error) or type(error).__name__
    return ""


def _rgb(path: str | Path, upright: bool, draft: bool) -> Any:
    """As a draft, all of the file is read, but, of a JPEG, only a small image computed."""
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        if draft:
            image.draft("RGB", (1, 1))
        if upright:
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16"):  # which Pillow would cut off at 255
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            raise ValueError("it has 32 bits a pixel; save it with 8 or 16")
        return image.convert("RGB")


def generated(split: str, classes: int, channels: int, size: int) -> Images:
    """Noisy copies of one random pattern per class: for smoke runs, nothing to download."""
    patterns = np.random.default_rng(0).integers(0, 256, (classes, channels, size, size))
    rng = np.random.default_rng({"train": 1, "valid": 2, "test": 3}[split])
    labels = rng.permutation(np.arange(128) % classes)
    noisy = patterns[labels] + rng.normal(0, 40, (128, channels, size, size))
    return Images(torch.from_numpy(noisy.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels))
