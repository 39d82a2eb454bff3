"""Quantize a network of your own after training, into one file.

python -m src.quantize model=torchvision.resnet18 weights=mine.pth data=photos quant=decoupleq bits=2 out=my.safetensors
python -m src.quantize model=hf:minilm data=texts quant=gptq bits=4
python -m src.quantize model=mypackage.nets:build weights=mine.pth data=mypackage.data:loader quant=rtn bits=4

model=    timm.<name> | torchvision.<name> | hf:<folder or .gguf> | <package.module>:<function>
weights=  .pth, .safetensors, a file of ours | pretrained: what the library publishes; a folder of hf: has its own
data=     a folder of images, of text or of sound; a text; <package.module>:<function> that gives batches
          with labels (class folders, text for causal networks, transcripts) the metric is measured before and after
quant=    decoupleq | gsq | gptq | rtn, with their options as in `run`: bits=, group_size=, quant.min_size= ...
max_size= MiB that the file may have, in place of bits=: each tensor gets the width that costs least
raw_dtype=  float16 | bfloat16: of what is not quantized, in place of float32
classes=  outputs of the network, where they are not the class folders; labels=false leaves labels alone
task.*    as in `run task=images|text|audio`: task.image_size=, task.mean= ...
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path

from bitfront.cells import compose
from bitfront.cells.check import check, check_values, closest
from bitfront.cells.identity import calibrated
from bitfront.commands.options import options
from bitfront.console import CONSOLE
from bitfront.data.folders import network
from bitfront.data.source import Source, found
from bitfront.errors import BitfrontError
from bitfront.progress import phase
from bitfront.shipped import module

DEFAULT = "decoupleq"
CELLS = ("quant", "task", "seed", "max_size", "raw_dtype")  # words as in ``run``
HEADER = 1 << 16  # bytes of a file in which ours say whose they are


@dataclass
class Options:
    """Of the command, but for those of the method and the task.

    Attributes:
        model, weights, data, out: see above; out is ``<model>-<method>.safetensors`` where it is not given.
        classes: outputs; 0 for as many as there are class folders.
        labels: whether to measure by them, if there are some.
        data_root: folder of the data sets.
        accelerator: auto, cpu or gpu.
    """

    model: str = ""
    weights: str = ""
    data: str = ""
    out: str = ""
    classes: int = 0
    labels: bool = True
    data_root: str = "data"
    accelerator: str = "auto"


def usage() -> str:
    """The help."""
    return (__doc__ or "").rstrip()


def main(words: list[str]) -> None:
    """Quantize.

    Raises:
        BitfrontError: with what the user can do.
    """
    if not words:
        CONSOLE.print(usage())
        return
    known = {f.name for f in fields(Options)}
    others = [word for word in words if word.partition("=")[0] not in known]
    _check_words(others, sorted(known))
    chosen = options(Options, [word for word in words if word.partition("=")[0] in known])
    for name in ("model", "data"):
        if not getattr(chosen, name):
            raise BitfrontError(f"{name}= is needed; {module('quantize')} --help says what it takes")
    chosen.model = network(chosen.model, chosen.data_root)
    source = found(chosen.data, chosen.data_root, chosen.model, chosen.classes, chosen.labels)
    config = _config(source, chosen, others)
    out = _out(chosen, config.method)

    if chosen.weights not in ("", "pretrained") and not Path(chosen.weights).is_file():
        raise BitfrontError(f"weights={chosen.weights}: no such file; give a .pth, .safetensors or pretrained")

    with phase("loading PyTorch"):
        from bitfront.cells.single import Chosen, quantized

    own = Chosen(chosen.model, chosen.weights, chosen.classes, chosen.accelerator, out)
    for line in quantized(source, config, own):
        CONSOLE.print(line)


def _check_words(words: list[str], own: list[str]) -> None:
    """Refuse a word that is an option neither of the command nor of a method or a task.

    Raises:
        BitfrontError: with the closest.
    """
    methods = [name for name in compose.options("quant") if calibrated(compose.load([f"quant={name}"]).values)]
    knobs = {knob for name in methods for knob, _ in compose.knobs("quant", name)}
    for word in words:
        key = re.split(r"[=.]", word, maxsplit=1)[0]
        if key not in (*CELLS, *knobs):
            known = [*own, *CELLS, *sorted(knobs)]
            options = {key for name in methods for key in compose.load([f"quant={name}"]).values["quant"]}
            told = f"did you mean 'quant.{key}'? " if key in options else closest(key, known)
            raise BitfrontError(f"there is no '{key}'; {told}options: {', '.join(known)}, quant.*, task.*")


def _config(source: Source, chosen: Options, others: list[str]) -> compose.Config:
    """Of the cell that would do the same: its method, reader and metric.

    Raises:
        BitfrontError: a word does not fit, or the method trains.
    """
    words = [f"task={source.kind}", f"quant={DEFAULT}", *others, f"data_root={chosen.data_root}"]
    _check_method(words, source, chosen)
    words += [f"data={chosen.data}", f"model={chosen.model}"] if source.labelled else ["data=generated"]
    check(words)
    config = compose.load(words)
    check_values(config)
    if config.values["quant"]["sft"]:
        raise BitfrontError(
            f"quant.sft=true trains on labels: {module('run')} task={source.kind} data={chosen.data} "
            f"model={chosen.model}"
        )
    if config.values["quant"]["reestimate_bn"] and not source.labelled:
        raise BitfrontError("quant.reestimate_bn needs training data with labels, which these are not")
    return config


def _check_method(words: list[str], source: Source, chosen: Options) -> None:
    """Refuse a method that trains, before its options are looked at.

    Raises:
        BitfrontError: with what to do instead.
    """
    method = [word for word in words if word.startswith("quant=")][-1]
    if method.partition("=")[2] not in compose.options("quant"):
        return  # is refused with the others
    if not calibrated(compose.load([words[0], method, "data=generated"]).values):
        raise BitfrontError(
            f"{method} is none of those after training, rtn, gptq, gsq and decoupleq; train with {module('run')} "
            f"{words[0]} data={chosen.data} model={chosen.model} {method}, or with bitfront.prepare in your own loop"
        )


def _out(chosen: Options, method: str) -> Path:
    """Where the file goes.

    Raises:
        BitfrontError: another file is there that it would take the place of, or there is no such folder.
    """
    name = chosen.model.rstrip("/").replace(":", "/").rpartition("/")[2]
    out = Path(chosen.out or f"{name}-{method}.safetensors")
    if not out.absolute().parent.is_dir():
        raise BitfrontError(f"out={out}: there is no folder '{out.absolute().parent}'")
    if out.is_dir():
        raise BitfrontError(f"out={out} is a folder; give the name of a file, as out={out / 'my.safetensors'}")
    if out.exists():
        with open(out, "rb") as file:
            if b'"bitfront"' not in file.read(HEADER):
                raise BitfrontError(f"out={out} is there and is none of our files; give another name")
    return out
