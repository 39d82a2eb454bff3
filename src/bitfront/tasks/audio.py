"""Speech recognition on audio files of the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bitfront.data import folders
from bitfront.data.own import few
from bitfront.data.speech import STRIDE, Source, tones
from bitfront.data.transcribed import Learned, Transcribed, learned, needed, transcribed
from bitfront.models import named
from bitfront.tasks.notes import say
from bitfront.tasks.speech import Recogniser

OURS = "conformer"
FRAMES = 100  # of the features, per second
TRIED = 160  # frames of the inputs that a network is tried on


@dataclass(kw_only=True)
class OwnSpeech(Recogniser):
    """A Conformer, or any network that is called as it is, on a folder of audio files with transcripts.

    A function that makes a network may take how many features and labels there are as ``mels`` and ``labels``.

    Attributes:
        data: the folder, as ``folders.find`` finds it and ``transcribed`` reads it; "generated" for tones.
        fingerprint: of the files; part of a run's identity.
        network: "conformer" (``ConformerCTC``), or <package.module>:<function>.
        lower: whether capitals are written small.
    """

    data: str
    fingerprint: str | None
    lower: bool

    def __post_init__(self) -> None:
        made = ":" in self.network and not self.network.startswith(named.FOLDER)
        named.check(self.network, [] if made else [OURS, named.MADE])
        super().__post_init__()

    @cached_property
    def found(self) -> dict[str, Transcribed]:
        """The utterances of each split."""
        folder = folders.find(self.data, self.data_root)
        memory = folders.memory(self.data_root, folder, "audio")
        found, notes = transcribed(folder, memory, self.rate, self.lower)
        pairs = [(path, s.lengths[i], s.texts[i]) for s in found.values() for i, path in enumerate(s.paths)]
        step = STRIDE if self.network == OURS else 1  # of another network's frames, none may be left out
        brief = [path for path, length, text in pairs if -(-length * FRAMES // self.rate // step) < needed(text)]
        fault = f"utterances have fewer frames ({1000 * step // FRAMES} ms each) than their text needs"
        notes += few([f"'{path}'" for path in brief], len(pairs), fault, "they teach nothing, but are tested")
        known = learned(found["train"].texts).labels
        if unknown := sorted({c for s in found.values() for text in s.texts for c in text} - set(known)):
            notes.append(f"characters that only valid and test have count as errors: {' '.join(unknown)}")
        for note in notes:
            say(f"{self.data}: {note}")
        return found

    @cached_property
    def alphabet(self) -> Learned:
        """Of the training transcripts."""
        return learned(tones("train", self.rate).texts if self.data == "generated" else self.found["train"].texts)

    def source(self, split: str) -> Source:
        return tones(split, self.rate) if self.data == "generated" else self.found[split]

    def model(self) -> nn.Module:
        if self.network == OURS:
            return super().model()
        labels = len(self.alphabet.labels)
        network = named.build(self.network, given={"mels": self.mels, "labels": labels})
        remedy = f"it is given features and their lengths, and returns logits of {labels} labels and their lengths"
        tried = torch.zeros(2, TRIED, self.mels)
        named.check_outputs(_First(network), self.network, tried, (2, labels), remedy)
        return network


class _First(nn.Module):
    """What a network says of the first frame of features ``[batch, time, mels]``, ``[batch, labels]``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        logits, frames = self.network(x, torch.full((len(x),), x.shape[1]))
        if frames.shape != (len(x),) or int(frames.max()) > logits.shape[1]:
            raise ValueError(f"lengths {frames.tolist()} of logits {list(logits.shape)}")
        return logits[:, 0]
