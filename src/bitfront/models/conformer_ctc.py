"""A Conformer encoder (arXiv 2005.08100) with a linear layer for CTC, whose results do not depend on padding.

Differs from the paper: no relative positions in the attention (as in torchaudio's Conformer, the convolutions tell the
order), and CTC instead of a transducer. Differs from torchaudio's layers: padding is kept out of the convolutions and
out of the statistics of the batch norm, where it would make results depend on what else is in the batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class ConformerCTC(nn.Module):
    """Features to logits, a quarter of the frames.

    Args:
        inputs: features per frame.
        outputs: labels, the blank first. It begins as likely as all others together: where they begin alike, some seeds
            learn to spell without it, and stay far worse.
        channels: of the convolutions that subsample.
        dim, depth, heads, kernel: of the Conformer layers; their feed-forward layers have ``4 * dim`` units.
        dropout: in each module of the layers.
    """

    def __init__(
        self, inputs: int, outputs: int, channels: int, dim: int, depth: int, heads: int, kernel: int, dropout: float
    ) -> None:
        super().__init__()
        self.subsampling = Subsampling(inputs, channels, dim, dropout)
        self.layers = nn.ModuleList(ConformerLayer(dim, heads, kernel, dropout) for _ in range(depth))
        self.head = nn.Linear(dim, outputs)
        with torch.no_grad():
            self.head.bias.zero_()[0] = math.log(outputs - 1)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[batch, ceil(time / 4), outputs]`` and their lengths, from ``x`` ``[batch, time, inputs]``."""
        x, lengths = self.subsampling(x, lengths)
        padding = behind(lengths, x.shape[1])
        for layer in self.layers:
            x = layer(x, padding)
        return self.head(x), lengths


class Subsampling(nn.Module):
    """Two convolutions with stride 2 over time and frequency, and a projection."""

    def __init__(self, inputs: int, channels: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, channels, 3, stride=2, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.project = nn.Linear(channels * -(-inputs // 4), dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        x = x.transpose(1, 2)[:, None]  # [batch, 1, inputs, time]
        for convolution in (self.first, self.second):
            x = x.masked_fill(behind(lengths, x.shape[-1])[:, None, None], 0.0)
            x, lengths = convolution(x).relu(), (lengths + 1) // 2
        return self.dropout(self.project(x.flatten(1, 2).transpose(1, 2))), lengths


class ConformerLayer(nn.Module):
    """Half a feed-forward step, attention, convolution, half a feed-forward step."""

    def __init__(self, dim: int, heads: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.ffn1 = _feed_forward(dim, dropout)
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.convolution = Convolution(dim, kernel, dropout)
        self.ffn2 = _feed_forward(dim, dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """Same shape as ``x`` ``[batch, time, dim]``; ``padding`` ``[batch, time]`` is true where there is nothing."""
        x = x + 0.5 * self.ffn1(x)
        normed = self.attention_norm(x)
        x = x + self.dropout(self.attention(normed, normed, normed, padding, need_weights=False)[0])
        x = x + self.convolution(x, padding)
        x = x + 0.5 * self.ffn2(x)
        return self.norm(x)


class Convolution(nn.Module):
    """Gated pointwise, depthwise over time, batch norm, pointwise."""

    def __init__(self, dim: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 2 * dim)
        self.depthwise = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.batch_norm = nn.BatchNorm1d(dim)
        self.project = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = nn.functional.glu(self.expand(self.norm(x))).masked_fill(padding[..., None], 0.0)
        x = self.depthwise(x.transpose(1, 2)).transpose(1, 2)
        if torch.compiler.is_exporting():  # where a selection's size is not known; in evaluation it is the same
            normed = self.batch_norm(x.transpose(1, 2)).transpose(1, 2)
            return self.project(nn.functional.silu(normed).masked_fill(padding[..., None], 0.0))
        frames = nn.functional.silu(self.batch_norm(x[~padding]))  # [frames of all samples, dim]
        x = torch.zeros_like(x).masked_scatter(~padding[..., None], frames.to(x.dtype))
        return self.dropout(self.project(x))


def behind(lengths: Tensor, time: int) -> Tensor:
    """Which of so many frames are padding, ``[batch, time]``."""
    return torch.arange(time, device=lengths.device) >= lengths[:, None]


def _feed_forward(dim: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, 4 * dim),
        nn.SiLU(),
        nn.Dropout(dropout),
        nn.Linear(4 * dim, dim),
        nn.Dropout(dropout),
    )
