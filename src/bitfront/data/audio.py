"""Songs with their stems, in the layout of MUSDB18-HQ: ``<root>/{train,test}/<song>/{mixture,<source>...}.wav``."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bitfront.data.recordings import finite
from bitfront.data.repitch import repitch
from bitfront.errors import BitfrontError
from bitfront.shipped import module

MIXTURE = "mixture"
ORIGINS = {
    "musdb18hq": f"zenodo.org/records/3338373, or by `{module('fetch')} musdb18hq`",
    "mir1k": "MIR-1K (C.-L. Hsu and J.-S. R. Jang), brought into this layout",
}
REMIXED = 4  # samples between which sources are swapped
MAX_PITCH, MAX_TEMPO, TEMPO_STD = 2, 12, 5  # semitones, percent, percent: of a change of pitch and tempo


@dataclass(frozen=True)
class Form:
    """What all songs of a data set have: names of their sources, samples per second, channels."""

    sources: list[str]
    samplerate: int
    channels: int


@dataclass
class Song:
    """A song on disk.

    Attributes:
        folder: with one file for the mixture and each source.
        length: in samples.
    """

    folder: Path
    length: int

    def read(self, names: Sequence[str], start: int = 0, length: int = -1) -> Tensor:
        """Part of the files, floats in -1..1, ``[names, channels, length]``; -1 for all that follows.

        Raises:
            BitfrontError: a file cannot be decoded, or ends before its header says.
        """
        import soundfile

        parts = []
        for path in (self.folder / f"{name}.wav" for name in names):
            try:
                samples, _ = soundfile.read(path, length, start, dtype="float32", always_2d=True)
                samples = finite(samples, path, "unpack it again")
            except (OSError, soundfile.SoundFileError) as error:
                raise BitfrontError(f"could not read '{path}' ({error}); unpack it again") from None
            if len(samples) != (self.length - start if length < 0 else length):
                raise BitfrontError(f"'{path}' ends early, at sample {start + len(samples)}; unpack it again")
            parts.append(torch.from_numpy(samples.T))
        return torch.stack(parts)


@dataclass
class Held(Song):
    """A song in memory, ``wav [sources, channels, length]``, whose mixture is the sum: for smoke runs."""

    wav: dict[str, Tensor] = field(default_factory=dict)

    def read(self, names: Sequence[str], start: int = 0, length: int = -1) -> Tensor:
        mixture = torch.stack(list(self.wav.values())).sum(0)
        whole = torch.stack([(self.wav | {MIXTURE: mixture})[name] for name in names])
        return whole[..., start:] if length < 0 else whole[..., start : start + length]


def songs(
    root: Path, sources: Sequence[str], valid: Sequence[str], samplerate: int, channels: int
) -> dict[str, list[Song]]:
    """The songs of the splits, in the order of their names; the headers of all files are checked.

    Args:
        root: folder of the data set.
        sources: the files beside the mixture.
        valid: songs of the training folder that are for validation; none if there is a folder for them.
        samplerate, channels: that the files must have.

    Raises:
        BitfrontError: a folder or file is missing, damaged, or not as expected.
    """
    found: dict[str, list[Song]] = {}
    for split in ("train", "test") if valid else ("train", "valid", "test"):
        folders = sorted(p for p in (root / split).glob("*") if p.is_dir() and not p.name.startswith("."))
        if not folders:
            files = ",".join([MIXTURE, *sources])
            origin = f", from {ORIGINS[root.name]}," if root.name in ORIGINS else ""
            raise BitfrontError(
                f"no songs in '{root / split}': expected {root / split}/<song>/{{{files}}}.wav; unpack the data "
                f"set{origin} there or give its parent folder with data_root=<folder>"
            )
        found[split] = [check(folder, [MIXTURE, *sources], samplerate, channels) for folder in folders]
    if valid:
        missing = sorted(set(valid) - {song.folder.name for song in found["train"]})
        if missing:
            raise BitfrontError(
                f"'{root / 'train'}' lacks {len(missing)} of the {len(valid)} songs that are for validation, as "
                f"'{missing[0]}'; unpack the whole data set"
            )
        found["valid"] = [song for song in found["train"] if song.folder.name in valid]
        found["train"] = [song for song in found["train"] if song.folder.name not in valid]
    return found


def check(folder: Path, names: Sequence[str], samplerate: int, channels: int) -> Song:
    """A song whose files agree with each other and with what is expected.

    Raises:
        BitfrontError: they do not.
    """
    import soundfile

    lengths = {}
    for path in (folder / f"{name}.wav" for name in names):
        if not path.is_file():
            raise BitfrontError(f"'{path}' is missing; unpack the data set again")
        try:
            info = soundfile.info(path)
        except soundfile.SoundFileError as error:
            raise BitfrontError(f"could not read '{path}' ({error}); unpack it again") from None
        if (info.samplerate, info.channels) != (samplerate, channels):
            raise BitfrontError(
                f"'{path}' has {info.samplerate} Hz and {info.channels} channels, expected {samplerate} and {channels}"
            )
        lengths[path.name] = info.frames
    if len(set(lengths.values())) > 1:
        raise BitfrontError(f"the files of '{folder}' differ in length: {lengths} samples; unpack it again")
    return Song(folder, lengths.popitem()[1])


@dataclass
class Whole:
    """Songs as they are; an item is the mixture and the sources of one, ``[1 + sources, channels, length]``."""

    songs: list[Song]
    sources: list[str]

    def __len__(self) -> int:
        return len(self.songs)

    def __getitem__(self, indices: list[int]) -> Tensor:
        (index,) = indices
        return self.songs[index].read([MIXTURE, *self.sources])


@dataclass
class Excerpts:
    """Excerpts of songs for training, ``[batch, sources, channels, length]``, with the augmentations of Demucs.

    Songs are normalized by mean and standard deviation of their mixture. The last excerpt ends with the song.

    Attributes:
        songs: to cut.
        sources: names of the stems.
        samplerate: in Hz.
        segment, stride: of the excerpts, in samples. They lose a stride by shifting sources by up to that; and before,
            where tempo changes, as much as the fastest tempo takes.
        repitch: probability of a change of pitch and tempo, of all sources alike.
        repeat: how often an epoch goes through the excerpts.
        disturbed: whether to augment: sources are shifted, flipped (channels and sign), scaled and swapped between the
            samples of a batch.
        levels: mean and standard deviation of each song's mixture, measured if not given.
    """

    songs: list[Song]
    sources: list[str]
    samplerate: int
    segment: int
    stride: int
    repitch: float
    repeat: int
    disturbed: bool = True
    levels: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        from demucs.augment import FlipChannels, FlipSign, Remix, Scale, Shift

        self.places: list[tuple[int, int]] = []  # song and start
        for n, song in enumerate(self.songs):
            last = song.length - self.segment
            if last < 0:
                raise BitfrontError(f"'{song.folder}' is shorter than an excerpt; lower task.segment")
            self.places += [(n, start) for start in [*range(0, last, self.stride), last]]
        self.levels = self.levels or [level(song.read([MIXTURE])[0]) for song in self.songs]
        self.fit = excerpt_length(self.segment, 0, self.repitch)
        self.augment = nn.Sequential(Shift(self.stride), FlipChannels(), FlipSign(), Scale()).train(self.disturbed)
        self.remix = Remix(group_size=REMIXED).train(self.disturbed)

    def __len__(self) -> int:
        return self.repeat * len(self.places)

    def __getitem__(self, indices: list[int]) -> Tensor:
        batch = self.augment(torch.stack([self.excerpt(i % len(self.places)) for i in indices]))
        whole = len(batch) // REMIXED * REMIXED
        return torch.cat([self.remix(batch[:whole]), batch[whole:]])

    def excerpt(self, index: int) -> Tensor:
        """One, normalized, ``[sources, channels, fit]``."""
        song, start = self.places[index]
        mean, std = self.levels[song]
        wav = (self.songs[song].read(self.sources, start, self.segment) - mean) / std
        if self.disturbed and random.random() < self.repitch:
            tempo = min(max(random.gauss(0, TEMPO_STD), -MAX_TEMPO), MAX_TEMPO)
            wav = repitch(wav, random.randint(-MAX_PITCH, MAX_PITCH), tempo, self.samplerate)
        return wav[..., : self.fit]


def excerpt_length(segment: int, stride: int, repitch: float) -> int:
    """What is left of a segment, all in samples, after changes of tempo and shifts."""
    return (int((1 - MAX_TEMPO / 100) * segment) if repitch else segment) - stride


def level(mixture: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of a mixture ``[channels, length]``, in mono."""
    mono = mixture.mean(0)
    return mono.mean().item(), max(mono.std().item(), 1e-5)


def tones(split: str, sources: list[str], samplerate: int, channels: int, seconds: float) -> list[Song]:
    """For smoke runs, songs of one tone per source, each in an octave of its own."""
    rng = np.random.default_rng({"train": 1, "valid": 2, "test": 3}[split])
    t = np.arange(int(seconds * samplerate)) / samplerate
    found: list[Song] = []
    for n in range(8 if split == "train" else 2):
        wav = {}
        for k, source in enumerate(sources):
            sides = rng.uniform(0.1, 0.3, (channels, 1))
            frequency = samplerate / 64 * 2**k * rng.uniform(1, 1.5)
            wav[source] = torch.from_numpy(sides * np.sin(2 * np.pi * frequency * t)).float()
        found.append(Held(Path(f"tones-{n}"), len(t), wav))
    return found
