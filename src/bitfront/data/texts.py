"""Texts of the user's own: where they are, how one is split, and their tokens by a tokenizer that is there already."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitfront.data.corpus import SPLITS, Corpus
from bitfront.data.folders import completed, files, split_files
from bitfront.data.own import by_split, utf8
from bitfront.errors import BitfrontError

SUFFIX = ".txt"
SHARES = {1: (0.8, 0.1, 0.1), 2: (0.9, 0.1)}  # of a text that is split in three, or whose test text is apart
PIECE = 1 << 20  # characters, about, that a tokenizer gets at once


def texts(place: Path, memory: Path) -> dict[str, str]:
    """The text of each split.

    Args:
        place: a file; or a folder with ``{train,valid,test}.txt``, with folders of these names, or with several files,
            which are split by their names. Where splits are missing, train is cut at line ends, 8 : 1 : 1; where only
            valid is there, it is for the test (as in ``folders.completed``).
        memory: remembers which file is of which split, see ``folders.memory``.

    Raises:
        BitfrontError: there is no text, one is empty or not UTF-8, or it has too few lines to be cut.
    """
    if place.is_file():
        return _cut({"train": _joined([place])}, place)
    names = [path.relative_to(place).as_posix() for path in files(place, [SUFFIX])]
    if not names:
        raise BitfrontError(f"there is no *{SUFFIX} in '{place}'")
    named = split_files(place, [SUFFIX])
    if "train" in named:
        given = {split: [path.name] for split, path in named.items()}
        if others := sorted(set(names) - {path.name for path in named.values()}):
            raise BitfrontError(f"'{place / others[0]}' is beside '{named['train']}' and is of no split; move it")
    else:
        given = by_split(place, names)
    if len(given) == 1 and len(names) > 1 and "train" not in named:
        given = completed(given, memory)
    if empty := [split for split, part in given.items() if not part]:
        raise BitfrontError(f"'{place}' has no *{SUFFIX} for {empty[0]}")
    return _cut({split: _joined([place / name for name in part]) for split, part in given.items()}, place)


def apart(place: Path, training: Path) -> dict[str, str]:
    """The text of each split, where the one to train on lies elsewhere.

    Args:
        place: a file to test on; or a folder with ``{valid,test}.txt``. Without valid, a tenth of the training text.
        training: a file; or a folder with ``train.txt``, or of texts that are all for training.

    Raises:
        BitfrontError: as in ``texts``; or ``place`` has a text to train on itself.
    """
    given = {"test": place} if place.is_file() else split_files(place, [SUFFIX])
    if "train" in given or "test" not in given:
        told = ", ".join(given) or "none"
        raise BitfrontError(f"task.train_data is for data that have texts to test on alone; '{place}' has {told}")
    own = [training] if training.is_file() else files(training, [SUFFIX])
    if training.is_dir() and "train" in (named := split_files(training, [SUFFIX])):
        own = [named["train"]]
    if not own:
        raise BitfrontError(f"there is no *{SUFFIX} in '{training}'")
    parts = {split: [path] for split, path in given.items()}
    return _cut({split: _joined(paths) for split, paths in {"train": own, **parts}.items()}, place)


def _joined(paths: Sequence[Path]) -> str:
    """Texts one after the other, each from the beginning of a line."""
    parts = []
    for path in sorted(paths):
        parts.append(utf8(path))
        if not parts[-1].strip():
            raise BitfrontError(f"'{path}' is empty")
    return "".join(part if part.endswith("\n") else part + "\n" for part in parts)


def _cut(given: dict[str, str], place: Path) -> dict[str, str]:
    """The splits that are missing, from train."""
    if len(given) == len(SPLITS):
        return given
    if "test" not in given and "valid" in given:
        given = {"train": given["train"], "test": given["valid"]}
    text, shares = given["train"], SHARES[len(given)]
    cuts = [text.find("\n", round(share * len(text))) + 1 for share in accumulate(shares[:-1])]
    parts = [text[begin:end] for begin, end in pairwise([0, *cuts, len(text)])]
    if not all(part.strip() for part in parts):
        raise BitfrontError(f"'{place}' has too few lines to be split; give train.txt, valid.txt and test.txt")
    return {split: given.get(split, "") for split in SPLITS} | dict(zip(SPLITS, parts, strict=False))


def digest(content: Mapping[str, str]) -> str:
    """Of all splits."""
    total = hashlib.sha256()
    for split, text in content.items():
        total.update(f"{split} {len(text)} ".encode() + text.encode())
    return total.hexdigest()[:12]


def encoded(content: Mapping[str, str], rules: str, where: str, start: int | None) -> Corpus:
    """Texts in the tokens of a network that is there already.

    Args:
        content: by split.
        rules: of a tokenizer, as the package tokenizers has them in a tokenizer.json.
        where: these are, for messages.
        start: token that stands before a text; None for that of a line end.

    Returns:
        With 1 for the size of every token: what it stands for may not be whole bytes.

    Raises:
        BitfrontError: the rules are damaged, or make nothing of a text.
    """
    tokenizer = read(rules, where)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    first = [start] if start is not None else tokenizer.encode("\n", add_special_tokens=False).ids[-1:]
    streams, words = {}, {}
    for split, text in content.items():
        stream = array("i", first)
        for encoding in tokenizer.encode_batch(list(_pieces(text)), add_special_tokens=False):
            stream.extend(encoding.ids)
        if not first or len(stream) < 2:
            raise BitfrontError(f"the tokenizer of {where} makes no tokens of {'line ends' if not first else split}")
        streams[split], words[split] = torch.from_numpy(np.array(stream)), len(text.split()) + text.count("\n")
    size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    return Corpus(streams, torch.ones(size, dtype=torch.int64), words)


def read(rules: str, where: str) -> Any:
    """A tokenizer.

    Raises:
        BitfrontError: the rules are damaged.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(rules)
    except Exception as error:  # tokenizers raises it itself
        raise BitfrontError(f"could not read the tokenizer of {where}: {error}") from None


def _pieces(text: str) -> Iterator[str]:
    """A text cut at line ends, if it has some."""
    at = 0
    while at < len(text):
        end = text.find("\n", at + PIECE) + 1 or len(text)
        yield text[at:end]
        at = end
