"""Image classification."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from bitfront.data.imagenet import Photos, photos, view
from bitfront.data.images import Images, class_folders, digits, generated
from bitfront.errors import BitfrontError
from bitfront.models import named
from bitfront.models.images import NETWORKS
from bitfront.ranges import Ranges
from bitfront.tasks.core import Task


@dataclass(kw_only=True)
class Classifier(Task):
    """One class for each image.

    Attributes:
        label_smoothing: of the training loss.
    """

    primary: ClassVar[tuple[str, bool]] = ("top1", True)
    percent: ClassVar[tuple[str, ...]] = ("top1", "top5")

    label_smoothing: float
    ranges: ClassVar[Ranges] = {"label_smoothing": "[0, 1)"}

    def outputs(self) -> int:
        """The number of classes."""
        raise NotImplementedError

    def normalized(self, x: Tensor) -> Tensor:
        """Pixels in 0..1, moved around zero with about unit variance on natural images."""
        return (x - 0.45) / 0.3

    def loss(self, net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        y = batch[1]
        smoothing = 0.0 if y.is_floating_point() else self.label_smoothing  # mixed labels are smooth already
        return nn.functional.cross_entropy(self.answers(net, batch), y, label_smoothing=smoothing)

    def answers(self, net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits: Tensor = named.logits(net(self.normalized(batch[0])))
        return logits

    def metrics(self, **options: Any) -> MetricCollection:
        classes = self.outputs()
        return MetricCollection(
            {
                "top1": MulticlassAccuracy(classes, top_k=1, average="micro", **options),
                "top5": MulticlassAccuracy(classes, top_k=min(5, classes), average="micro", **options),
                "loss": MeanMetric(**options),
            },
            compute_groups=False,
        )

    def update(self, metrics: MetricCollection, net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        logits = named.logits(net(self.normalized(x)))
        metrics["top1"].update(logits, y)
        metrics["top5"].update(logits, y)
        metrics["loss"].update(nn.functional.cross_entropy(logits, y), weight=len(y))


@dataclass(kw_only=True)
class Classification(Classifier):
    """Of the public data sets.

    Attributes:
        data: "digits" (bundled with scikit-learn), "generated" (patterns of noise), or a folder of ``data_root`` with
            ``{train,test}/<class>/*``.
        classes, channels, image_size: of the data.
        crop: augmentation of folders: shift by up to ``crop`` pixels and mirror; 0 for none.
    """

    data: str
    classes: int
    channels: int
    image_size: int
    crop: int
    ranges: ClassVar[Ranges] = {"classes": "2..", "channels": "1..", "image_size": "1..", "crop": "0.."}

    def outputs(self) -> int:
        return self.classes

    def dataset(self, split: str) -> Any:
        if self.data == "generated":
            return generated(split, self.classes, self.channels, self.image_size)
        folder = Path(self.data_root) / self.data
        images = digits(split) if self.data == "digits" else class_folders(folder, split, self.classes, self.crop)
        classes, form = 1 + int(images.labels.max()), tuple(images.pixels.shape[1:])
        if classes > self.classes or form != (self.channels, self.image_size, self.image_size):
            raise BitfrontError(
                f"data={self.data} has {classes} classes and images of {' x '.join(map(str, form))}; got "
                f"task.classes={self.classes} task.channels={self.channels} task.image_size={self.image_size}"
            )
        return images

    def undisturbed(self, dataset: Any) -> Any:
        return replace(dataset, crop=0) if isinstance(dataset, Images) else dataset


@dataclass(kw_only=True)
class Vision(Classification):
    """A vision transformer of any size on small images.

    Attributes:
        patch_size, dim, depth, heads, drop_path: of the transformer.
    """

    patch_size: int
    dim: int
    depth: int
    heads: int
    drop_path: float
    ranges: ClassVar[Ranges] = {
        "patch_size": "1..",
        "dim": "1..",
        "depth": "1..",
        "heads": "1..",
        "drop_path": "[0, 1)",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim % self.heads or self.image_size % self.patch_size:
            raise BitfrontError("task.heads must divide task.dim, and task.patch_size task.image_size")

    def model(self) -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(
            img_size=self.image_size,
            patch_size=self.patch_size,
            in_chans=self.channels,
            num_classes=self.classes,
            embed_dim=self.dim,
            depth=self.depth,
            num_heads=self.heads,
            drop_path_rate=self.drop_path,
            class_token=False,
            global_pool="avg",
            weight_init="jax",  # Xavier; timm's default of 0.02 hardly trains at these widths
        )


@dataclass(kw_only=True)
class KnownNetwork(Classification):
    """A network from the literature, by its name.

    Attributes:
        network: a name in ``models/images.py``.
        mean, std: of the pixels in 0..1, one value for all channels or one for each.
    """

    network: str
    mean: list[float]
    std: list[float]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_network()
        if self.network == "vit" and self.image_size != 32:
            raise BitfrontError("model=vit is for images of 32 x 32, as of task=resnet_cifar10")

    def check_network(self) -> None:
        """Refuse a network that there is not."""
        named.check(self.network, list(NETWORKS))

    def model(self) -> nn.Module:
        return NETWORKS[self.network](self.channels, self.classes)

    def normalized(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=x.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return ((x - mean) / std).contiguous(memory_format=torch.channels_last)  # in which convolutions are fastest


@dataclass(kw_only=True)
class ImageNet(KnownNetwork):
    """A network on ImageNet, ``timm.<name>`` or ``torchvision.<name>``.

    Attributes:
        pretrained: start from the weights that the library publishes.
        drop_path, dropout: of timm's networks.
        crop_share: of the shorter side, in evaluation.
        interpolation: with which images are scaled.
        augment: timm's policy, as "rand-m9-mstd0.5-inc1"; "" for random crop and mirror alone.
        erase: probability of erasing a part of the image.
        mixup, cutmix: strength; 0 for none.
        held_out: training images that validate.
    """

    whole: ClassVar[bool] = True  # all classes are among the test images

    drop_path: float
    dropout: float
    crop_share: float
    interpolation: str
    augment: str
    erase: float
    mixup: float
    cutmix: float
    held_out: int
    ranges: ClassVar[Ranges] = {
        "drop_path": "[0, 1)",
        "dropout": "[0, 1)",
        "crop_share": "(0, 1]",
        "interpolation": ("bilinear", "bicubic", "nearest"),
        "erase": "[0, 1]",
        "mixup": "[0, inf)",
        "cutmix": "[0, inf)",
        "held_out": "1..",
    }

    def check_network(self) -> None:
        if self.data != "generated" or self.network not in NETWORKS:  # others than the library's of that name
            named.check(self.network)

    def model(self) -> nn.Module:
        return super().model() if self.network in NETWORKS else self._built(False)

    def initial(self) -> nn.Module:
        return self._built(True) if self.pretrained else self.model()

    def _built(self, pretrained: bool) -> nn.Module:
        rates: dict[str, Any] = {"drop_path_rate": self.drop_path, "drop_rate": self.dropout}
        return named.build(self.network, self.classes, pretrained=pretrained, **rates)

    def dataset(self, split: str) -> Any:
        if self.data == "generated":
            return super().dataset(split)
        root = Path(self.data_root) / self.data
        seen = self._view(split == "train"), self._mixing(split)
        return photos(root, split, self.classes, self.held_out, *seen, self.whole)

    def undisturbed(self, dataset: Any) -> Any:
        return replace(dataset, view=self._view(False), mixing=None) if isinstance(dataset, Photos) else dataset

    def normalized(self, x: Tensor) -> Tensor:
        # Photos are normalized as they are loaded, before a part of them is erased.
        loaded = self.data != "generated"
        return x.contiguous(memory_format=torch.channels_last) if loaded else super().normalized(x)

    def decays(self, p: nn.Parameter) -> bool:
        return p.dim() > 1 and len(p) > 1  # neither do positions and class tokens, [1, ...] (DeiT)

    def _view(self, training: bool) -> Callable[[Any], Tensor]:
        policy: dict[str, Any] = {"auto_augment": self.augment or None, "re_prob": self.erase, "re_mode": "pixel"}
        scaled: dict[str, Any] = {"interpolation": self.interpolation, "crop_pct": self.crop_share}
        return view(self.image_size, training, self.mean, self.std, **policy, **scaled)

    def _mixing(self, split: str) -> Any:
        from timm.data import Mixup

        if split != "train" or not (self.mixup or self.cutmix):
            return None
        return Mixup(self.mixup, self.cutmix, label_smoothing=self.label_smoothing, num_classes=self.classes)


@dataclass(kw_only=True)
class PartOfImageNet(ImageNet):
    """A few of its images, to calibrate and to measure on."""

    whole: ClassVar[bool] = False
