"""Image classification."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from src.data.images import Images, class_folders, digits, generated
from src.errors import BitfrontError
from src.tasks.core import Task


@dataclass(kw_only=True)
class Vision(Task):
    """A timm vision transformer on small images.

    Attributes:
        data: "digits" (bundled with scikit-learn), or a folder of ``data_root`` with ``{train,test}/<class>/*``.
        classes, channels, image_size: of the data.
        patch_size, dim, depth, heads, drop_path: of the transformer.
        label_smoothing: of the training loss.
        crop: augmentation of folders: shift by up to ``crop`` pixels and mirror; 0 for none.
    """

    primary: ClassVar[tuple[str, bool]] = ("top1", True)
    percent: ClassVar[tuple[str, ...]] = ("top1", "top5")

    data: str
    classes: int
    channels: int
    image_size: int
    patch_size: int
    dim: int
    depth: int
    heads: int
    drop_path: float
    label_smoothing: float
    crop: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim % self.heads or self.image_size % self.patch_size:
            raise BitfrontError("task.heads must divide task.dim, and task.patch_size task.image_size")
        if self.smoke:
            self.dim, self.depth, self.heads = 32, 2, 2

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

    def dataset(self, split: str) -> Images:
        if self.smoke:
            return generated(split, self.classes, self.channels, self.image_size)
        if self.data == "digits":
            return digits(split)
        return class_folders(Path(self.data_root) / self.data, split, self.classes, self.crop)

    def undisturbed(self, dataset: Images) -> Images:
        return replace(dataset, crop=0)

    def loss(self, net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(net(normalized(x)), y, label_smoothing=self.label_smoothing)

    def metrics(self, **options: Any) -> MetricCollection:
        return MetricCollection(
            {
                "top1": MulticlassAccuracy(self.classes, top_k=1, average="micro", **options),
                "top5": MulticlassAccuracy(self.classes, top_k=min(5, self.classes), average="micro", **options),
                "loss": MeanMetric(**options),
            },
            compute_groups=False,
        )

    def update(self, metrics: MetricCollection, net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        logits = net(normalized(x))
        metrics["top1"].update(logits, y)
        metrics["top5"].update(logits, y)
        metrics["loss"].update(nn.functional.cross_entropy(logits, y), weight=len(y))


def normalized(x: Tensor) -> Tensor:
    """Pixels in 0..1, moved around zero with about unit variance on natural images."""
    return (x - 0.45) / 0.3
