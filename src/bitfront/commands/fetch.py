"""Download a public data set, or a trained network, into the folders that the tasks read.

    python -m src.fetch cifar10 data_root=data
    python -m src.fetch librispeech subset=dev-clean
    python -m src.fetch smollm2
    python -m src.fetch efficientnet_lite0

What is there already is not downloaded again. ImageNet, WikiText-103 and MIR-1K have no downloader: the tasks say where
they come from and where they are expected.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bitfront.commands.options import options
from bitfront.commands.options import usage as usage_of
from bitfront.console import CONSOLE
from bitfront.data.fetch import SETS
from bitfront.errors import BitfrontError
from bitfront.models.pretrained import NETWORKS


@dataclass
class Options:
    """Of the command; the subset is of LibriSpeech."""

    data_root: str = "data"
    subset: str = "train-clean-100"


def usage() -> str:
    """The help."""
    return f"{usage_of(__doc__, Options)}\nSets: {', '.join(SETS)}\nNetworks: {', '.join(NETWORKS)}"


def main(words: list[str]) -> None:
    """Fetch what the first word names; without a word, print the help.

    Raises:
        BitfrontError: there is no such thing, or it could not be fetched.
    """
    if not words:
        CONSOLE.print(usage())
        return
    name, *more = words
    if name not in (known := (*SETS, *NETWORKS)):
        raise BitfrontError(f"there is no '{name}'; choices: {', '.join(known)}")
    chosen = options(Options, more)
    CONSOLE.print(f"{name}: {fetch(name, Path(chosen.data_root), chosen.subset)}")


def fetch(name: str, root: Path, subset: str) -> Path:
    """Download something and bring it into its layout.

    Args:
        name: one of ``SETS`` or ``NETWORKS``.
        root: of the data sets.
        subset: of LibriSpeech.

    Returns:
        Its folder.

    Raises:
        BitfrontError: there is no such subset, no network, no room, or the download is damaged.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        return SETS[name](root, subset) if name in SETS else NETWORKS[name](root)
    except (OSError, RuntimeError, ValueError) as error:
        raise BitfrontError(
            f"could not fetch {name} ({type(error).__name__}: {error}); it needs a network and room in '{root}'; or "
            "copy it there from a machine that has it"
        ) from None
