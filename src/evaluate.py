"""Metrics of an artifact file, measured as in its run: loaded into a fresh float network.

python -m src.evaluate artifact=runs/vit/diffq/<id>/model.safetensors
python -m src.evaluate artifact=runs/asr/lsq/<id>/model.safetensors task.beam=50    otherwise than in its run
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from src import config, record
from src.errors import BitfrontError

OPTIONS = {"artifact": "", "data_root": "data", "accelerator": "auto"}
CONSOLE = Console(highlight=False, soft_wrap=True, markup=False)


def main() -> None:
    """Print every metric with all its digits, and whether the run's record says the same."""
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        CONSOLE.print(f"{__doc__}\nOptions: {' '.join(f'{key}={value}' for key, value in OPTIONS.items())}")
        return
    try:
        otherwise = [word for word in words if word.startswith("task.")]
        chosen = config.parse([word for word in words if word not in otherwise], OPTIONS)
        metrics = evaluate(Path(chosen["artifact"]), chosen["data_root"], chosen["accelerator"], otherwise)
    except BitfrontError as error:
        sys.exit(f"error: {error}")
    CONSOLE.print(f"{chosen['artifact']}: {Path(chosen['artifact']).stat().st_size:,} bytes")
    for split, values in metrics.items():
        CONSOLE.print(f"  {split}: {', '.join(f'{name} {value!r}' for name, value in values.items())}")
    recorded = record.read(Path(chosen["artifact"]).with_name(record.RECORD))
    if recorded and recorded["status"] == "finished" and not otherwise:
        CONSOLE.print(compared(metrics, recorded))


def compared(metrics: dict[str, dict[str, float]], recorded: dict[str, Any]) -> str:
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
        for split, values in recorded["metrics"].items()
        for name, value in values.items()
    )
    if not most:
        return "the same as in its record"
    place = recorded.get("device", "cpu")
    return f"its record, made on {place}, differs by up to {100 * most:.2g} %: {recorded['metrics']}"


def evaluate(
    artifact: Path, data_root: str, accelerator: str, otherwise: Sequence[str] = ()
) -> dict[str, dict[str, float]]:
    """Metrics by split.

    Args:
        artifact: the file.
        data_root: where data sets are.
        accelerator: as ``trainer.accelerator``.
        otherwise: words ``task.<key>=<value>``, for keys of the task that are to differ from its run.

    Raises:
        BitfrontError: the file, the data or the device is not there, or a key or value does not fit the task.
    """
    if not artifact.is_file():
        raise BitfrontError(f"there is no artifact at '{artifact}'; give artifact=<run directory>/model.safetensors")
    import torch

    from src import cell, training
    from src.artifact import Artifact

    about = Artifact.load(artifact).about
    if "task" not in about:
        raise BitfrontError(f"'{artifact}' does not say which task it is for; only artifacts of runs do")
    changed = config.changed(about["task"], otherwise)
    task = cell.build_task(about | {"task": changed, "data_root": data_root, "seed": 0})
    return cell.evaluate(task, artifact, torch.device(training.accelerator(accelerator)))


if __name__ == "__main__":
    main()
