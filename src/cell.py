"""The flow of one cell, the same for every task and method."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import get_class
from torch import distributed, nn

from src import record
from src.artifact import Artifact
from src.batchnorm import batch_norms, reestimate
from src.errors import BitfrontError
from src.quant.calibration import PostTraining
from src.quant.core import Float, Method, QuantizedModel
from src.quant.plan import Calibration
from src.record import Run
from src.tasks.core import Task, processes, to_device
from src.tracking import Tracker
from src.training import Training, accelerator, fit


def build(node: Mapping[str, Any], **shared: Any) -> Any:
    """The object that a configuration node describes: its ``_target_`` called with its other keys.

    Raises:
        BitfrontError: the class does not take these keys.
    """
    arguments = {key: value for key, value in node.items() if key != "_target_"}
    try:
        return get_class(node["_target_"])(**arguments, **shared)
    except TypeError as error:
        raise BitfrontError(f"{node['_target_']}: {error}") from None


def build_task(cell: Mapping[str, Any]) -> Task:
    """The task of a composed configuration."""
    return build(cell["task"], **cell["train"], data_root=cell["data_root"], seed=cell["seed"], smoke=cell["smoke"])


def execute(
    cell: dict[str, Any], overrides: list[str], start: dict[str, str] | None, run: Run, rank: int
) -> dict[str, Any]:
    """Run a cell whose directory is locked; resume its training if it was interrupted.

    Args:
        cell: as ``config.load`` gives it.
        overrides: the command line.
        start: artifact to start from, and its hash.
        run: where results go.
        rank: number of this process; 0 writes.

    Returns:
        The record.

    Raises:
        BitfrontError: with what the user can do; recorded as the run's failure.
    """
    about = {
        "id": run.path.name,
        "task": cell["names"]["task"],
        "method": cell["names"]["quant"],
        "setting": cell["setting"],
        "seed": cell["seed"],
        "overrides": overrides,
        "config": {key: value for key, value in cell.items() if key not in ("names", "setting")},
        "init_sha256": start["sha256"] if start else None,
        "environment": record.environment(),
    }
    try:
        result = {"status": "finished"} | about | _run(cell, start, run, rank, about)
    except BitfrontError as error:
        if rank == 0:
            with suppress(BitfrontError):  # on a full disk, the first message is the one that counts
                run.write({"status": "failed", "error": str(error)} | about)
        raise
    if rank == 0:
        run.write(result)
        run.clean()
    _barrier()
    finished = run.finished()
    if finished is None:
        raise BitfrontError("only process 0 writes results; run this cell in one process")
    return finished


def _run(
    cell: dict[str, Any], start: dict[str, str] | None, run: Run, rank: int, about: dict[str, Any]
) -> dict[str, Any]:
    device = torch.device(accelerator(cell["trainer"]["accelerator"]))
    task, method = build_task(cell), build(cell["quant"])
    stages: dict[str, dict[str, float]] = {}
    with _measured("attach", stages):
        model = _attached(task, method, start, device, run)
    history: list[dict[str, float]] = []
    tracker = Tracker(cell["wandb"] if rank == 0 else "disabled", about, run.path)
    try:
        if method.trains and not (task.pretrained and isinstance(method, Float)):

            def log(numbers: dict[str, float]) -> None:
                if tracker.run is not None:
                    tracker.log(int(numbers["epoch"]), numbers, model.widths())

            with _measured("train", stages):
                training = Training(model, task, method, run.checkpoint, log)
                fit(training, cell["trainer"])
                history = training.history
            stages["train"]["seconds"] = training.seconds  # of interrupted attempts too
        if method.reestimate_bn:
            with _measured("reestimate_bn", stages):
                reestimate(model, task, device)
        model = model.cpu().eval()
        if rank > 0:  # process 0 alone saves and measures, so that the numbers do not depend on how many there are
            return {}
        model.save(run.artifact, {"task": cell["task"], "train": cell["train"], "smoke": cell["smoke"]})
        with _measured("evaluate", stages):
            metrics = evaluate(task, run.artifact, device)
        name, higher = task.primary
        result: dict[str, Any] = {
            "primary": {"name": name, "higher_is_better": higher, "value": metrics["test"][name]},
            "metrics": metrics,
            "sizes": sizes(model, run.artifact),
            "widths": model.widths(),
            "stages": stages,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
            "processes": processes()[1],
            "history": history,
            **({"calibration": model.log} if model.log else {}),
            "artifact": str(run.artifact),
            "artifact_sha256": record.sha256(run.artifact),
        }
        tracker.finish(result, run.artifact)
        return result
    finally:
        tracker.close()


def evaluate(task: Task, artifact: Path, device: torch.device) -> dict[str, dict[str, float]]:
    """Metrics of an artifact file, by split, in a fresh float network."""
    network = task.model()
    Artifact.load(artifact).load_into(network)
    return {split: task.evaluate(network.to(device), split, device, shared=False) for split in ("valid", "test")}


def sizes(model: QuantizedModel, artifact: Path) -> dict[str, float]:
    """Bytes of the file (the size that counts), of its tensors, and of the float network's; MB by the papers' rule."""
    state = model.network.state_dict(keep_vars=True).values()
    return {
        "file": artifact.stat().st_size,
        "payload": Artifact.load(artifact).payload,
        "float": sum(t.numel() * t.itemsize for t in {id(t): t for t in state}.values()),
        "rule_mb": model.megabytes().item(),
        "parameters": sum(p.numel() for p in model.network.parameters()),
    }


def _attached(
    task: Task, method: Method, start: dict[str, str] | None, device: torch.device, run: Run
) -> QuantizedModel:
    if method.after_training and not start:
        raise BitfrontError("this method quantizes trained weights; give init_from=float or init_from=<artifact>")
    if method.after_training and device.type == "mps":
        raise BitfrontError("calibration needs float64, which mps does not have; give trainer.accelerator=cpu")
    pl.seed_everything(task.seed, verbose=False)
    network = task.model() if start else task.initial()
    if start:
        Artifact.load(start["artifact"]).load_into(network)
    if method.reestimate_bn and not batch_norms(network):
        raise BitfrontError("the network has no batch norm; leave out quant.reestimate_bn")
    if task.smoke:
        method = method.fitting(network)
    if not isinstance(method, PostTraining):
        return method.attach(network)
    try:
        return method.attach(network.to(device), _calibration(task, method, network, device, run))
    except torch.OutOfMemoryError as error:
        raise BitfrontError(f"the GPU's memory is full ({error}); lower quant.batch_size") from None


def _calibration(task: Task, method: PostTraining, network: nn.Module, device: torch.device, run: Run) -> Calibration:
    return Calibration(
        batches=task.calibration(method.samples, method.batch_size),
        run=lambda net, batch: task.loss(net, to_device(batch, device)),
        blocks=task.blocks(network),
        valid=task.valid,
        states=run.blocks,
        seed=task.seed,
    )


@contextmanager
def _measured(stage: str, stages: dict[str, dict[str, float]]) -> Iterator[None]:
    began = time.perf_counter()
    yield
    stages[stage] = {"seconds": time.perf_counter() - began, "peak_memory": record.peak_memory()}
    if torch.cuda.is_initialized():
        stages[stage]["peak_gpu_memory"] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()


def _barrier() -> None:
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
