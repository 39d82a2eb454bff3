"""Whisper (arXiv 2212.04356), quantized after its training, on English of LibriSpeech."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.text import WordErrorRate

from bitfront.data import folders, recordings
from bitfront.data.speech import Batch, Source, Utterances, tones
from bitfront.data.texts import read
from bitfront.errors import BitfrontError
from bitfront.models import hf, named, whisper
from bitfront.tasks.embeddings import WideEmbeddings
from bitfront.tasks.notes import say

OURS = "whisper_tiny"


@dataclass(kw_only=True)
class Whisper(WideEmbeddings):
    """A Whisper that transformers has saved, on one of LibriSpeech's subsets, whose speakers are shared out.

    The text that it writes is compared twice: "wer" as Whisper's authors do, after their normalizer for English has
    written numbers, contractions and titles alike in both (British spellings only where the network's folder has their
    list as normalizer.json); "wer_plain" in capitals without punctuation, as LibriSpeech's transcripts are.

    Attributes:
        data: the subset's folder, as ``folders.find`` finds it; "generated" for tones.
        fingerprint: of the data and the network; part of a run's identity.
        network: ``hf:<folder>``, or "whisper_tiny", a fresh one that hears a second, for smoke runs.
        train_speakers, valid_speakers: to calibrate and train, and to validate on; all others are tested on.
    """

    primary: ClassVar[tuple[str, bool]] = ("wer", False)
    percent: ClassVar[tuple[str, ...]] = ("wer", "wer_plain")

    data: str
    fingerprint: str | None
    network: str
    train_speakers: list[int]
    valid_speakers: list[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pretrained = self.network.startswith(named.FOLDER)
        if not self.pretrained:
            named.check(self.network, [OURS, f"{named.FOLDER}<folder>"])

    @cached_property
    def name(self) -> str:
        """Of the network, with the place where it was found."""
        name = folders.network(self.network, self.data_root)
        if self.pretrained and hf.kind(name).__name__ != whisper.KIND:
            raise BitfrontError(f"model={name} is a {hf.kind(name).__name__}; this task needs a {whisper.KIND}")
        return name

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The network's config.json."""
        return hf.settings(self.name) if self.pretrained else whisper.tiny()[1]

    @cached_property
    def writing(self) -> whisper.Writing:
        """How it writes."""
        rules = hf.tokenizer(self.name) if self.pretrained else whisper.tiny()[0]
        told = hf.beside(self.name, "generation_config.json") if self.pretrained else {}
        return whisper.writing(self.name, read(rules, f"model={self.name}"), self.settings, told)

    @cached_property
    def features(self) -> whisper.Features:
        """What it hears."""
        return whisper.Features(self.settings)

    @cached_property
    def normalizer(self) -> Any:
        """That of Whisper's authors."""
        hf.library("task=asr_whisper")
        from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

        return EnglishTextNormalizer(hf.beside(self.name, "normalizer.json") if self.pretrained else {})

    def model(self) -> nn.Module:
        return named.build(self.name) if self.pretrained else whisper.fresh(self.settings)

    def initial(self) -> nn.Module:
        return named.build(self.name, pretrained=True) if self.pretrained else self.model()

    @cached_property
    def found(self) -> dict[str, recordings.Files]:
        """The utterances of each split."""
        folder = folders.find(self.data, self.data_root).absolute()
        cache = Path(self.data_root) / "generated" / folder.parent.name
        found = recordings.librispeech(folder.parent, [folder.name], whisper.RATE, cache)
        if longer := sum(n > self.features.samples for n in found.lengths):
            seconds = self.features.samples / whisper.RATE
            say(f"{self.data}: {longer} of {len(found)} utterances are longer than the {seconds:g} s that are heard")
        return recordings.by_speaker(found, {"train": self.train_speakers, "valid": self.valid_speakers})

    def source(self, split: str) -> Source:
        """The utterances of a split."""
        return tones(split, whisper.RATE) if self.data == "generated" else self.found[split]

    def dataset(self, split: str) -> Utterances:
        return Utterances(self.source(split), self.features, alphabet=self.writing)

    def lengths(self, dataset: Utterances) -> Any:
        return dataset.source.lengths  # a batch is decoded until its longest text ends

    def valid(self, batch: Batch) -> Tensor | None:
        """Of the decoder's inputs; the silence behind an utterance is what the encoder hears in use, too."""
        tokens, lengths = batch[2:]
        kept = torch.arange(tokens.shape[1] - 1, device=lengths.device) < lengths[:, None] - 1
        return None if kept.all() else kept

    def use(self, net: nn.Module, batch: Batch) -> Any:
        """Encoder and decoder at once; the decoder on prompt and transcript."""
        x, _, tokens, _ = batch
        return net(input_features=x.transpose(1, 2), decoder_input_ids=tokens[:, :-1], use_cache=False)

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        return self._losses(self.use(net, batch), batch).mean()

    def answers(self, net: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = self.use(net, batch).logits
        return logits[self._said(batch)]

    def _losses(self, output: Any, batch: Batch) -> Tensor:
        """Of each token of the transcripts and their ends, in nats."""
        said = self._said(batch)
        return nn.functional.cross_entropy(output.logits[said].float(), batch[2][:, 1:][said], reduction="none")

    def _said(self, batch: Batch) -> Tensor:
        """Which of the tokens but the first are of the transcripts and their ends, ``[batch, tokens - 1]``."""
        tokens, lengths = batch[2:]
        at = torch.arange(1, tokens.shape[1], device=tokens.device)
        return (at >= len(self.writing.prompt)) & (at < lengths[:, None])

    def metrics(self, **options: Any) -> MetricCollection:
        kinds: dict[str, Any] = {"wer": WordErrorRate, "wer_plain": WordErrorRate, "loss": MeanMetric}
        return MetricCollection({name: kind(**options) for name, kind in kinds.items()}, compute_groups=False)

    def update(self, metrics: MetricCollection, net: nn.Module, batch: Batch) -> None:
        output, tokens = self.use(net, batch), batch[2]
        losses = self._losses(output, batch)
        metrics["loss"].update(losses.mean(), weight=len(losses))
        written = whisper.greedy(net, output.encoder_last_hidden_state, self.writing)
        heard = [self.writing.decode(row) for row in written]
        said = [self.writing.decode(row[:n]) for row, n in zip(tokens.tolist(), batch[3].tolist(), strict=True)]
        for name, form in (("wer", self.normalizer), ("wer_plain", plain)):
            metrics[name].update([form(text) for text in heard], [form(text) for text in said])


def plain(text: str) -> str:
    """In capitals, without punctuation but apostrophes, and without accents."""
    from transformers.models.whisper.english_normalizer import remove_symbols_and_diacritics

    spoken = remove_symbols_and_diacritics(text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"), keep="'")
    return " ".join(spoken.upper().split())
