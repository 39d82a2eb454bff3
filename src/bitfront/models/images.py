"""The networks that the DiffQ paper (arXiv 2104.09987) trains on small images; no stem shrinks them.

ResNet-20 and ResNet-18: arXiv 1512.03385; MobileNet: arXiv 1704.04861; Wide ResNet: arXiv 1605.07146; ViT: arXiv
2010.11929. All take ``[batch, channels, height, width]`` and give ``[batch, classes]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn.functional import pad, relu


class Residual(nn.Module):
    """Two 3 x 3 convolutions around which the input goes unchanged where its shape allows.

    Args:
        channels: of the input.
        width: of the output.
        stride: of the first convolution.
        projected: where the shape changes, project the input (the paper's option B); else subsample it and pad its
            channels with zeros (option A).
    """

    def __init__(self, channels: int, width: int, stride: int, projected: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.more = stride, width - channels
        self.shortcut: nn.Module = nn.Identity()
        if projected and (stride > 1 or self.more):
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.padded = not projected and (stride > 1 or self.more > 0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        if self.padded:
            x = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network for small images.

    Args:
        channels, classes: of the data.
        widths: of the stages; each but the first halves the image.
        depth: blocks in a stage.
        projected: as in ``Residual``.
    """

    def __init__(self, channels: int, classes: int, widths: Sequence[int], depth: int, projected: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        pairs = zip([widths[0], *widths], widths, strict=False)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    *(Residual(width if i else before, width, 2 if n and not i else 1, projected) for i in range(depth))
                )
                for n, (before, width) in enumerate(pairs)
            )
        )
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(relu(self.bn(self.conv(x)))).mean((2, 3)))


def resnet20(channels: int, classes: int) -> nn.Module:
    """ResNet-20 with shortcuts free of parameters, 0.27 M."""
    network = ResNet(channels, classes, (16, 32, 64), 3, projected=False)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
    return network


def resnet8(channels: int, classes: int) -> nn.Module:
    """A residual network for smoke runs, 20 k."""
    return ResNet(channels, classes, (16, 32), 1, projected=True)


def resnet18(channels: int, classes: int) -> nn.Module:
    """ResNet-18 with a 3 x 3 stem, 11.2 M."""
    return ResNet(channels, classes, (64, 128, 256, 512), 2, projected=True)


class Separable(nn.Sequential):
    """A depthwise convolution, then a pointwise one."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )


class MobileNet(nn.Module):
    """MobileNet v1 whose stem keeps the size of the image, 3.2 M. Arguments as in ``ResNet``."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)
        )
        widths = [64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]
        strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]
        self.layers = nn.Sequential(*map(Separable, [32, *widths[:-1]], widths, strides))
        self.head = nn.Linear(1024, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x)).mean((2, 3)))


class Preactivated(nn.Module):
    """Of a wide residual network: norm and activation come before each convolution, dropout between the two."""

    def __init__(self, channels: int, width: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1)
        self.dropout = nn.Dropout(dropout)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1)
        self.shortcut = nn.Conv2d(channels, width, 1, stride) if stride > 1 or channels != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.conv1(relu(self.bn1(x))))
        return self.conv2(relu(self.bn2(y))) + self.shortcut(x)


class WideResNet(nn.Module):
    """WRN-28-10 with biases, 36.5 M. Arguments as in ``ResNet``."""

    def __init__(self, channels: int, classes: int, depth: int = 28, factor: int = 10, dropout: float = 0.3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 16, 3, 1, 1)
        blocks: list[nn.Module] = []
        before = 16
        for width, stride in ((16 * factor, 1), (32 * factor, 2), (64 * factor, 2)):
            for i in range((depth - 4) // 6):
                blocks.append(Preactivated(before, width, 1 if i else stride, dropout))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(before, momentum=0.9)
        self.head = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(relu(self.bn(self.blocks(self.conv(x)))).mean((2, 3)))


def vit(channels: int, classes: int) -> nn.Module:
    """The DiffQ paper's vision transformer, images of 32 x 32 in patches of 4, a hidden layer at the end, 9.8 M."""
    from timm.models.vision_transformer import VisionTransformer

    network = VisionTransformer(
        img_size=32, patch_size=4, in_chans=channels, num_classes=0, embed_dim=512, depth=6, num_heads=8, mlp_ratio=1,
        qkv_bias=False, pos_drop_rate=0.1, proj_drop_rate=0.1,
    )  # fmt: skip
    head = nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.Dropout(0.1), nn.Linear(512, classes))
    network.add_module("head", head)
    return network


NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet8": resnet8,
    "resnet20": resnet20,
    "resnet18": resnet18,
    "mobilenet": MobileNet,
    "wrn28_10": WideResNet,
    "vit": vit,
}
