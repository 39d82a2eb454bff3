"""Take a network out of its packed file.

python -m src.export artifact=net.safetensors format=float out=net.pth       # a state dict, as torch.save writes it
python -m src.export artifact=net.safetensors format=torch out=reader.py     # a program of its own that reads the file

format=  float: plain weights, for torch.load(..., weights_only=True)
         torch: one file, numpy and torch alone: load_state_dict(load("net.safetensors")) gives the same outputs
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bitfront.commands import options as choices
from bitfront.console import CONSOLE
from bitfront.errors import BitfrontError
from bitfront.progress import phase
from bitfront.shipped import PACKAGE

FORMATS = ("float", "torch")


@dataclass
class Options:
    """Of the command, as above."""

    artifact: str = ""
    format: str = ""
    out: str = ""


def usage() -> str:
    """The help."""
    return (__doc__ or "").rstrip()


def main(words: list[str]) -> None:
    """Write the file.

    Raises:
        BitfrontError: with what the user can do.
    """
    chosen = choices.options(Options, words)
    if not words:
        CONSOLE.print(usage())
        return
    if chosen.format not in FORMATS:
        raise BitfrontError(f"format={chosen.format}: it is one of {', '.join(FORMATS)}")
    for name in ("artifact", "out"):
        if not getattr(chosen, name):
            raise BitfrontError(f"{name}= is needed")
    out = Path(chosen.out)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise BitfrontError(f"out={out}: give the name of a file, in a folder that is there")
    with phase("loading PyTorch"):
        from bitfront.quant.artifact import Artifact, write_atomically

    artifact = Artifact.load(chosen.artifact)
    content = (PACKAGE / "standalone.py").read_bytes() if chosen.format == "torch" else _saved(artifact.state())
    write_atomically(out, content)
    CONSOLE.print(f"{out}: {len(content):,} bytes")


def _saved(state: object) -> bytes:
    import io

    import torch

    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()
