"""The flow of one cell, the same for every task and method."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, distributed, nn

from bitfront.cells import compose
from bitfront.cells.batchnorm import batch_norms, reestimate
from bitfront.cells.check import check_values, recipe_of
from bitfront.cells.compose import Config
from bitfront.cells.distillation import Distillation
from bitfront.cells.identity import FINGERPRINT, trains
from bitfront.cells.provenance import environment, peak_memory
from bitfront.cells.record import Head, Primary, Record, Sizes
from bitfront.cells.runs import Origin, Run
from bitfront.cells.tracking import Tracker
from bitfront.cells.trainer import accelerator, check_trainer, fit, meet
from bitfront.cells.training import Training
from bitfront.cells.usage import elsewhere
from bitfront.data.folders import unsplit
from bitfront.data.identified import outline
from bitfront.downloads import sha256
from bitfront.errors import ArtifactError, BitfrontError
from bitfront.processes import processes, rank
from bitfront.progress import phase
from bitfront.quant.core import Distilled, FixedBits, Float, Method, Sampled
from bitfront.quant.engine.calibration import PostTraining
from bitfront.quant.engine.plan import Calibration
from bitfront.quant.engine.sized import sized
from bitfront.quant.forwards.narrow import check_convolutions
from bitfront.quant.forwards.together import together
from bitfront.quant.model import QuantizedModel
from bitfront.quant.storage.artifact import Artifact, check_storable, float_bytes
from bitfront.quant.storage.weights import load_weights, ours
from bitfront.tasks.core import Task, to_device
from bitfront.tasks.notes import overlap, say


def build_task(config: Config) -> Task:
    """The task of a configuration.

    Raises:
        BitfrontError: its values do not fit.
    """
    values, recipe = config.values, recipe_of(config)
    shared = {"recipe": recipe, "data_root": values["data_root"], "seed": values["seed"]}
    try:
        task: Task = _built("task", config.task, values["task"], **shared)
    except BitfrontError as error:
        if f"there is no model={values.get('model')}" not in str(error):
            raise
        raise BitfrontError(f"{error}\n{elsewhere(config.task)}") from None
    if not recipe.epochs and values["init_from"] is None and not task.pretrained:
        raise BitfrontError("train.epochs=0 only measures; give init_from=<file>, or epochs to train from scratch")
    return task


def rebuilt(config: Config, where: Path) -> tuple[Task, nn.Module]:
    """The task that a file names, and its network without the file's weights.

    Raises:
        BitfrontError: what the file says of them does not fit.
    """
    try:
        task = build_task(config)
        return task, task.model()
    except BitfrontError:
        raise
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ArtifactError(f"no network comes of what '{where}' says of its task ({error})") from None


def build_method(config: Config) -> Method:
    """The method of a configuration, likewise."""
    return _built("quant", config.method, config.values["quant"])


def _built(group: str, name: str, values: dict[str, Any], **more: Any) -> Any:
    """The object of a choice: of the class that our configuration, or the user's own, has for the name."""
    place, _, kind = compose.target(group, name).rpartition(".")
    try:
        return getattr(import_module(place), kind)(**values, **more)
    except (ImportError, AttributeError, ValueError) as error:
        raise BitfrontError(f"there is no {place}.{kind}, of which {group}={name} is to be ({error})") from None
    except TypeError as error:
        raise BitfrontError(f"{group}={name}: {error}") from None


def execute(config: Config, words: list[str], origin: Origin | None, run: Run) -> Record:
    """Run a cell whose directory is locked; resume its training if it was interrupted.

    Args:
        config: of the cell.
        words: its command line.
        origin: artifact to start from.
        run: where results go.

    Raises:
        BitfrontError: with what the user can do; recorded as the run's failure.
    """
    head = Head(
        id=run.path.name,
        task=config.task,
        method=config.method,
        setting=config.setting,
        seed=config.values["seed"],
        overrides=words,
        config=config.values,
        init_sha256=origin.sha256 if origin else None,
        environment=environment() | _data(config.values),
    )
    try:
        record = _run(config, origin, run, head)
    except BitfrontError as error:
        if rank() == 0:
            with suppress(BitfrontError):  # on a full disk, the first message is the one that counts
                run.fail(vars(head), str(error))
        raise
    if record:
        run.finish(record)
        run.clean()
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
    finished = run.finished()
    if finished is None:
        raise BitfrontError("only process 0 writes results; run this cell in one process")
    return finished


def _data(values: dict[str, Any]) -> dict[str, str]:
    """What tells the data from others in their place, where the configuration does not."""
    place = Path(values["data_root"]) / str(values["task"].get("data"))
    return {} if FINGERPRINT in values["task"] or not place.is_dir() else {"data": outline(place)}


def _run(config: Config, origin: Origin | None, run: Run, head: Head) -> Record | None:
    """The record; None in all processes but the first."""
    trainer = config.values["trainer"]
    device = torch.device(accelerator(trainer["accelerator"]))
    check_values(config)
    task, method = build_task(config), build_method(config)
    check_trainer(trainer, device)
    meet(trainer)
    stages: dict[str, dict[str, float]] = {}
    with _measured("attach", stages), together():
        model = _attached(config, task, method, origin, device, run)
    history: list[dict[str, float]] = []
    tracker = Tracker(config.values["wandb"] if rank() == 0 else "disabled", head, run.path)
    try:
        pretrained = task.pretrained and isinstance(method, Float)
        if trains(config.values) and task.recipe.epochs and not pretrained:
            training = Training(model, task, method, run.checkpoint, tracker, _loss(task, method, origin))
            with _measured("train", stages):
                fit(training, trainer)
            history = training.history
            stages["train"]["seconds"] = training.seconds  # of interrupted attempts too
        if method.reestimate_bn:
            with _measured("reestimate_bn", stages):
                reestimate(model, task, device)
        if rank() > 0:  # process 0 alone saves and measures, so that the numbers do not depend on how many there are
            return None
        record = _saved(config, task, model.cpu().eval(), device, run, head, stages=stages, history=history)
        tracker.finish(record)
        return record
    finally:
        tracker.close()


def _saved(
    config: Config, task: Task, model: QuantizedModel, device: torch.device, run: Run, head: Head, **made: Any
) -> Record:
    """Save the network, measure the file, and sum up."""
    model.save(run.artifact, about(config))
    with _measured("evaluate", made["stages"]):
        metrics = evaluate(task, run.artifact, device, config.values["offload"])
    name, higher = task.primary
    return Record(
        **vars(head),
        **made,
        primary=Primary(name, higher, metrics["test"][name]),
        metrics=metrics,
        sizes=sizes(model, run.artifact),
        widths=model.widths(),
        device=torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        processes=processes()[1],
        calibration=model.log,
        samples={split: len(task.loader(split, shared=False).dataset) for split in metrics},  # type: ignore[arg-type]
        artifact=str(run.artifact),
        artifact_sha256=sha256(run.artifact),
    )


def about(config: Config) -> dict[str, Any]:
    """What a file says of its task: enough to build the network and to measure it as in its run (``recorded``)."""
    values = {"task": config.values["task"], "train": {"batch_size": config.values["train"]["batch_size"]}}
    return {"task": config.task, "config": values, "smoke": config.values["smoke"]}


def evaluate(task: Task, artifact: Path, device: torch.device, offload: str = "") -> dict[str, dict[str, float]]:
    """Metrics of an artifact file, by split, in a fresh float network; where its parts stay, as in ``Offload``."""
    network = task.model()
    Artifact.load(artifact).load_into(network)
    data = Calibration([], task.loss, task.blocks(network), device=device, offload=offload)
    rest = data.offloaded(network if offload else network.to(device))
    with rest.streamed(), rest.reaching():
        return {split: task.evaluate(network, split, device, shared=False) for split in ("valid", "test")}


def sizes(model: QuantizedModel, artifact: Path) -> Sizes:
    """Bytes of the file (the size that counts), of its tensors, and of the float network's; MB by the papers' rule."""
    return Sizes(
        file=artifact.stat().st_size,
        payload=Artifact.load(artifact).payload,
        float=float_bytes(model.network),
        rule_mb=model.megabytes().item(),
        parameters=sum(p.numel() for p in model.network.parameters()),
    )


def _attached(
    config: Config, task: Task, method: Method, origin: Origin | None, device: torch.device, run: Run
) -> QuantizedModel:
    if isinstance(method, PostTraining) and not origin and not task.pretrained:
        raise BitfrontError("this method quantizes trained weights; give init_from=float or init_from=<artifact>")
    if isinstance(method, PostTraining) and device.type == "mps":
        raise BitfrontError("calibration needs float64, which mps does not have; give trainer.accelerator=cpu")
    if isinstance(method, Distilled) and method.distill:
        if not task.answering:
            raise BitfrontError(f"quant.distill needs {type(task).__name__}.answers: what the network says of a batch")
        if not origin and not task.pretrained:
            raise BitfrontError("quant.distill follows the network that the training starts from; give init_from=float")
    pl.seed_everything(task.seed, verbose=False)
    with phase("building the network"):
        network = _network(task, origin)
        check_storable(network)
        check_convolutions(network, device, "task.dtype=float32")
        if origin:
            data = config.values["task"].get("data", "")
            own = config.values["task"].get(FINGERPRINT) and not ours(Path(origin.path))
            if own and unsplit(data, config.values["data_root"]):
                say(overlap(data, origin.path))
    if method.reestimate_bn and not batch_norms(network):
        raise BitfrontError("the network has no batch norm; leave out quant.reestimate_bn")
    if config.values["smoke"]:
        method = method.fitting(network)
    if isinstance(method, FixedBits) and not method.max_size:
        own = method.eligible(network)
        layers = {name: settings for name, settings in task.layers(network).items() if name in own}
        method = replace(method, layers=layers | (method.layers or {}))
    try:
        if method.max_size and isinstance(method, FixedBits):
            data = _calibration(config, task, method, network, device, run)
            method = sized(method, network if data.offload else network.to(device), data, about(config))
        if not isinstance(method, PostTraining):
            model = method.attach(network)
            if method.steered:
                model.steer(about=about(config))
            return model
        data = _calibration(config, task, method, network, device, run)
        return method.attach(network if data.offload else network.to(device), data)
    except torch.OutOfMemoryError as error:
        raise BitfrontError(f"the GPU's memory is full ({error}); lower quant.batch_size") from None


def _network(task: Task, origin: Origin | None) -> nn.Module:
    """The network that the run begins with."""
    network = task.model() if origin else task.initial()
    if origin:
        load_weights(Path(origin.path), network)
    return network


def _loss(task: Task, method: Method, origin: Origin | None) -> Callable[[nn.Module, Any], Tensor]:
    """What is trained on."""
    if not isinstance(method, Distilled) or not method.distill:
        return task.loss
    with phase("building the network to follow"):
        return Distillation(task, _network(task, origin), method.distill)


def _calibration(
    config: Config, task: Task, method: Sampled, network: nn.Module, device: torch.device, run: Run
) -> Calibration:
    return Calibration(
        batches=task.calibration(method.samples, method.batch_size, shared=True),
        run=lambda net, batch: task.loss(net, to_device(batch, device)),
        blocks=task.blocks(network),
        loss=(lambda net, batch, rng: task.drawn_loss(net, to_device(batch, device), rng)) if task.answering else None,
        valid=task.valid,
        states=run.blocks,
        seed=task.seed,
        device=device,
        offload=config.values["offload"],
    )


@contextmanager
def _measured(stage: str, stages: dict[str, dict[str, float]]) -> Iterator[None]:
    began = time.perf_counter()
    yield
    stages[stage] = {"seconds": time.perf_counter() - began, "peak_memory": peak_memory()}
    if torch.cuda.is_initialized():
        stages[stage]["peak_gpu_memory"] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
