"""ImageNet (ILSVRC 2012) from its folders: image files that are decoded as they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitfront.data.images import opened
from bitfront.errors import BitfrontError

SOURCE = "image-net.org/download, after signing in"
ARCHIVES = ("ILSVRC2012_devkit_t12.tar.gz", "meta.bin")


@dataclass
class Photos:
    """Labelled image files.

    Attributes:
        files: path and class of each.
        view: makes a tensor ``[channels, height, width]`` of an image.
        mixing: of a batch of images and their labels makes mixtures and ``[batch, classes]`` shares; or None.
        upright: as of ``images.opened``.
    """

    files: list[tuple[str, int]]
    view: Callable[[Any], Tensor]
    mixing: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    upright: bool = False

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A batch: ``[batch, channels, height, width]``, and labels ``[batch]``, or shares if they are mixed.

        Raises:
            BitfrontError: an image cannot be read.
        """
        x = torch.stack([self.view(opened(self.files[i][0], self.upright)) for i in indices])
        y = torch.tensor([self.files[i][1] for i in indices])
        if self.mixing is None:
            return x, y
        if len(indices) % 2:  # images are mixed in pairs: the last one with itself
            x, y = torch.cat([x, x[-1:]]), torch.cat([y, y[-1:]])
        mixed, shares = self.mixing(x, y)
        return mixed[: len(indices)], shares[: len(indices)]


def view(
    size: int, training: bool, mean: Sequence[float], std: Sequence[float], **options: Any
) -> Callable[[Any], Tensor]:
    """What makes a normalized tensor ``[3, size, size]`` of an image: in training of a part of it, at random, and
    mirrored or not; else of its middle.

    Args:
        size: in pixels.
        training: whether it is for training.
        mean, std: of the channels in 0..1.
        options: of timm's ``create_transform``.
    """
    from timm.data import create_transform

    return create_transform(size, is_training=training, color_jitter=0.0, mean=tuple(mean), std=tuple(std), **options)


def photos(
    root: Path,
    split: str,
    classes: int,
    held_out: int,
    view: Callable[[Any], Tensor],
    mixing: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
    whole: bool = True,
) -> Photos:
    """A split of ImageNet: "test" is the official validation set, "valid" a fixed part of the training images.

    Args:
        root: holds ``train/<class>/*`` and ``val/<class>/*``, or the official archives with the development kit,
            which torchvision then unpacks once.
        split: "train", "valid" or "test".
        classes: how many there must be.
        held_out: training images that validate.
        view, mixing: as in ``Photos``.
        whole: val has all classes of train; else some of them, which keep their numbers.

    Raises:
        BitfrontError: a folder is missing, has other classes, or has no image.
    """
    folders = _folders(root)
    train, val = (folders[part].classes for part in ("train", "val"))
    if len(train) != classes or (train != val if whole else not set(val) <= set(train)):
        needed = (
            f"the same {classes} classes in train and val" if whole else f"{classes} classes in train, no more in val"
        )
        raise BitfrontError(f"'{root}' needs {needed}, and has {[len(train), len(val)]}")
    part = "val" if split == "test" else "train"
    numbers = [train.index(name) for name in folders[part].classes]
    files = [(path, numbers[label]) for path, label in folders[part].samples]
    if split != "test":
        if held_out >= len(files):
            raise BitfrontError(f"task.held_out={held_out} leaves no image of {len(files)} to train on")
        validation = set(np.random.default_rng(0).permutation(len(files))[:held_out].tolist())
        files = [file for i, file in enumerate(files) if (i in validation) == (split == "valid")]
    return Photos(files, view, mixing)


def _folders(root: Path) -> dict[str, Any]:
    """Both parts, so that a missing test split is noticed before the training."""
    from torchvision import datasets

    official = any((root / name).exists() for name in ARCHIVES)
    try:
        return {
            part: datasets.ImageNet(str(root), part) if official else datasets.ImageFolder(str(root / part))
            for part in ("train", "val")
        }
    except (OSError, RuntimeError) as error:
        raise BitfrontError(
            f"no ImageNet in '{root}' ({str(error).splitlines()[0]}): expected {root}/train/<class>/*.JPEG and "
            f"{root}/val/<class>/*.JPEG, or the archives ILSVRC2012_{{devkit_t12.tar.gz,img_train.tar,img_val.tar}}; "
            f"they come from {SOURCE}; data_root=<folder> gives the parent of '{root.name}'"
        ) from None
