"""ONNX of a file: of a run's, whose task has the network and the inputs, or of one of the user's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from bitfront.cells import compose
from bitfront.cells.flow import rebuilt
from bitfront.cells.recorded import recorded
from bitfront.cells.single import Chosen, inputs
from bitfront.data.source import found
from bitfront.errors import BitfrontError
from bitfront.exports.onnx.examples import SAMPLES, Example
from bitfront.exports.onnx.network import Exported, export
from bitfront.library import call, drawn
from bitfront.models import named
from bitfront.quant.storage.artifact import Artifact


def exported(
    file: Path, out: Path, chosen: Chosen, data: str, data_root: str, words: Sequence[str], accuracy_level: int | None
) -> Exported:
    """Write it.

    Args:
        file: an artifact.
        out: the ONNX file.
        chosen: the user's own network; the file's task counts if its ``model`` is empty.
        data: that the network's inputs are taken from; of a task, where they are instead of in its run.
        data_root: folder of the data sets.
        words: ``task``, ``task.<key>=<value>``, as ``evaluate`` takes them.
        accuracy_level: as of ``exports.onnx.network.export``.

    Raises:
        BitfrontError: the file, the network or the data are not there, do not fit, or as ``export`` does.
    """
    artifact = Artifact.load(file)
    if chosen.model:
        network, examples = _of_their_own(artifact, chosen, data, data_root, words)
    else:
        network, examples = _of_task(artifact, file, [*words, *([f"data={data}"] if data else [])], data_root)
    return export(network, artifact, examples, out, accuracy_level)


def _of_task(artifact: Artifact, file: Path, words: Sequence[str], data_root: str) -> tuple[nn.Module, list[Example]]:
    named_task = {key: value for key, _, value in (word.partition("=") for word in words) if key == "task"}
    changes = [word for word in words if not word.startswith("task=")]
    if "task" not in artifact.about | named_task:
        raise BitfrontError(f"'{file}' names no task of ours; give model= and data= of your network, or task=<name>")
    config = recorded(artifact.about | named_task, str(file), changes)
    config.values["data_root"] = data_root
    task, network = rebuilt(config, file)
    batches = [
        *task.calibration(SAMPLES, SAMPLES),
        *task.calibration(SAMPLES, 1),
    ]  # padded, and of lengths of their own
    return network, Example.some(network, task.use, batches)


def _of_their_own(
    artifact: Artifact, chosen: Chosen, data: str, data_root: str, words: Sequence[str]
) -> tuple[nn.Module, list[Example]]:
    if not data:
        raise BitfrontError("data= is needed with model=, for an example of the inputs; as `quantize` takes it")
    source = found(data, data_root, chosen.model, chosen.classes, False)
    read = [f"task.{key}={json.dumps(value)}" for key, value in artifact.about.get("images", {}).items()]
    config = compose.load(
        [f"task={source.kind}", "quant=rtn", "data=generated", f"data_root={data_root}", *read, *words]
    )
    batches = drawn(inputs(source, config, chosen, SAMPLES), 2 * SAMPLES, SAMPLES)
    if not batches:
        raise BitfrontError(f"data={data} gives no batch")
    network = named.build(chosen.model, chosen.classes or None)
    return network, Example.some(network, call, batches)
