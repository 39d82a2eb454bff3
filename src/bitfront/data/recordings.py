"""Recorded speech: strings of spoken digits, and LibriSpeech."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitfront.data.speech import InMemory, Source, encode
from bitfront.errors import BitfrontError
from bitfront.files import write_atomically
from bitfront.shipped import module

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PARTS = {"test": range(5), "valid": range(5, 10), "train": range(10, 50)}  # recordings of each digit and speaker
STRINGS = {"train": 2000, "valid": 200, "test": 300}  # per epoch
DIGIT_RATE = 8000
LIBRISPEECH = f"openslr.org/12, or by `{module('fetch')} librispeech`"


def decoded(path: Path, remedy: str) -> tuple[np.ndarray, int]:
    """An audio file, floats ``[samples, channels]``, and its rate in Hz.

    Args:
        path: of the file.
        remedy: for messages.

    Raises:
        BitfrontError: it cannot be read, or holds NaN or infinity.
    """
    import soundfile

    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, soundfile.LibsndfileError) as error:
        raise BitfrontError(f"could not read '{path}' ({error}); {remedy}") from None
    return finite(samples, path, remedy), rate


def finite(samples: np.ndarray, path: Path, remedy: str) -> np.ndarray:
    """Samples of a file, as they are.

    Raises:
        BitfrontError: they hold NaN or infinity, as files of floats may.
    """
    if not np.isfinite(samples).all():
        raise BitfrontError(f"'{path}' holds NaN or infinity; {remedy}")
    return samples


def read(path: Path, rate: int) -> Tensor:
    """Samples of an audio file with one channel, float ``[time]``.

    Raises:
        BitfrontError: it cannot be read, or is of another kind.
    """
    samples, found = decoded(path, "unpack the data set again")
    if found != rate or samples.shape[1] != 1 or not len(samples):
        raise BitfrontError(f"'{path}' has shape {samples.shape} at {found} Hz; expected one channel at {rate} Hz")
    return torch.from_numpy(samples[:, 0])


@dataclass
class DigitStrings:
    """Strings of 3 to 7 digits by one speaker with random pauses, drawn anew each time.

    Attributes:
        speakers: of each, recordings by digit.
        n: strings of an epoch.
    """

    speakers: list[list[list[Tensor]]]
    n: int
    lengths: None = None

    def __len__(self) -> int:
        return self.n

    def utterance(self, index: int) -> tuple[Tensor, str]:
        return self.draw(np.random.default_rng(int(torch.randint(1 << 62, (1,)))))

    def draw(self, rng: np.random.Generator) -> tuple[Tensor, str]:
        """Samples in -1..1, and the digits' names."""
        recordings = self.speakers[rng.integers(len(self.speakers))]
        digits = rng.integers(10, size=rng.integers(3, 8))
        pauses = [torch.zeros(n) for n in rng.integers(DIGIT_RATE // 20, DIGIT_RATE // 4, len(digits) + 1).tolist()]
        spoken = [recordings[digit][rng.integers(len(recordings[digit]))] for digit in digits]
        samples = torch.cat([pauses[0], *(x for pair in zip(spoken, pauses[1:], strict=True) for x in pair)])
        return samples, " ".join(DIGITS[digit] for digit in digits)


def fsdd(root: Path, split: str) -> Source:
    """The Free Spoken Digit Dataset, ``root/<digit>_<speaker>_<index>.flac``; validation and test strings are fixed.

    Raises:
        BitfrontError: a recording is missing or cannot be read.
    """
    files = {path.stem: path for kind in ("flac", "wav") for path in root.glob(f"*_*_*.{kind}")}
    speakers = sorted({stem.split("_")[1] for stem in files})
    names = (f"{digit}_{speaker}_{i}" for digit, speaker, i in product(range(10), speakers, range(50)))
    missing = [name for name in names if name not in files]
    if not speakers or missing:
        raise BitfrontError(
            f"'{root}' lacks {missing[0] if missing else 'all recordings'}: expected <digit>_<speaker>_<index>.wav or "
            ".flac there, indices 0 to 49 (github.com/Jakobovski/free-spoken-digit-dataset, its folder recordings); "
            "give the parent folder with data_root=<folder>"
        )
    recordings = [
        [[read(files[f"{digit}_{speaker}_{i}"], DIGIT_RATE) for i in PARTS[split]] for digit in range(10)]
        for speaker in speakers
    ]
    strings = DigitStrings(recordings, STRINGS[split])
    if split == "train":
        return strings
    rng = np.random.default_rng(0)
    drawn = [strings.draw(rng) for _ in range(len(strings))]
    return InMemory([(wave * 32768).short() for wave, _ in drawn], [text for _, text in drawn])


@dataclass
class Files:
    """Audio files, read when they are drawn."""

    paths: list[Path]
    texts: list[str]
    lengths: Sequence[int]
    rate: int

    def __len__(self) -> int:
        return len(self.paths)

    def utterance(self, index: int) -> tuple[Tensor, str]:
        return read(self.paths[index], self.rate), self.texts[index]


def librispeech(root: Path, subsets: Sequence[str], rate: int, cache: Path) -> Files:
    """Subsets in the official layout, ``root/<subset>/<speaker>/<chapter>/*.flac`` with a ``.trans.txt``.

    Args:
        root: of LibriSpeech.
        subsets: as ``["train-clean-100", "train-clean-360"]``.
        rate: samples per second.
        cache: folder to keep the lengths of the files in, which take minutes to read from so many headers.

    Raises:
        BitfrontError: a subset or one of its files is missing, a transcript is damaged or an audio file unreadable.
    """
    paths: list[Path] = []
    texts: list[str] = []
    for subset in subsets:
        found = len(paths)
        for chapter in sorted((root / subset).glob("*/*/")):
            transcripts = chapter / f"{chapter.parent.name}-{chapter.name}.trans.txt"
            if not transcripts.is_file():
                raise BitfrontError(f"'{transcripts}' is missing; unpack {subset} again")
            recorded = {path.name for path in chapter.glob("*.flac")}
            for line in transcripts.read_text().splitlines():
                name, _, text = line.partition(" ")
                if f"{name}.flac" not in recorded:
                    raise BitfrontError(f"'{transcripts}' names {name}.flac, which is not there; unpack {subset} again")
                try:
                    encode(text)
                except BitfrontError as error:
                    raise BitfrontError(f"'{transcripts}', {name}: {error}") from None
                recorded.remove(f"{name}.flac")
                paths.append(transcripts.parent / f"{name}.flac")
                texts.append(text.lower())
            if recorded:
                raise BitfrontError(f"'{transcripts}' lacks {min(recorded)}; unpack {subset} again")
        if len(paths) == found:
            raise BitfrontError(
                f"no speech in '{root / subset}': expected <speaker>/<chapter>/*.flac and *.trans.txt there; unpack "
                f"{subset}.tar.gz ({LIBRISPEECH}) so that {root.name} lies in the folder given with data_root=<folder>"
            )
    return Files(paths, texts, _lengths(root, paths, cache), rate)


def by_speaker(found: Files, chosen: Mapping[str, Sequence[int]]) -> dict[str, Files]:
    """LibriSpeech's utterances in splits that share no speaker.

    Args:
        found: of all speakers.
        chosen: their numbers, by split; those of all others are "test".

    Raises:
        BitfrontError: a speaker is not there or in two splits, or a split has none.
    """
    spoken = [path.parents[1].name for path in found.paths]
    split = {str(number): name for name, numbers in chosen.items() for number in numbers}
    if len(split) < sum(map(len, chosen.values())):
        raise BitfrontError(f"a speaker is named twice: {', '.join(f'{k} {list(v)}' for k, v in chosen.items())}")
    if missing := sorted(split.keys() - set(spoken)):
        raise BitfrontError(f"there is no speaker {missing[0]}; there are {', '.join(sorted(set(spoken), key=int))}")
    parts: dict[str, list[int]] = {name: [] for name in (*chosen, "test")}
    for n, speaker in enumerate(spoken):
        parts[split.get(speaker, "test")].append(n)
    if empty := [name for name, part in parts.items() if not part]:
        raise BitfrontError(f"there is no speaker for {empty[0]}")
    found_in = {
        name: ([found.paths[n] for n in part], [found.texts[n] for n in part], [found.lengths[n] for n in part])
        for name, part in parts.items()
    }
    return {name: Files(*own, found.rate) for name, own in found_in.items()}


def _lengths(root: Path, paths: list[Path], cache: Path) -> list[int]:
    """Samples of each file."""
    import soundfile

    files = [f"{path.relative_to(root)} {path.stat().st_size}" for path in paths]
    kept = cache / f"lengths-{sha256(chr(10).join(files).encode()).hexdigest()[:16]}.json"
    with suppress(OSError, ValueError):
        if len(lengths := json.loads(kept.read_text())) == len(paths):
            return lengths
    lengths = []
    for path in paths:
        try:
            lengths.append(soundfile.info(path).frames)
        except (OSError, soundfile.LibsndfileError) as error:
            raise BitfrontError(f"could not read '{path}' ({error}); unpack the data set again") from None
    with suppress(OSError, BitfrontError):  # no harm: they are read again
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, json.dumps(lengths))
    return lengths
