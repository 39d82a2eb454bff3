"""Metrics of an artifact file, measured as in its run: loaded into a fresh float network.

python -m src.evaluate artifact=runs/vit/diffq/<id>/model.safetensors
python -m src.evaluate artifact=runs/asr/lsq/<id>/model.safetensors task.beam=50    otherwise than in its run
python -m src.evaluate artifact=<file> task=vit                                     a file that does not name its task
python -m src.evaluate artifact=<file> data=<folder>                                on other data of your own
python -m src.evaluate artifact=<file> lm_eval=piqa,arc_easy   a language model, on EleutherAI's lm-eval instead

offload=cpu|disk where a network larger than the device stays but for the block at work
lm_eval_path=    folder of tasks of your own, yaml files as that package has them
lm_eval_limit=   samples of a task, the first ones; 0 = all
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bitfront.cells import compose
from bitfront.cells.compose import Config
from bitfront.cells.identity import FINGERPRINT
from bitfront.cells.record import FILE, Record, read
from bitfront.cells.recorded import recorded
from bitfront.commands.options import options
from bitfront.commands.options import usage as usage_of
from bitfront.console import CONSOLE
from bitfront.errors import BitfrontError
from bitfront.progress import phase

if TYPE_CHECKING:
    from bitfront.tasks.harness import Score


@dataclass
class Options:
    """Of the command; the task is the file's own, unless one is named."""

    artifact: str = ""
    data_root: str = "data"
    accelerator: str = "auto"
    task: str = ""
    offload: str = ""
    lm_eval: str = ""
    lm_eval_path: str = ""
    lm_eval_limit: int = 0


def usage() -> str:
    """The help."""
    return usage_of(__doc__, Options)


def main(words: list[str]) -> None:
    """Print every metric with all its digits, and whether the run's record says the same; without a word, the help.

    Raises:
        BitfrontError: as ``evaluate`` and ``on_harness`` do.
    """
    if not words:
        CONSOLE.print(usage())
        return
    changes = [word for word in words if word.startswith(("task.", "data="))]
    chosen = options(Options, [word for word in words if word not in changes])
    artifact = Path(chosen.artifact)
    if chosen.lm_eval:
        if chosen.offload:
            raise BitfrontError("lm_eval= has all of the network on the device; leave out offload=")
        _print(artifact, on_harness(chosen, changes))
        return
    if chosen.lm_eval_path or chosen.lm_eval_limit:
        raise BitfrontError("lm_eval_path= and lm_eval_limit= are of lm_eval=<task>,<task>")
    metrics = evaluate(artifact, chosen.data_root, chosen.accelerator, changes, chosen.task, chosen.offload)
    _print(artifact, metrics)
    record = read(artifact.with_name(FILE))
    if record and not differing(changes, record):
        CONSOLE.print(compared(metrics, record))


def _print(artifact: Path, metrics: Mapping[str, Mapping[str, object]]) -> None:
    CONSOLE.print(f"{artifact}: {artifact.stat().st_size:,} bytes")
    for split, values in metrics.items():
        CONSOLE.print(f"  {split}: {', '.join(f'{name} {value}' for name, value in values.items())}")


def evaluate(
    artifact: Path,
    data_root: str,
    accelerator: str,
    changes: Sequence[str] = (),
    task: str = "",
    offload: str = "",
) -> dict[str, dict[str, float]]:
    """Metrics by split.

    Args:
        artifact: the file.
        data_root: where data sets are.
        accelerator: as ``trainer.accelerator``.
        changes: words ``task.<key>=<value>``, for keys of the task that are to differ from its run.
        task: instead of the one that the file names.
        offload: "cpu" or "disk", where a network stays that is larger than the device, but for the block at work.

    Raises:
        BitfrontError: the file, the data or the device is not there, or a key or value does not fit the task.
    """
    config = _config(artifact, data_root, changes, task)
    import torch

    from bitfront.cells import flow, trainer

    was = config.values["task"].get(FINGERPRINT)
    if was not in (None, now := compose.fingerprinted(config).values["task"].get(FINGERPRINT)):
        CONSOLE.print(f"the data in '{config.values['task']['data']}' are not those of its run ({now}, not {was})")
    training = config.values["train"]  # whose loaders may be for a larger machine
    training["workers"] = min(training["workers"], os.cpu_count() or 1)
    problem, _ = flow.rebuilt(config, artifact)
    return flow.evaluate(problem, artifact, torch.device(trainer.accelerator(accelerator)), offload)


def on_harness(chosen: Options, changes: Sequence[str] = ()) -> dict[str, dict[str, Score]]:
    """Scores of a language model's artifact, by task of the harness.

    Raises:
        BitfrontError: as ``evaluate``, or a task of the harness cannot be had.
    """
    if chosen.lm_eval_limit < 0:
        raise BitfrontError(f"lm_eval_limit={chosen.lm_eval_limit}: give a number of samples, or 0 for all")
    artifact = Path(chosen.artifact)
    config = _config(artifact, chosen.data_root, changes, chosen.task)
    import torch

    from bitfront.cells import flow, trainer
    from bitfront.quant.storage.artifact import Artifact
    from bitfront.tasks.harness import Harness

    device = torch.device(trainer.accelerator(chosen.accelerator))
    harness = Harness(chosen.lm_eval.split(","), chosen.lm_eval_path)
    problem, network = flow.rebuilt(config, artifact)
    Artifact.load(artifact).load_into(network)
    return harness.scores(network.to(device), problem, chosen.lm_eval_limit)


def _config(artifact: Path, data_root: str, changes: Sequence[str], task: str) -> Config:
    """What a file says of its task, or of the one that is named."""
    if not artifact.is_file():
        raise BitfrontError(f"there is no artifact at '{artifact}'; give artifact=<run directory>/model.safetensors")
    with phase("loading PyTorch"):
        from bitfront.quant.storage.artifact import Artifact

    about = Artifact.load(artifact).about
    config = recorded(about | {"task": task} if task else about, str(artifact), changes)
    config.values["data_root"] = data_root
    return config


def differing(changes: Sequence[str], record: Record) -> list[str]:
    """The words that give a task's key another value than a run had; where the user's own data lie is none."""
    task = record.config["task"]
    keys = {word: word.partition("=")[0].removeprefix("task.") for word in changes}
    places = {"data"} if FINGERPRINT in task else set()
    return [w for w, key in keys.items() if key not in places and str(task.get(key)) != w.partition("=")[2]]


def compared(metrics: Mapping[str, Mapping[str, float]], record: Record) -> str:
    """Whether a run's record says the same, and else by how much it differs at most; in the last digits it does where
    it was made on another device.
    """

    def difference(found: float, value: float) -> float:
        if found == value or (math.isnan(found) and math.isnan(value)):
            return 0.0
        relative = abs(found - value) / abs(value) if value else math.inf
        return math.inf if math.isnan(relative) else relative

    most = max(
        difference(metrics[split].get(name, math.nan), value)
        for split, values in record.metrics.items()
        for name, value in values.items()
    )
    if not most:
        return "the same as in its record"
    return f"its record, made on {record.device}, differs by up to {100 * most:.2g} %: {record.metrics}"
