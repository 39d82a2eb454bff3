"""Download a public data set into the folders that the tasks read, where torchvision or torchaudio know it.

    python -m src.fetch cifar10 data_root=data
    python -m src.fetch librispeech subset=dev-clean

What is there already is not downloaded again. ImageNet, WikiText-103 and MIR-1K have no downloader: the tasks say where
they come from and where they are expected.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bitfront.commands.options import options
from bitfront.commands.options import usage as usage_of
from bitfront.console import CONSOLE
from bitfront.data.fetch import SETS, fetch
from bitfront.errors import BitfrontError


@dataclass
class Options:
    """Of the command; the subset is of LibriSpeech."""

    data_root: str = "data"
    subset: str = "train-clean-100"


def usage() -> str:
    """The help."""
    return f"{usage_of(__doc__, Options)}\nSets: {', '.join(SETS)}"


def main(words: list[str]) -> None:
    """Fetch the set that the first word names; without a word, print the help.

    Raises:
        BitfrontError: there is no such set, or it could not be fetched.
    """
    if not words:
        CONSOLE.print(usage())
        return
    name, *more = words
    if name not in SETS:
        raise BitfrontError(f"there is no set '{name}'; choices: {', '.join(SETS)}")
    chosen = options(Options, more)
    CONSOLE.print(f"{name}: {fetch(name, Path(chosen.data_root), chosen.subset)}")
