"""Speech recognition: characters by CTC (Graves et al., 2006)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.text import CharErrorRate, WordErrorRate

from bitfront.data import espeak, recordings
from bitfront.data.speech import ENGLISH, Alphabet, Batch, InMemory, LogMel, Source, SpecAugment, Utterances, tones
from bitfront.errors import BitfrontError
from bitfront.ranges import Ranges
from bitfront.tasks.core import Task

CHOICES = {
    "data": ("espeak", "fsdd", "LibriSpeech", "tones"),
    "network": ("conformer", "wav2vec2", "wav2vec2_tiny"),
}


@dataclass(kw_only=True)
class Recogniser(Task):
    """A network that spells what is said, trained by CTC.

    It maps features ``[batch, time, mels]`` (wav2vec 2.0: samples, ``[batch, time]``) and their lengths ``[batch]`` to
    logits ``[batch, frames, labels]``, the blank first, and how many frames count, ``[batch]``.

    Attributes:
        rate: samples per second.
        network: its name.
        mels, channels, dim, depth, heads, kernel, dropout: of the Conformer, as in ``ConformerCTC``.
        bands, band_width, spans, span_share: masks of SpecAugment while training.
        beam: hypotheses of a beam search, whose metrics then are beside those of greedy decoding; 0 for none.
        lexicon, lm: files for it, a line "word w o r d |" each, and a KenLM model; null for none.
        lm_weight, word_score: what it adds per logarithmic probability of the lm, and per word.
    """

    primary: ClassVar[tuple[str, bool]] = ("wer", False)
    percent: ClassVar[tuple[str, ...]] = ("wer", "cer", "wer_beam", "cer_beam")

    rate: int
    network: str
    mels: int
    channels: int
    dim: int
    depth: int
    heads: int
    kernel: int
    dropout: float
    bands: int
    band_width: int
    spans: int
    span_share: float
    beam: int
    lexicon: str | None
    lm: str | None
    lm_weight: float
    word_score: float
    ranges: ClassVar[Ranges] = {
        "rate": "1..",
        "mels": "1..",
        "channels": "1..",
        "dim": "1..",
        "depth": "1..",
        "heads": "1..",
        "kernel": "1..",
        "dropout": "[0, 1)",
        "bands": "0..",
        "band_width": "0..",
        "spans": "0..",
        "span_share": "[0, 1]",
        "beam": "0..",
        "lm_weight": "(-inf, inf)",
        "word_score": "(-inf, inf)",
    }
    _sources: dict[str, Source] = field(default_factory=dict, init=False, repr=False)
    _decoder: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 1 or self.dim % self.heads or self.kernel % 2 == 0:
            raise BitfrontError("task.heads must divide task.dim, and task.kernel be odd")
        if self.beam < 0:
            raise BitfrontError(f"task.beam is not negative, got {self.beam}")
        for name in ("lexicon", "lm"):
            path = getattr(self, name)
            if path and not (self.beam and Path(path).is_file()):
                raise BitfrontError(f"task.{name} is a file for the beam search (task.beam=n), got '{path}'")
        if self.beam:
            self._decoder = self._beam_search()

    @property
    def alphabet(self) -> Alphabet:
        """What is written."""
        return ENGLISH

    @property
    def on_samples(self) -> bool:
        """Whether the network hears samples, not features, and each utterance by itself."""
        return False

    def model(self) -> nn.Module:
        from bitfront.models.conformer_ctc import ConformerCTC

        sizes = self.channels, self.dim, self.depth, self.heads, self.kernel, self.dropout
        return ConformerCTC(self.mels, len(self.alphabet.labels), *sizes)

    def source(self, split: str) -> Source:
        """The utterances of a split."""
        raise NotImplementedError

    def dataset(self, split: str) -> Utterances:
        for name in ("test", "valid", "train") if split == "train" else (split,):  # so that what is missing is noticed
            if name not in self._sources:
                self._sources[name] = self.source(name)
        features: Any = nn.Identity() if self.on_samples else LogMel(self.rate, self.mels)
        masks = SpecAugment(self.bands, self.band_width, self.spans, self.span_share)
        augment = masks if split == "train" and not self.on_samples else None
        return Utterances(self._sources[split], features, augment, self.alphabet)

    def undisturbed(self, dataset: Utterances) -> Utterances:
        return replace(dataset, augment=None)

    def lengths(self, dataset: Utterances) -> Sequence[int] | None:
        return dataset.source.lengths

    def valid(self, batch: Batch) -> Tensor | None:
        if self.on_samples:  # which sees each utterance without padding
            return None
        return batch[1].double() / batch[0].shape[1]

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        return self._forward(net, batch)[0]

    def answers(self, net: nn.Module, batch: Batch) -> Tensor:
        """Logits ``[n, labels]`` of the frames that are no padding."""
        logits, frames = net(*batch[:2])
        at = torch.arange(logits.shape[1], device=logits.device)
        return logits[at < frames[:, None]]

    def _forward(self, net: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, logarithmic probabilities ``[batch, frames, labels]`` and how many frames count."""
        x, lengths, labels, label_lengths = batch
        logits, frames = net(x, lengths)
        scores = logits.float().log_softmax(-1)
        # an utterance with fewer frames than labels costs nothing, instead of infinitely much
        loss = nn.functional.ctc_loss(scores.transpose(0, 1), labels, frames, label_lengths, zero_infinity=True)
        return loss, scores, frames

    def metrics(self, **options: Any) -> MetricCollection:
        kinds: dict[str, Any] = {"wer": WordErrorRate, "cer": CharErrorRate}
        if self.beam:
            kinds |= {f"{name}_beam": kind for name, kind in kinds.items()}
        kinds["loss"] = MeanMetric
        return MetricCollection({name: kind(**options) for name, kind in kinds.items()}, compute_groups=False)

    def update(self, metrics: MetricCollection, net: nn.Module, batch: Batch) -> None:
        loss, scores, frames = self._forward(net, batch)
        metrics["loss"].update(loss, weight=len(frames))
        said = [self.alphabet.decode(row[:n]) for row, n in zip(batch[2].tolist(), batch[3].tolist(), strict=True)]
        heard = greedy(scores, frames, self.alphabet)
        metrics["wer"].update(heard, said)
        metrics["cer"].update(heard, said)
        if self.beam:
            searched = self._search(scores, frames)
            metrics["wer_beam"].update(searched, said)
            metrics["cer_beam"].update(searched, said)

    def _search(self, scores: Tensor, frames: Tensor) -> list[str]:
        found = self._decoder(scores.cpu().contiguous(), frames.cpu())
        if self.lexicon:
            return [" ".join(best[0].words) if best else "" for best in found]
        return [self.alphabet.decode(best[0].tokens.tolist()) if best else "" for best in found]

    def _beam_search(self) -> Any:
        tokens = ["|" if label == self.alphabet.space else label for label in self.alphabet.labels]
        try:
            from torchaudio.models.decoder import ctc_decoder

            return ctc_decoder(
                lexicon=self.lexicon,
                tokens=tokens,
                lm=self.lm,
                beam_size=self.beam,
                lm_weight=self.lm_weight,
                word_score=self.word_score,
                log_add=True,
                blank_token=tokens[0],
                sil_token="|",
            )
        except ImportError:
            raise BitfrontError(
                "the beam search needs flashlight-text; which has packages for Python before 3.13 only; run "
                "`make setup PYTHON=python3.12`, or leave task.beam at 0"
            ) from None
        except (RuntimeError, ValueError, LookupError) as error:
            raise BitfrontError(f"task.lexicon={self.lexicon} and task.lm={self.lm} do not fit: {error}") from None


@dataclass(kw_only=True)
class Speech(Recogniser):
    """A Conformer, or wav2vec 2.0, on English of the public data sets.

    Attributes:
        data: "espeak" (synthesised and kept in ``data_root/generated``), "tones" (one for each letter), or a folder of
            ``data_root``: "fsdd", "LibriSpeech".
        train_subsets, valid_subsets, test_subsets: of LibriSpeech.
        network: "conformer" on log-mel features, or "wav2vec2" (base) or "wav2vec2_tiny" on samples.
        pretrained: wav2vec 2.0 as torchaudio publishes it, fine-tuned on LibriSpeech's 960 hours.
    """

    data: str
    train_subsets: list[str] = field(default_factory=list)
    valid_subsets: list[str] = field(default_factory=list)
    test_subsets: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise BitfrontError(f"there is no task.{name}={getattr(self, name)}; choices: {', '.join(choices)}")
        super().__post_init__()
        if self.pretrained and (self.network, self.rate) != ("wav2vec2", 16000):
            raise BitfrontError("task.pretrained=true is for task.network=wav2vec2 and task.rate=16000")
        if self.data == "LibriSpeech" and not (self.train_subsets and self.valid_subsets and self.test_subsets):
            raise BitfrontError("LibriSpeech needs its subsets, which task=asr_librispeech names")

    @property
    def on_samples(self) -> bool:
        return self.network.startswith("wav2vec2")

    def model(self) -> nn.Module:
        if not self.on_samples:
            return super().model()
        from bitfront.models.wav2vec2 import SIZES, Wav2Vec2CTC

        return Wav2Vec2CTC(SIZES[self.network], len(self.alphabet.labels))

    def initial(self) -> nn.Module:
        network = self.model()
        if self.pretrained:
            from bitfront.models.wav2vec2 import published

            network.load_state_dict(published())
        return network

    def source(self, split: str) -> Source:
        root = Path(self.data_root)
        if self.data == "tones":
            return tones(split, self.rate)
        if self.data == "LibriSpeech":
            subsets = getattr(self, f"{split}_subsets")
            return recordings.librispeech(root / self.data, subsets, self.rate, root / "generated" / self.data)
        if self.rate != espeak.RATE:
            raise BitfrontError(f"this speech has {espeak.RATE} samples per second, got task.rate={self.rate}")
        return recordings.fsdd(root / self.data, split) if self.data == "fsdd" else InMemory(*espeak.load(root, split))


def greedy(scores: Tensor, frames: Tensor, alphabet: Alphabet = ENGLISH) -> list[str]:
    """The words of each utterance's best labels, repetitions and blanks left out.

    Args:
        scores: ``[batch, frames, labels]``.
        frames: how many count, ``[batch]``.
        alphabet: of the labels.
    """
    best = scores[..., : alphabet.written].argmax(-1).cpu()
    rows = zip(best, frames.tolist(), strict=True)
    return [alphabet.decode(row[:n].unique_consecutive().tolist()) for row, n in rows]
