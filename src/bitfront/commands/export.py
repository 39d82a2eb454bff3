"""Take a network out of its packed file.

python -m src.export artifact=net.safetensors format=float out=net.pth       # a state dict, as torch.save writes it
python -m src.export artifact=net.safetensors format=torch out=reader.py     # a program of its own that reads the file
python -m src.export artifact=runs/vit/gptq/<id>/model.safetensors format=onnx out=vit.onnx
python -m src.export artifact=my.safetensors format=onnx model=torchvision.resnet18 data=photos out=my.onnx
python -m src.export artifact=my.safetensors format=mlx model=hf:llama out=my-mlx     # a folder for mlx-lm
python -m src.export artifact=my.safetensors format=gguf model=hf:llama out=my.gguf   # for llama.cpp

format=  float: plain weights, for torch.load(..., weights_only=True)
         torch: one file, numpy and torch alone: load_state_dict(load("net.safetensors")) gives the same outputs
         onnx: a network that other programs run, its weights packed in 2, 4, 8 or 16 bits; its outputs are compared
         mlx: a folder for mlx-lm, gguf: a file for llama.cpp; of a causal language model of the Llama architecture
of mlx and gguf, whose blocks are 32 and more values of a row; quantize with group_size=32, 64, 128, or -1 (rows):
model=                  hf:<folder> with its config.json and tokenizer; a run's file may name one below data_root
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

NETWORK = ("model", "data_root")
FORMATS = {  # and their options
    **{"float": (), "torch": (), "mlx": NETWORK, "gguf": NETWORK},
    "onnx": (*NETWORK, "classes", "data", "task", "matmul_nbits", "accuracy_level"),
}


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
    if chosen.format == "onnx":
        written = _onnx(chosen, of_task)
    else:
        written = (_interchanged if chosen.format in ("mlx", "gguf") else _plain)(chosen)
    CONSOLE.print(f"{chosen.out}: {written}")


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
    out, wanted = Path(chosen.out), "new folder" if chosen.format == "mlx" else "file"
    there = out.exists() if chosen.format == "mlx" else out.is_dir()
    if there or not out.absolute().parent.is_dir():
        raise BitfrontError(f"out={out}: give the name of a {wanted}, in a folder that is there")
    given = [f.name for f in fields(Options) if f.name not in SHARED and getattr(chosen, f.name) != f.default]
    others = {*given, *(["task"] if of_task else [])} - {*FORMATS[chosen.format]}
    if others:
        homes = [kind for kind, own in FORMATS.items() if others <= {*own}]
        raise BitfrontError(f"{', '.join(sorted(others))}: of format={' or '.join(homes)} alone")
    if chosen.accuracy_level not in range(5):
        raise BitfrontError(f"accuracy_level={chosen.accuracy_level}: it is 0, exact, to 4, inputs of 8 bits")
    if "accuracy_level" in given and not chosen.matmul_nbits:
        raise BitfrontError("accuracy_level= is of matmul_nbits=true")


def _plain(chosen: Options) -> str:
    with phase("loading PyTorch"):
        from bitfront.files import write_atomically
        from bitfront.quant.storage.artifact import Artifact

    artifact = Artifact.load(chosen.artifact)
    content = (PACKAGE / "standalone.py").read_bytes() if chosen.format == "torch" else _saved(artifact.state())
    write_atomically(Path(chosen.out), content)
    return f"{len(content):,} bytes"


def _onnx(chosen: Options, of_task: list[str]) -> object:
    with phase("loading PyTorch"):
        from bitfront.cells.exported import exported
        from bitfront.cells.single import Chosen

    out = Path(chosen.out)
    network = Chosen(chosen.model, "", chosen.classes, "cpu", out)
    level = chosen.accuracy_level if chosen.matmul_nbits else None
    return exported(Path(chosen.artifact), out, network, chosen.data, chosen.data_root, of_task, level)


def _interchanged(chosen: Options) -> object:
    with phase("loading PyTorch"):
        from bitfront.cells.interchanged import interchanged

    return interchanged(Path(chosen.artifact), Path(chosen.out), chosen.model, chosen.data_root, chosen.format)


def _saved(state: object) -> bytes:
    import io

    import torch

    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()
