"""A network of the user's, quantized after training and measured before and after, without a run of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitfront.cells.batchnorm import batch_norms, reestimate
from bitfront.cells.compose import Config
from bitfront.cells.flow import build_method, build_task
from bitfront.cells.trainer import accelerator
from bitfront.data import unlabelled
from bitfront.data.folders import unsplit
from bitfront.data.imagenet import view
from bitfront.data.source import FOLDER, Source
from bitfront.errors import BitfrontError, first_line
from bitfront.library import call, drawn, load, not_padded, quantize
from bitfront.models import named
from bitfront.quant.engine.blockwise import floats
from bitfront.quant.engine.calibration import PostTraining
from bitfront.quant.forwards.captured import copied
from bitfront.quant.forwards.undisturbed import undisturbed
from bitfront.quant.layers.uses import inside
from bitfront.quant.model import QuantizedModel
from bitfront.quant.storage.artifact import float_bytes
from bitfront.quant.storage.weights import load_weights
from bitfront.tasks.core import Task, to_device
from bitfront.tasks.notes import overlap

HELD = 0.25  # of so many samples as calibrate, more that outputs are compared on
LENGTH, RATE, SECONDS = 128, 16000, 30.0  # tokens of a line; Hz and length of a recording
READING = ("image_size", "mean", "std", "interpolation", "crop_share")  # of images: the task's options
FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass
class Chosen:
    """The network, and where all goes.

    Attributes:
        model: as ``models.named.build`` takes it.
        weights: a file, "pretrained", or "" for what a folder has.
        classes: outputs; 0 for as many as the data have classes.
        accelerator: where to compute.
        out: the file.
    """

    model: str
    weights: str
    classes: int
    accelerator: str
    out: Path


def quantized(source: Source, config: Config, chosen: Chosen) -> Iterator[str]:
    """Quantize, and tell line by line what came out.

    Raises:
        BitfrontError: the network cannot be built, its weights or the data do not fit it, or as in ``quantize``.
    """
    device = torch.device(accelerator(chosen.accelerator))
    method = build_method(config)
    assert isinstance(method, PostTraining)
    task = build_task(config) if source.labelled else None
    torch.manual_seed(config.values["seed"])
    about: dict[str, Any] = {"model": chosen.model, "quant": config.method, "setting": config.setting}
    about |= {"images": {key: config.values["task"][key] for key in READING}} if source.kind == "images" else {}
    network = _weighted(chosen, task).to(device).eval()
    with _fitting(source, chosen):
        if source.kind == "images" and source.files:
            yield _as_images_are_read(config)
        if task and chosen.weights != "pretrained" and unsplit(source.name, config.values["data_root"]):
            yield overlap(source.name, chosen.weights or chosen.model)
        work = _Labelled(task, method, device) if task else _Unlabelled(source, config, chosen, method)
        yield f"{chosen.model}: {work.measured(network)}"
    with _enough_memory():
        model = work.quantized(network, about)
    size = model.save(chosen.out, about)
    again = load(chosen.out, into=_built(chosen, task)).to(device).eval()
    yield model.summary(about)
    yield f"{chosen.out}: {work.measured(again)}"
    exact = float_bytes(network)
    yield f"{size:,} bytes of {exact:,} ({exact / size:.1f} times smaller)"


def _as_images_are_read(config: Config) -> str:
    size, mean, std = (config.values["task"][key] for key in ("image_size", "mean", "std"))
    return (
        f"images are scaled to {size} x {size} (task.image_size=), their channels have mean {mean} and deviation {std} "
        "(task.mean=, task.std=) taken out: these must be as in the network's training"
    )


class _Labelled:
    """Data whose labels a task's metric compares with the outputs."""

    def __init__(self, task: Task, method: PostTraining, device: torch.device) -> None:
        self.task, self.method, self.device = task, method, device

    def measured(self, network: nn.Module) -> str:
        found = self.task.evaluate(network, "test", self.device)
        told = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
        return f"{told}, on {len(self.task.loader('test').dataset):,} samples for testing"  # type: ignore[arg-type]

    def quantized(self, network: nn.Module, about: Mapping[str, Any]) -> QuantizedModel:
        if self.method.reestimate_bn and not batch_norms(network):
            raise BitfrontError("the network has no batch norm; leave out quant.reestimate_bn")
        model = quantize(
            network,
            replace(self.method, reestimate_bn=False),  # below, on the task's training data
            self.task.calibration(self.method.samples, self.method.batch_size) if self.method.needs_data else None,
            forward=lambda net, batch: self.task.loss(net, to_device(batch, self.device)),
            valid=self.task.valid,
            blocks=self.task.blocks(network),
            seed=self.task.seed,
            about=about,
        )
        if self.method.reestimate_bn:
            reestimate(model, self.task, self.device)
        return model


class _Unlabelled:
    """Data that tell only by how much the outputs change."""

    def __init__(self, source: Source, config: Config, chosen: Chosen, method: PostTraining) -> None:
        self.method = method
        every = iter(inputs(source, config, chosen, method.batch_size))
        self.batches = drawn(every, method.samples, method.batch_size) if method.needs_data else []
        held = drawn(every, max(1, round(HELD * method.samples)), method.batch_size)
        self.unseen, self.measuring = bool(held), held or self.batches
        if not self.measuring:
            raise BitfrontError(f"data={source.name} gives no batch")
        self.exact: nn.Module | None = None

    @torch.no_grad()
    def measured(self, network: nn.Module) -> str:
        if self.exact is None:
            self.exact = network
            _counting(network, self.measuring[0])  # refused before the work, if it does not fit
            others = len(self.measuring) if self.unseen else 0
            return f"{len(self.batches)} batches to calibrate on, {others} others to compare outputs on"
        power = error = 0.0
        for batch in self.measuring:
            pairs = zip(_counting(network, batch), _counting(self.exact, batch), strict=True)
            for ours, exact in pairs:
                power += exact.square().sum().item()
                error += (ours - exact).square().sum().item()
        on = "batches that it was not calibrated on" if self.unseen else "the batches that it was calibrated on"
        return f"the outputs' power of error is {100 * error / (power or 1.0):.3g} % of their power, on {on}"

    def quantized(self, network: nn.Module, about: Mapping[str, Any]) -> QuantizedModel:
        return quantize(network, self.method, self.batches, about=about)


def _counting(network: nn.Module, batch: Any) -> list[Tensor]:
    """The numbers of the outputs that are finite and, where that can be told, none of padding."""
    valid = not_padded(batch)
    with undisturbed(network):
        found = floats(call(network, copied(batch)))
    kept = [None if valid is None else valid if t.shape == valid.shape else inside(t, valid) for t in found]
    counting = [(t if mask is None else t[mask]).double() for t, mask in zip(found, kept, strict=True)]
    return [t.masked_fill(t.isinf(), 0.0) for t in counting]


def inputs(source: Source, config: Config, chosen: Chosen, batch_size: int) -> Iterable[Any]:
    """Batches, as ``library.call`` passes them to the network."""
    folder = Path(chosen.model.removeprefix(FOLDER)) if chosen.model.startswith(FOLDER) else None
    if not source.files:
        given = unlabelled.batches(source.name)
        return given.split(batch_size) if isinstance(given, Tensor) else given
    if source.kind == "audio":
        return unlabelled.sounds(source.files, RATE, SECONDS, folder)
    if source.kind == "text":
        if folder is None:
            raise BitfrontError("texts for a function's network have labels: its next tokens; leave labels=false out")
        return unlabelled.lines(source.files, folder, batch_size, LENGTH)
    task = config.values["task"]
    options = {"interpolation": task["interpolation"], "crop_pct": task["crop_share"]}
    return unlabelled.photos(
        source.files, view(task["image_size"], False, task["mean"], task["std"], **options), batch_size
    )


def _built(chosen: Chosen, task: Task | None) -> nn.Module:
    """The network without its weights."""
    return task.model() if task else named.build(chosen.model, chosen.classes or None)


def _weighted(chosen: Chosen, task: Task | None) -> nn.Module:
    own = chosen.model.startswith(FOLDER)
    if chosen.weights == "pretrained" or (own and not chosen.weights):
        return named.build(chosen.model, chosen.classes or None, pretrained=True)
    named.check(chosen.model)
    if not chosen.weights and ":" not in chosen.model:
        raise BitfrontError(
            f"model={chosen.model} needs weights=<file>, or weights=pretrained to download the library's"
        )
    network = _built(chosen, task)
    if chosen.weights:
        load_weights(Path(chosen.weights), network)
    return network


@contextmanager
def _fitting(source: Source, chosen: Chosen) -> Iterator[None]:
    """Whatever a network raises that is given other inputs than it takes."""
    try:
        with _enough_memory():
            yield
    except BitfrontError:
        raise
    except FAULTS as error:
        raise BitfrontError(
            f"model={chosen.model} does not run on data={source.name} ({type(error).__name__}: {first_line(error)}); "
            "give data=<package.module>:<function> with batches as its forward takes them"
        ) from None


@contextmanager
def _enough_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise BitfrontError(f"the GPU's memory is full ({first_line(error)}); lower quant.batch_size") from None
