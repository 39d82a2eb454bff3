"""Inputs for a network from files without labels: enough to calibrate on, and to measure by how much outputs change."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from bitfront.data.imagenet import Photos
from bitfront.data.own import utf8
from bitfront.data.transcribed import mono
from bitfront.errors import BitfrontError
from bitfront.theirs import imported

STEMS = ("tokenizer", "vocab", "spiece", "merges", "preprocessor", "processor", "feature_extractor")  # of files


def shuffled(paths: Sequence[Path]) -> list[Path]:
    """In an order that depends on the number of files alone: a few of the first are of all folders."""
    return random.Random(0).sample(list(paths), len(paths))


def photos(paths: Sequence[Path], view: Callable[[Any], Tensor], batch_size: int) -> Iterator[Tensor]:
    """Batches of image files, ``[batch, channels, height, width]``.

    Raises:
        BitfrontError: an image cannot be read.
    """
    images = Photos([(str(path), 0) for path in shuffled(paths)], view, upright=True)
    for start in range(0, len(images), batch_size):
        yield images[list(range(start, min(start + batch_size, len(images))))][0]


def lines(paths: Sequence[Path], folder: Path, batch_size: int, length: int) -> Iterator[dict[str, Tensor]]:
    """Batches of lines of text, as the tokenizer of a folder of transformers' gives them, padded.

    Args:
        paths: of the texts.
        folder: has the tokenizer.
        batch_size: lines.
        length: tokens of a line, at most.

    Raises:
        BitfrontError: a text is not UTF-8, or the folder has no tokenizer.
    """
    read = _preprocessor("AutoTokenizer", folder)
    if read.pad_token is None:
        read.pad_token = read.eos_token
    content = [line for path in paths for line in utf8(path).splitlines() if line.strip()]
    content = random.Random(0).sample(content, len(content))
    for start in range(0, len(content), batch_size):
        part = content[start : start + batch_size]
        yield dict(read(part, padding=True, truncation=True, max_length=length, return_tensors="pt"))


def sounds(paths: Sequence[Path], rate: int, seconds: float, folder: Path | None) -> Iterator[Any]:
    """Recordings one by one: waveforms ``[1, samples]``, or what the feature extractor of a folder makes of them.

    Args:
        paths: of the files; more channels than one are mixed.
        rate: in Hz, to which they are resampled.
        seconds: of a recording, at most.
        folder: of transformers; None for waveforms.

    Raises:
        BitfrontError: a file cannot be read, or the folder has no feature extractor.
    """
    extract = _preprocessor("AutoFeatureExtractor", folder) if folder else None
    for path in shuffled(paths):
        wave = mono(path, rate)[None, : round(seconds * rate)]
        yield dict(extract(wave[0].numpy(), sampling_rate=rate, return_tensors="pt")) if extract else wave


def batches(name: str) -> Iterable[Any]:
    """What a function of the user's gives, ``<package.module>:<function>``, of the working directory, too.

    Raises:
        BitfrontError: there is no such function, it fails, or gives no batches.
    """
    found = imported("data", name)
    try:
        found = found() if inspect.isroutine(found) or inspect.isclass(found) else found
    except Exception as error:  # whatever the user's code raises
        told = f"{type(error).__name__}: {error}"
        raise BitfrontError(f"data={name}, called without arguments, fails with {told}") from None
    if isinstance(found, (str, Mapping)) or not isinstance(found, (Iterable, Tensor)):
        raise BitfrontError(f"data={name} gives {type(found).__name__}, and must give batches, as a DataLoader does")
    return found


def _preprocessor(kind: str, folder: Path) -> Any:
    if not any(place.suffix == ".model" or place.stem.startswith(STEMS) for place in folder.glob("*.*")):
        raise BitfrontError(f"'{folder}' has no tokenizer or feature extractor; save the network's own there")
    try:
        import transformers
    except ImportError:
        raise BitfrontError("hf: needs transformers: pip install transformers") from None
    try:
        return getattr(transformers, kind).from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BitfrontError(f"'{folder}' has none of what makes inputs for its network ({kind}: {error})") from None
