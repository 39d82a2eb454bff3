"""What there is to calibrate a user's network on: of which kind, and whether its labels are what the network gives.
Starts without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from bitfront.data import folders
from bitfront.errors import BitfrontError
from bitfront.theirs import FOLDER, saved

KINDS = {  # by task, the files that its reader knows; transcripts, which are texts, lie beside recordings
    "audio": (".wav", ".flac", ".ogg", ".mp3"),
    "images": (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"),
    "text": (".txt",),
}
TRANSCRIPTS = (".txt", ".csv", ".tsv")


@dataclass
class Source:
    """Data of the user's.

    Attributes:
        name: as the user gave it.
        kind: the task that reads such data; of a function of the user's "images", for the method's defaults.
        files: of that kind; none of a function.
        labelled: whether the task's metric can be measured.
    """

    name: str
    kind: str
    files: list[Path]
    labelled: bool


def found(name: str, data_root: str, model: str, classes: int, labels: bool = True) -> Source:
    """What ``data=`` means.

    Args:
        name: a folder, a file or ``<package.module>:<function>``.
        data_root: folder of the data sets.
        model: of the network, as ``models.named.build`` takes it.
        classes: outputs of the network; 0 for as many as the data have.
        labels: whether to look for some.

    Raises:
        BitfrontError: there is nothing of a kind that is known.
    """
    if ":" in name and not Path(name).exists():
        return Source(name, "images", [], False)
    place = folders.find(name, data_root)
    for kind, suffixes in KINDS.items():
        files = folders.files(place, suffixes) if place.is_dir() else [place]
        files = [path for path in files if path.suffix.lower() in suffixes]
        if files and kind == "images" and place.is_file():
            raise BitfrontError(f"data={name} is one image; give the folder of many")
        if files:
            return Source(name, kind, files, labels and _labelled(kind, place, files, model, classes))
    known = "; ".join(f"{kind}: {' '.join(suffixes)}" for kind, suffixes in KINDS.items())
    raise BitfrontError(f"there is nothing in data={name} to calibrate on; known are {known}")


def _labelled(kind: str, place: Path, files: list[Path], model: str, classes: int) -> bool:
    if kind == "images":
        root = folders.split_folders(place).get("train", place) if place.is_dir() else place
        below = [path.relative_to(root).parts for path in files if path.is_relative_to(root)]
        groups = {parts[0] for parts in below}
        return all(len(parts) > 1 for parts in below) and len(groups) > 1 and classes in (0, len(groups))
    if kind == "text":
        return not model.startswith(FOLDER) or causal(model)
    return place.is_dir() and bool(folders.files(place, TRANSCRIPTS)) and not model.startswith(FOLDER)


def causal(model: str) -> bool:
    """Whether a folder of transformers has a network that predicts the next token."""
    folder, file = saved(model)
    if file:
        return True
    try:
        told = json.loads((folder / "config.json").read_text())["architectures"][0]
    except (OSError, ValueError, LookupError, TypeError):
        return False  # refused where it is built
    return str(told).endswith(("ForCausalLM", "LMHeadModel"))
