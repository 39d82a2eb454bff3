"""Speech of the user's own: audio files, their transcripts, and the characters of these."""

from __future__ import annotations

import csv
import functools
import io
import math
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitfront.data.checked import faults
from bitfront.data.folders import completed, files
from bitfront.data.own import by_split, few, utf8
from bitfront.data.recordings import Files, decoded
from bitfront.data.speech import Alphabet
from bitfront.errors import BitfrontError

AUDIO = (".wav", ".flac", ".ogg", ".mp3")
TABLES, LIBRISPEECH = ("transcripts", "metadata"), ".trans.txt"
FILE = ("file", "file_name", "filename", "name", "path", "audio", "id")  # of a table's columns
TEXT = ("text", "transcript", "transcription", "sentence")
SHORTEST = 0.1  # seconds
BLOCK = 1 << 20  # samples that are looked at together
WHOLE = 0.99  # of the samples that a file's header tells of, which is a guess in some formats
REMEDY = "repair it or take it out"
BLANK, OTHER = "\0", "\N{REPLACEMENT CHARACTER}"
LAYOUTS = (
    "transcripts.csv or .tsv (metadata.csv) with the columns file and text, <name>.txt beside <name>.wav, or "
    "LibriSpeech's *.trans.txt"
)


@dataclass(frozen=True)
class Learned(Alphabet):
    """The characters of some transcripts; all others have one label together, the last, which is never recognised, so
    that they count as errors."""

    space: str = " "

    @property
    def written(self) -> int:
        return len(self.labels) - 1

    def encode(self, text: str) -> Tensor:
        return torch.tensor([self.labels.find(c) if c in self.labels else self.written for c in text])


def learned(texts: Iterable[str]) -> Learned:
    """The alphabet of transcripts."""
    characters = {c for text in texts for c in text} - {BLANK, OTHER, " "}
    return Learned("".join([BLANK, " ", *sorted(characters), OTHER]))


@dataclass
class Transcribed(Files):
    """Audio files of any rate and number of channels; ``rate`` is what they are brought to."""

    def utterance(self, index: int) -> tuple[Tensor, str]:
        return mono(self.paths[index], self.rate), self.texts[index]


def mono(path: Path, rate: int) -> Tensor:
    """A recording, its channels mixed, ``[samples]``.

    Args:
        path: of the file.
        rate: in Hz, to which it is resampled.

    Raises:
        BitfrontError: it cannot be read, or is too short.
    """
    samples, own = decoded(path, REMEDY)
    mixed = torch.from_numpy(samples).mean(1)
    if len(mixed) < SHORTEST / 2 * own:
        raise BitfrontError(f"'{path}' ends early; {REMEDY}")
    return mixed if own == rate else resampler(own, rate)(mixed)


def fault(path: Path) -> str:
    """Why an audio file cannot be read to its end; "" if it can."""
    import soundfile

    read = 0
    try:
        with soundfile.SoundFile(path) as file:
            for part in file.blocks(BLOCK, dtype="float32"):
                if not np.isfinite(part).all():
                    return "NaN or infinity"
                read += len(part)
            return "" if read >= WHOLE * file.frames else f"it ends at sample {read} of {file.frames}"
    except (OSError, soundfile.LibsndfileError) as error:
        return str(error)


@functools.cache
def resampler(found: int, wanted: int) -> Any:
    """From one number of samples per second to another, along the last dimension."""
    from torchaudio.transforms import Resample

    return Resample(found, wanted)


def transcribed(folder: Path, memory: Path, rate: int, lower: bool) -> tuple[dict[str, Transcribed], list[str]]:
    """The utterances of each split.

    Args:
        folder: with audio files and transcripts, see ``LAYOUTS``: of the whole, or in ``{train,valid,test}``. Where
            splits are missing, ``folders.completed`` makes them of the files' names.
        memory: of that, see ``folders.memory``.
        rate: samples per second.
        lower: whether capitals are written small.

    Returns:
        And notes on what is left out.

    Raises:
        BitfrontError: there is no audio, more than a few files have no transcript or nothing in them, or are named but
            not there, or one cannot be read.
    """
    if not folder.is_dir():
        raise BitfrontError(f"'{folder}' is no folder")
    audio = files(folder, AUDIO)
    if not audio:
        raise BitfrontError(f"there is no audio ({' '.join(AUDIO)}) in '{folder}'")
    if twice := [(a, b) for a, b in pairwise(sorted(audio)) if a.with_suffix("") == b.with_suffix("")]:
        raise BitfrontError(f"'{twice[0][0]}' and '{twice[0][1]}' have one name; take one of them out")
    said, gone = _transcripts(folder, audio)
    if not said:
        raise BitfrontError(f"'{folder}' has {len(audio)} audio files and no transcripts of them; expected {LAYOUTS}")
    notes = few([f"'{name}'" for name in gone], len(said) + len(gone), "transcripts are of audio that is not there")
    texts = {path: normalized(text, lower) for path, text in said.items()}
    notes += few([f"'{p}'" for p in audio if not texts.get(p)], len(audio), "audio files have no transcript")
    told = [path for path in audio if texts.get(path)]
    bad = faults(told, fault, folder, memory)
    notes += few([*bad.values()], len(told), "audio files cannot be read")
    lengths = {path: _length(path, rate) for path in told if path not in bad}
    short = [path for path, length in lengths.items() if length < SHORTEST * rate]
    notes += few([f"'{p}'" for p in short], len(lengths), f"audio files are shorter than {SHORTEST} s")
    names = {path.relative_to(folder).as_posix(): path for path in lengths if path not in short}
    parts = completed(by_split(folder, names), memory)
    found = {split: [names[name] for name in part] for split, part in parts.items()}
    return {
        s: Transcribed(ps, [texts[p] for p in ps], [lengths[p] for p in ps], rate) for s, ps in found.items()
    }, notes


def normalized(text: str, lower: bool) -> str:
    """With composed characters and single spaces."""
    return " ".join(unicodedata.normalize("NFC", text.lower() if lower else text).split())


def needed(text: str) -> int:
    """Frames that CTC needs at least to spell a text: a letter's repetition needs a blank between."""
    return len(text) + sum(a == b for a, b in pairwise(text))


def _length(path: Path, rate: int) -> int:
    """Samples, at some rate."""
    import soundfile

    info = soundfile.info(path)
    return math.ceil(info.frames * rate / info.samplerate)


def _transcripts(folder: Path, audio: Sequence[Path]) -> tuple[dict[Path, str], list[str]]:
    """What is said in each file; and what else is named, but not there. Tables come first, then LibriSpeech's files."""
    tables = [path for path in files(folder, [".csv", ".tsv"]) if path.stem.lower() in TABLES]
    if tables:
        rows = [(table.parent, *row) for table in tables for row in _rows(table)]
        index = {place: _Index(place, audio) for place in {table.parent for table in tables}}
        pairs = [(index[place].find(name), text, name) for place, name, text in rows]
    elif listed := [path for path in files(folder, [".txt"]) if path.name.lower().endswith(LIBRISPEECH)]:
        known = {path.with_suffix(""): path for path in audio}
        lines = [(path, *line.partition(" ")[::2]) for path in listed for line in utf8(path).splitlines() if line]
        pairs = [(known.get(path.with_name(name)), text, str(path.with_name(name))) for path, name, text in lines]
    else:
        beside = {path: path.with_suffix(".txt") for path in audio}
        pairs = [(path, utf8(text), "") for path, text in beside.items() if text.is_file()]
    said: dict[Path, str] = {}
    for path, text, name in pairs:
        if path and said.setdefault(path, text) != text:
            raise BitfrontError(f"'{name}' has two transcripts: '{said[path].strip()}' and '{text.strip()}'")
    return said, [name for path, _, name in pairs if not path]


class _Index:
    """Finds audio files by what a table in a folder calls them: their path, with or without its ending, or, where only
    one is so called, the name alone."""

    def __init__(self, folder: Path, audio: Sequence[Path]) -> None:
        self.folder = folder
        self.known: dict[str, list[Path]] = defaultdict(list)
        for path in (path for path in audio if folder in path.parents):
            inside = path.relative_to(folder)
            for key in {inside.as_posix(), inside.with_suffix("").as_posix(), path.name, path.stem}:
                self.known[key].append(path)

    def find(self, name: str) -> Path | None:
        name = posixpath.normpath(name.strip().replace("\\", "/"))
        if posixpath.isabs(name) and Path(name).is_relative_to(self.folder.absolute()):
            name = Path(name).relative_to(self.folder.absolute()).as_posix()
        found = self.known.get(name, [])
        if len(found) > 1:
            found = [path for path in found if self.folder / name in (path, path.with_suffix(""))] or found
        if len(found) > 1:
            raise BitfrontError(f"a table in '{self.folder}' names '{name}', which may be '{found[0]}' or '{found[1]}'")
        return found[0] if found else None


def _rows(table: Path) -> Iterator[tuple[str, str]]:
    """The file and the text of each row: of the columns that are named so, or of the first two."""
    content = utf8(table)
    first = content.partition("\n")[0]
    separator = "\t" if table.suffix.lower() == ".tsv" else "|" if "|" in first else ","
    quoting: Any = csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE
    try:
        read = csv.reader(io.StringIO(content, newline=""), delimiter=separator, quoting=quoting, strict=True)
        rows = [row for row in read if row]
    except csv.Error as error:
        raise BitfrontError(f"'{table}' is no table with '{separator}' between its columns: {error}") from None
    heads = [cell.strip().lower() for cell in rows[0]] if rows else []
    file, text = (next((heads.index(key) for key in keys if key in heads), None) for keys in (FILE, TEXT))
    if file is None or text is None:
        file, text = 0, 1
    else:
        rows = rows[1:]
    for number, row in enumerate(rows, 1):
        if len(row) <= max(file, text):
            raise BitfrontError(f"row {number} of '{table}' has {len(row)} columns; expected file and text")
        yield row[file], row[text]
