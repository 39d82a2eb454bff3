"""A language model's file in a format of other runtimes, with the config.json and the tokenizer of its network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitfront.data import folders
from bitfront.errors import BitfrontError
from bitfront.exports.causal import Causal, Written
from bitfront.models import hf
from bitfront.quant.storage.artifact import Artifact
from bitfront.theirs import FOLDER, GGUF


def interchanged(file: Path, out: Path, model: str, data_root: str, kind: str) -> Written:
    """Write it.

    Args:
        file: an artifact.
        out: the folder or file to write.
        model: ``hf:<folder>`` of the network; "" for what the file names below ``data_root``.
        data_root: folder of the data sets.
        kind: "mlx" or "gguf".

    Raises:
        BitfrontError: the file, the network or a package is not there, or they do not fit the format.
    """
    artifact = Artifact.load(file)
    folder = _folder(artifact.about, model, file, data_root)
    config, rules = (hf.beside(f"{FOLDER}{folder}", name) for name in ("config.json", "tokenizer.json"))
    network = Causal(artifact, config, rules, folder)
    if kind == "mlx":
        from bitfront.exports.mlx import export
    else:
        from bitfront.exports.gguf.file import export
    return export(network, out)


def _folder(about: Mapping[str, Any], model: str, file: Path, data_root: str) -> Path:
    """Of the network. A file may come from anyone, so it names none that lies elsewhere."""
    told = _told(about)
    place = (model or told).removeprefix(FOLDER)
    if not (model or told).startswith(FOLDER) or place.endswith(GGUF) or not (model or re.fullmatch(r"[\w-]+", place)):
        of = f"; it was made of model={told}" if told else ""
        raise BitfrontError(
            f"model={FOLDER}<folder> is needed, as save_pretrained leaves it, for the config.json and the tokenizer of "
            f"the network in '{file}'{of}"
        )
    return folders.find(place, data_root, f"model={FOLDER}")


def _told(about: Mapping[str, Any]) -> str:
    """The network's name in a file of ``run`` or ``quantize``; "" if that has none."""
    config = about.get("config")
    task = config.get("task") if isinstance(config, Mapping) else None
    name = task.get("network") if isinstance(task, Mapping) else about.get("model")
    return name if isinstance(name, str) else ""
