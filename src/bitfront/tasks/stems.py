"""Separation of songs of the user's own into their stems."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import nn

from bitfront.data import folders
from bitfront.data.audio import Form, Song, tones
from bitfront.data.stems import stems
from bitfront.models import named
from bitfront.ranges import Ranges
from bitfront.tasks.notes import say
from bitfront.tasks.separation import NETWORKS, Separator

GENERATED = Form(["drums", "bass", "vocals"], 4000, 1)


@dataclass(kw_only=True)
class OwnStems(Separator):
    """A network of the demucs package, or any that is called as they are, on a folder of songs.

    A function that makes a network may take ``sources``, a list of their names, ``samplerate`` and ``channels``.

    Attributes:
        data: the folder, as ``folders.find`` finds it and ``stems`` reads it; "generated" for tones.
        fingerprint: of the files; part of a run's identity.
        samplerate, audio_channels: that songs are brought to; 0 for those of the first.
        network: "demucs", "hdemucs", "htdemucs" or <package.module>:<function>.
    """

    data: str
    fingerprint: str | None
    samplerate: int
    audio_channels: int
    ranges: ClassVar[Ranges] = {"samplerate": "0..", "audio_channels": "0.."}

    def __post_init__(self) -> None:
        made = ":" in self.network and not self.network.startswith(named.FOLDER)
        named.check(self.network, [] if made else [*NETWORKS, named.MADE])
        super().__post_init__()

    @cached_property
    def found(self) -> tuple[dict[str, list[Song]], Form]:
        """The songs of each split, and their form."""
        if self.data == "generated":
            kind = GENERATED.sources, GENERATED.samplerate, GENERATED.channels, 2 * self.segment
            return {split: tones(split, *kind) for split in folders.SPLITS}, GENERATED
        folder = folders.find(self.data, self.data_root)
        memory = folders.memory(self.data_root, folder, "stems")
        songs, form, notes = stems(folder, memory, self.samplerate, self.audio_channels)
        for note in notes:
            say(f"{self.data}: {note}")
        return songs, form

    @property
    def form(self) -> Form:
        return self.found[1]

    def songs(self) -> dict[str, list[Song]]:
        return self.found[0]

    def model(self) -> nn.Module:
        self.check_length()
        if self.network in NETWORKS:
            return super().model()
        form = self.form
        given = {"sources": form.sources, "samplerate": form.samplerate, "channels": form.channels}
        network = named.build(self.network, given=given)
        mixture, shape = torch.zeros(1, form.channels, self.length), (1, len(form.sources), form.channels, self.length)
        named.check_outputs(network, self.network, mixture, shape, f"the songs have {', '.join(form.sources)}")
        return network
