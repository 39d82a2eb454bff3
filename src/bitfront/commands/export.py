"""Take a network out of its packed file.

python -m src.export artifact=net.safetensors format=float out=net.pth       # a state dict, as torch.save writes it
python -m src.export artifact=net.safetensors format=torch out=reader.py     # a program of its own that reads the file
python -m src.export artifact=runs/vit/gptq/<id>/model.safetensors format=onnx out=vit.onnx
python -m src.export artifact=my.safetensors format=onnx model=torchvision.resnet18 data=photos out=my.onnx

format=  float: plain weights, for torch.load(..., weights_only=True)
         torch: one file, numpy and torch alone: load_state_dict(load("net.safetensors")) gives the same outputs
         onnx: a network that other programs run, its weights packed in 2, 4, 8 or 16 bits; its outputs are compared
of onnx, with pip install 'bitfront[onnx]':
model= data= classes=   a network of your own and inputs for it, as `quantize` takes them
task= task.<key>= data= of a run's file, as `evaluate` takes them; its data are needed, for inputs
matmul_nbits=true       linear layers compute with packed weights, in onnxruntime: fast from some hundred columns on
accuracy_level=         of those: 4 rounds their inputs to 8 bits, 0 nothing, which is slow
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from bitfront.commands import options as choices
from bitfront.console import CONSOLE
from bitfront.errors import BitfrontError
from bitfront.progress import phase
from bitfront.shipped import PACKAGE

FORMATS = ("float", "torch", "onnx")


@dataclass
class Options:
    """Of the command, as above."""

    artifact: str = ""
    format: str = ""
    out: str = ""
    model: str = ""
    classes: int = 0
    data: str = ""
    data_root: str = "data"
    matmul_nbits: bool = False
    accuracy_level: int = 4


SHARED = ("artifact", "format", "out")


def usage() -> str:
    """The help."""
    return (__doc__ or "").rstrip()


def main(words: list[str]) -> None:
    """Write the file.

    Raises:
        BitfrontError: with what the user can do.
    """
    of_task = [word for word in words if word.startswith(("task=", "task."))]
    chosen = choices.options(Options, [word for word in words if word not in of_task])
    if not words:
        CONSOLE.print(usage())
        return
    _check(chosen, of_task)
    out = Path(chosen.out)
    if chosen.format == "onnx":
        CONSOLE.print(f"{out}: {_onnx(chosen, of_task)}")
        return
    with phase("loading PyTorch"):
        from bitfront.quant.artifact import Artifact, write_atomically

    artifact = Artifact.load(chosen.artifact)
    content = (PACKAGE / "standalone.py").read_bytes() if chosen.format == "torch" else _saved(artifact.state())
    write_atomically(out, content)
    CONSOLE.print(f"{out}: {len(content):,} bytes")


def _check(chosen: Options, of_task: list[str]) -> None:
    """Refuse what does not fit together.

    Raises:
        BitfrontError: with what does.
    """
    if chosen.format not in FORMATS:
        raise BitfrontError(f"format={chosen.format}: it is one of {', '.join(FORMATS)}")
    for name in ("artifact", "out"):
        if not getattr(chosen, name):
            raise BitfrontError(f"{name}= is needed")
    out = Path(chosen.out)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise BitfrontError(f"out={out}: give the name of a file, in a folder that is there")
    given = [f.name for f in fields(Options) if f.name not in SHARED and getattr(chosen, f.name) != f.default]
    if chosen.format != "onnx" and (given or of_task):
        raise BitfrontError(f"{', '.join([*given, *of_task])}: of format=onnx alone")
    if chosen.accuracy_level not in range(5):
        raise BitfrontError(f"accuracy_level={chosen.accuracy_level}: it is 0, exact, to 4, inputs of 8 bits")
    if "accuracy_level" in given and not chosen.matmul_nbits:
        raise BitfrontError("accuracy_level= is of matmul_nbits=true")


def _onnx(chosen: Options, of_task: list[str]) -> object:
    with phase("loading PyTorch"):
        from bitfront.cells.exported import exported
        from bitfront.cells.single import Chosen

    out = Path(chosen.out)
    network = Chosen(chosen.model, "", chosen.classes, "cpu", out)
    level = chosen.accuracy_level if chosen.matmul_nbits else None
    return exported(Path(chosen.artifact), out, network, chosen.data, chosen.data_root, of_task, level)


def _saved(state: object) -> bytes:
    import io

    import torch

    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()
