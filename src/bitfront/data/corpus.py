"""A text in tokens, and the windows of it that a language model sees."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitfront.data.generated import kept

SPLITS = ("train", "valid", "test")


@dataclass
class Corpus:
    """A text in tokens.

    Attributes:
        streams: tokens of each split, int32 ``[n + 1]``; the first is an end of line that begins the text and is no
            part of it.
        sizes: UTF-8 bytes that a token stands for, int64 ``[vocabulary]``.
        words: of each split, how many words and ends of line there are in the text as it was published, which is what
            WikiText's perplexities are per.
    """

    streams: dict[str, Tensor]
    sizes: Tensor
    words: dict[str, int]

    def word_size(self, split: str) -> float:
        """Bytes per word of a split."""
        return self.sizes[self.streams[split][1:].long()].sum().item() / self.words[split]

    def unigram(self, split: str) -> float:
        """Bits per byte of the model that knows how frequent each token is in the training text, and nothing else; a
        token that is not there counts as seen once."""
        counts = torch.bincount(self.streams["train"][1:], minlength=len(self.sizes)).clamp(min=1).double()
        tokens = self.streams[split][1:].long()
        return float(-(counts / counts.sum()).log2()[tokens].sum() / self.sizes[tokens].sum())


@dataclass
class Windows:
    """Windows of a stream; together they predict each token once.

    Attributes:
        stream: tokens, int32 ``[n + 1]``.
        context: tokens in a window.
        overlap: how many of them were predicted in the window before, and are there for their sake as context.
        drawn: tokens an epoch, in windows at random places; 0 for all, in order.
    """

    stream: Tensor
    context: int
    overlap: int = 0
    drawn: int = 0

    def __post_init__(self) -> None:
        self.last = max(len(self.stream) - 1 - self.context, 0)  # where the last window starts

    def __len__(self) -> int:
        if self.drawn:
            return math.ceil(self.drawn / self.context)
        return 1 + math.ceil(self.last / (self.context - self.overlap))

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Tokens ``[batch, context + 1]``, and which of them but the first are predicted here, ``[batch, context]``."""
        steps = torch.arange(min(self.context, len(self.stream) - 1) + 1)
        if self.drawn:
            starts = torch.randint(self.last + 1, (len(indices),))
            seen = torch.zeros_like(starts)
        else:
            places = torch.as_tensor(indices) * (self.context - self.overlap)
            starts = places.clamp(max=self.last)
            before = (places - self.context + self.overlap).clamp(max=self.last) + self.context  # where that one ended
            seen = torch.where(places > 0, before - starts, 0)
        return self.stream[starts[:, None] + steps].long(), steps[:-1] >= seen[:, None]


def tokenized(root: Path, name: str, make: Callable[[], Corpus]) -> Corpus:
    """What ``make`` gives, kept in ``root/generated``.

    Raises:
        BitfrontError: the file was changed, or cannot be written.
    """

    def write(folder: Path) -> None:
        corpus = make()
        tensors = corpus.streams | {"sizes": corpus.sizes, "words": torch.tensor(list(corpus.words.values()))}
        save_file(tensors, folder / "corpus.safetensors")

    tensors = load_file(kept(root, name, write) / "corpus.safetensors")
    words = dict(zip(SPLITS, tensors["words"].tolist(), strict=True))
    return Corpus({split: tensors[split] for split in SPLITS}, tensors["sizes"], words)


def generated(vocabulary: int) -> Corpus:
    """A text in which two tokens can follow each token, one more often: for smoke runs, nothing to download."""
    followers = np.random.default_rng(0).integers(vocabulary, size=(vocabulary, 2))
    rng = np.random.default_rng(1)
    streams = {}
    for split, n in {"train": 2048, "valid": 512, "test": 512}.items():
        stream = [0]
        for rare in rng.random(n) < 0.2:
            stream.append(int(followers[stream[-1], int(rare)]))
        streams[split] = torch.tensor(stream, dtype=torch.int32)
    return Corpus(streams, torch.ones(vocabulary, dtype=torch.int64), dict.fromkeys(SPLITS, 512))
