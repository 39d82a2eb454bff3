"""Images of the user's own, in class folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bitfront.data import folders
from bitfront.data.checked import faults
from bitfront.data.imagenet import Photos, view
from bitfront.data.images import SUFFIXES, fault, generated
from bitfront.data.own import few
from bitfront.errors import BitfrontError
from bitfront.models import named
from bitfront.models.images import NETWORKS
from bitfront.ranges import Ranges
from bitfront.tasks.notes import say
from bitfront.tasks.vision import Classifier

GENERATED = 10  # classes, of data=generated


@dataclass(kw_only=True)
class OwnImages(Classifier):
    """Any network on images of any size in ``<class>/*`` or ``{train,valid,test}/<class>/*``.

    Attributes:
        data: the folder, as ``folders.find`` finds it; "generated" for patterns of noise.
        fingerprint: of the files; part of a run's identity.
        network: a name in ``models/images.py``, or as ``models.named.build`` takes it; one in a folder is pretrained.
        image_size: to which the shorter side is scaled; the middle is what the network sees.
        mean, std: of the channels in 0..1.
        interpolation: with which images are scaled.
        crop_share: of the shorter side, in evaluation.
        scale: smallest share of an image that training cuts out, at random.
        mirror: half of the images, in training.
    """

    data: str
    fingerprint: str | None
    network: str
    image_size: int
    mean: list[float]
    std: list[float]
    interpolation: str
    crop_share: float
    scale: float
    mirror: bool
    ranges: ClassVar[Ranges] = {
        "image_size": "1..",
        "interpolation": ("bilinear", "bicubic", "nearest"),
        "crop_share": "(0, 1]",
        "scale": "(0, 1]",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pretrained = self.network.startswith(named.FOLDER)
        if not self.pretrained:
            named.check(self.network, [] if ":" in self.network else [*NETWORKS, *named.libraries()])
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise BitfrontError(f"task.mean={self.mean} and task.std={self.std} have three numbers each, std positive")

    @cached_property
    def found(self) -> tuple[list[str], dict[str, list[tuple[Path, int]]]]:
        """The classes, and the files of each split with the numbers of their classes."""
        folder = folders.find(self.data, self.data_root)
        memory = folders.memory(self.data_root, folder, "images")
        classes, files = folders.labelled(folder, SUFFIXES, memory)
        paths = [path for part in files.values() for path, _ in part]
        bad = faults(paths, fault, folder, memory)
        for note in few([*bad.values()], len(paths), "images cannot be read"):
            say(f"{self.data}: {note}")
        return classes, {split: [file for file in part if file[0] not in bad] for split, part in files.items()}

    def outputs(self) -> int:
        return GENERATED if self.data == "generated" else len(self.found[0])

    def model(self) -> nn.Module:
        return self._built(False)

    def initial(self) -> nn.Module:
        return self._built(self.pretrained)

    def _built(self, pretrained: bool) -> nn.Module:
        classes = self.outputs()
        if self.network in NETWORKS:
            network = NETWORKS[self.network](3, classes)
        else:
            size = {"image_size": self.image_size}
            name = folders.network(self.network, self.data_root)
            network = named.build(name, classes, pretrained=pretrained, given=size)
        x = torch.zeros(1, 3, self.image_size, self.image_size)
        remedy = f"the data have {classes} classes, and task.image_size= sets the size of their images"
        named.check_outputs(network, self.network, x, (1, classes), remedy)
        return network

    def dataset(self, split: str) -> Any:
        if self.data == "generated":
            return generated(split, GENERATED, 3, self.image_size)
        files = [(str(path), label) for path, label in self.found[1][split]]
        return Photos(files, self._view(split == "train"), upright=True)

    def undisturbed(self, dataset: Any) -> Any:
        return replace(dataset, view=self._view(False)) if isinstance(dataset, Photos) else dataset

    def normalized(self, x: Tensor) -> Tensor:
        # Files are normalized as they are loaded.
        return super().normalized(x) if self.data == "generated" else x.contiguous(memory_format=torch.channels_last)

    def _view(self, training: bool) -> Callable[[Any], Tensor]:
        options: dict[str, Any] = {"interpolation": self.interpolation, "crop_pct": self.crop_share}
        if training:
            options |= {"scale": (self.scale, 1.0), "hflip": 0.5 if self.mirror else 0.0}
        return view(self.image_size, training, self.mean, self.std, **options)
