"""Texts and their tokens: byte pairs learned from the training text, or the words of WikiText-103 as fairseq numbers
them. What is made of a text is kept in ``<data_root>/generated``.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from bitfront.data.corpus import SPLITS, Corpus, tokenized
from bitfront.data.docstrings import SHA256, docstrings
from bitfront.errors import BitfrontError

BOOKS = {split: f"books/{split}.txt" for split in SPLITS}
FILES = {
    "books": BOOKS,
    "wikitext2": BOOKS | {"test": "wikitext2/test.txt"},
    "wikitext-103": {split: f"wikitext-103/wiki.{split}.tokens" for split in SPLITS},
}
ORIGINS = {
    "books": "16, 2 and 2 English novels as UTF-8 text",
    "wikitext2": "the raw test text of WikiText-2 (S. Merity)",
    "wikitext-103": "of wikitext-103-v1.zip (S. Merity), the words and not the raw characters",
}
VERSION = 1  # of how texts become tokens
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # the first words of fairseq's dictionary
END, UNKNOWN = 2, 3
LINES = 4096  # encoded at once


def load(root: Path, data: str, vocabulary: int) -> Corpus:
    """A corpus, from ``root/generated`` if it is there, else made.

    Args:
        root: of the data sets.
        data: "docstrings", or a key of ``FILES``.
        vocabulary: number of tokens.

    Raises:
        BitfrontError: files are missing, damaged or of another vocabulary, or the folder cannot be written to.
    """
    if data == "docstrings":
        name = f"docstrings-{VERSION}-{SHA256[:12]}-{vocabulary}"
        return tokenized(root, name, lambda: byte_pairs(docstrings(), vocabulary))
    if data not in FILES:
        raise BitfrontError(f"there is no task.data={data}; choices: docstrings, {', '.join(FILES)}")
    paths = {split: root / path for split, path in FILES[data].items()}
    digest = hashlib.sha256()
    for split, path in paths.items():
        if not path.is_file() or not path.stat().st_size:
            origin = ORIGINS[FILES[data][split].partition("/")[0]]
            raise BitfrontError(
                f"there is no text in '{path}', {origin}; put it there, or give the folder that has {data}'s files "
                f"({', '.join(FILES[data].values())}) with data_root=<folder>"
            )
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    name = f"{data}-{VERSION}-{digest.hexdigest()[:12]}-{vocabulary}"
    if data == "wikitext-103":
        return tokenized(root, name, lambda: whole_words(paths, vocabulary))
    formatted = [split for split, path in FILES[data].items() if path.startswith("wikitext2/")]
    texts = {split: read(path) for split, path in paths.items()}
    return tokenized(root, name, lambda: byte_pairs(texts, vocabulary, formatted))


def read(path: Path) -> str:
    """A UTF-8 text.

    Raises:
        BitfrontError: it is not UTF-8.
    """
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise BitfrontError(f"'{path}' is damaged: not UTF-8 at byte {error.start}; get it anew") from None


def byte_pairs(texts: dict[str, str], vocabulary: int, formatted: Sequence[str] = ()) -> Corpus:
    """Texts in byte pairs learned from the one to train on.

    Args:
        texts: by split.
        vocabulary: number of byte pairs and bytes.
        formatted: splits in WikiText's format, which are first brought back to running text (``detokenized``).

    Raises:
        BitfrontError: the training text is too small for the vocabulary.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    words = {split: len(texts[split].split()) + texts[split].count("\n") for split in SPLITS}
    texts = {split: detokenized(text) if split in formatted else text for split, text in texts.items()}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines(texts["train"]), trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise BitfrontError(
            f"task.vocabulary={vocabulary} does not fit the training text, which has {tokenizer.get_vocab_size()} "
            f"byte pairs and bytes; give task.vocabulary={tokenizer.get_vocab_size()} or another text"
        )
    sizes = torch.tensor(
        [len(token) for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    )  # a letter stands for a byte
    start = tokenizer.encode("\n").ids
    streams = {}
    for split in SPLITS:
        stream = array("i", start)
        batch = list(lines(texts[split]))
        for at in range(0, len(batch), LINES):
            for encoding in tokenizer.encode_batch_fast(batch[at : at + LINES]):
                stream.extend(encoding.ids)
        streams[split] = torch.from_numpy(np.array(stream))
    return Corpus(streams, sizes, words)


def lines(text: str) -> Iterator[str]:
    """With their ends."""
    return (match.group() for match in re.finditer(r"[^\n]*\n|[^\n]+", text))


def detokenized(text: str) -> str:
    """WikiText's words joined to running text: hyphens and separators inside words and numbers, punctuation and
    brackets where they belong, quotation marks by turns. "<unk>" stays, as does the format of the headings."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r' " ([^"\n]*) "(?= |$)', r' "\1"', text, flags=re.MULTILINE)
    text = re.sub(r" ([,.;:!?%)\]}]|'(?:s|m|d|re|ve|ll|t)?)(?=[ \"]|$)", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"([(\[{$£€]) ", r"\1", text)
    return re.sub(r"(?m)^ | $", "", text)


def whole_words(paths: dict[str, Path], vocabulary: int) -> Corpus:
    """Texts in words, numbered as fairseq does: its special ones, then by falling frequency in the training text and
    the alphabet, filled up to a multiple of 8; each line ends in a word of its own.

    Raises:
        BitfrontError: a file is no UTF-8, or the training text has another vocabulary.
    """
    try:
        counts: Counter[str] = Counter()
        for line in words_of(paths["train"]):
            counts.update(line)
        ordered = sorted(counts.keys() - set(SPECIAL), key=lambda word: (-counts[word], word))
        size = -(-(len(SPECIAL) + len(ordered)) // 8) * 8
        if size != vocabulary:
            raise BitfrontError(
                f"'{paths['train']}' has {len(ordered)} different words, which makes a vocabulary of {size} and not "
                f"task.vocabulary={vocabulary}: not the official file, or not all of it"
            )
        numbers = {word: number for number, word in enumerate((*SPECIAL, *ordered))}
        streams = {}
        for split in SPLITS:
            stream = array("i", [END])
            for line in words_of(paths[split]):
                stream.extend([numbers.get(word, UNKNOWN) for word in line])
                stream.append(END)
            streams[split] = torch.from_numpy(np.array(stream))
    except UnicodeDecodeError as error:
        raise BitfrontError(f"a text of {sorted(map(str, paths.values()))} is damaged: {error}; get it anew") from None
    sizes = [len(word.encode()) + 1 for word in numbers] + [1] * (size - len(numbers))  # with a space
    sizes[END] = 2  # a space and the end of the line
    return Corpus(streams, torch.tensor(sizes), {split: len(stream) - 1 for split, stream in streams.items()})


def words_of(path: Path) -> Iterator[list[str]]:
    """The words of each line."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield line.split()
