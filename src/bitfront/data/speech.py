"""Utterances as padded batches of features, and their transcripts as labels; tones that spell, for smoke runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from bitfront.errors import BitfrontError

LABELS = "-|etaonihsrdlumwcfgypbvk'xjqz"  # of wav2vec 2.0: the blank, the space, the letters
STRIDE = 4  # batches are padded to a multiple of it, so that a share of the frames is that share of a quarter of them
TONES = 96  # utterances of a smoke run

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


class Source(Protocol):
    """Where utterances come from."""

    @property
    def lengths(self) -> Sequence[int] | None:
        """Of each, in samples; None if they are not known before they are drawn."""
        ...

    def __len__(self) -> int: ...
    def utterance(self, index: int) -> tuple[Tensor, str]:
        """Samples in -1..1, ``[time]``, and the transcript."""
        ...


class Writing(Protocol):
    """How transcripts become labels."""

    def encode(self, text: str) -> Tensor:
        """Labels of a transcript, ``[n]``."""
        ...


@dataclass(frozen=True)
class Alphabet:
    """The labels of characters.

    Attributes:
        labels: the blank, then the characters.
        space: that of them which parts words.
    """

    labels: str = LABELS
    space: str = "|"

    @property
    def written(self) -> int:
        """How many of the labels, the first ones, may be recognised."""
        return len(self.labels)

    def encode(self, text: str) -> Tensor:
        """Labels of a transcript.

        Raises:
            BitfrontError: it is empty, or has characters that are no labels.
        """
        text = text.lower().replace(" ", self.space)
        if not text or not set(text) <= set(self.labels[1:]):
            raise BitfrontError(f"the transcript '{text}' is empty or has other characters than letters, ' and spaces")
        return torch.tensor([self.labels.index(c) for c in text])

    def decode(self, labels: Sequence[int]) -> str:
        """The words that labels spell; blanks are left out."""
        return " ".join("".join(self.labels[i] for i in labels if i).replace(self.space, " ").split())


ENGLISH = Alphabet()
encode, decode = ENGLISH.encode, ENGLISH.decode


@dataclass
class Utterances:
    """A split.

    Attributes:
        source: of the utterances.
        features: from samples ``[time]`` to what the network gets, ``[frames, ...]``.
        augment: of the features, or None.
        alphabet: gives the labels of a transcript.
    """

    source: Source
    features: Callable[[Tensor], Tensor]
    augment: Callable[[Tensor], Tensor] | None = None
    alphabet: Writing = ENGLISH

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: list[int]) -> Batch:
        """A batch: features ``[batch, frames, ...]``, their lengths ``[batch]``, labels ``[batch, n]``, their
        lengths."""
        drawn = [self.source.utterance(i) for i in indices]
        features = [self.features(samples) for samples, _ in drawn]
        if self.augment is not None:
            features = [self.augment(x) for x in features]
        labels = [self.alphabet.encode(text) for _, text in drawn]
        padded = nn.utils.rnn.pad_sequence(features, batch_first=True)
        ragged = [0, 0] * (padded.dim() - 2) + [0, -padded.shape[1] % STRIDE]
        return (
            nn.functional.pad(padded, ragged),
            torch.tensor([len(x) for x in features]),
            nn.utils.rnn.pad_sequence(labels, batch_first=True),
            torch.tensor([len(y) for y in labels]),
        )


@dataclass
class InMemory:
    """Recordings as int16, and their transcripts."""

    waves: list[Tensor]
    texts: list[str]

    @property
    def lengths(self) -> Sequence[int]:
        return [len(wave) for wave in self.waves]

    def __len__(self) -> int:
        return len(self.waves)

    def utterance(self, index: int) -> tuple[Tensor, str]:
        return self.waves[index].float() / 32768, self.texts[index]


class LogMel(nn.Module):
    """Logarithmic mel spectrogram ``[frames, mels]``, a frame of 25 ms every 10 ms, each band of an utterance at mean
    0 and variance 1.

    Args:
        rate: samples per second.
        mels: bands.
    """

    def __init__(self, rate: int, mels: int) -> None:
        super().__init__()
        from torchaudio.transforms import MelSpectrogram

        window = rate // 40
        fft = 1 << (window - 1).bit_length()
        self.mel = MelSpectrogram(rate, n_fft=fft, win_length=window, hop_length=rate // 100, n_mels=mels)

    @torch.no_grad()
    def forward(self, samples: Tensor) -> Tensor:
        x = (self.mel(samples).T + 1e-6).log()
        return (x - x.mean(0)) / (x.std(0, correction=0) + 1e-3)


@dataclass
class SpecAugment:
    """Masks of bands and frames (arXiv 1904.08779, 1912.05533), as many for every utterance, at its mean.

    Attributes:
        bands, band_width: masks, and the most bands of each.
        spans, span_share: masks, and the largest share of the frames of each.
    """

    bands: int
    band_width: int
    spans: int
    span_share: float

    def __call__(self, x: Tensor) -> Tensor:
        from torchaudio.functional import mask_along_axis

        for _ in range(self.bands):
            x = mask_along_axis(x, self.band_width, 0.0, axis=1)
        for _ in range(self.spans):
            x = mask_along_axis(x, len(x), 0.0, axis=0, p=self.span_share)
        return x


def tones(split: str, rate: int) -> InMemory:
    """Noisy tones, one per letter, that spell short words: for smoke runs, nothing to download."""
    rng = np.random.default_rng({"train": 1, "valid": 2, "test": 3}[split])
    spoken = rate // 8  # samples of a letter
    waves, texts = [], []
    for _ in range(TONES):
        words = ["".join(rng.choice(list("eta"), rng.integers(1, 4))) for _ in range(rng.integers(1, 3))]
        texts.append(" ".join(words))
        pitches = [0.0 if c == " " else 400.0 * (1 + LABELS.index(c)) for c in texts[-1]]
        wave = np.sin(2 * np.pi * np.repeat(pitches, spoken) * np.arange(len(pitches) * spoken) / rate)
        wave = wave * np.tile(np.hanning(spoken), len(pitches)) + rng.normal(0, 0.01, len(wave))
        waves.append(torch.from_numpy((wave * 16384).round().astype(np.int16)))
    return InMemory(waves, texts)
