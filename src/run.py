"""One cell of the suite, from configuration to record.

    python -m src.run task=vit quant=diffq penalty=5
    python -m src.run -m task=vit quant=diffq penalty=1,2,5

build -> start from an artifact -> attach -> train -> save -> reload into a fresh float network -> evaluate -> record.
torch is imported only once there is something to do.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

from src import config, record, tracking
from src.errors import BitfrontError
from src.record import Run

CONSOLE = Console(highlight=False, soft_wrap=True, markup=False)


def main() -> None:
    """Check the command line, then hand it to Hydra."""
    words = sys.argv[1:]
    if "-h" in words or "--help" in words:
        CONSOLE.print(config.usage())
        return
    try:
        config.check(words)
        if config.sweeps(words):
            from src import sweep

            words = [word for word in words if word not in ("-m", "--multirun")]
            if flags := [word for word in words if word.startswith("-")]:
                raise BitfrontError(f"a sweep takes no {flags[0]}; leave it, or -m, out")
            sweep.main(words)
        else:
            job()
    except BitfrontError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")


@hydra.main(version_base="1.3", config_path=str(config.CONF), config_name="config")
def job(_: DictConfig) -> None:
    """A single run."""
    try:
        run_cell(list(HydraConfig.get().overrides.task))
    except BitfrontError as error:
        sys.exit(f"error: {error}")


def run_cell(overrides: list[str], nested: bool = False) -> dict[str, Any]:
    """Run a cell, unless it is finished already; resume it if it was interrupted.

    Args:
        overrides: as on the command line, without sweeps.
        nested: on behalf of another cell: no word if it is finished, no error but waiting if another process runs it.

    Returns:
        The record.

    Raises:
        BitfrontError: with what the user can do.
    """
    cell = config.load(overrides)
    start = start_of(cell, overrides)
    run = Run(directory(cell, start))
    if finished := run.finished():
        return _found(finished, cell, run, nested)
    if "sft" in cell["quant"] and (rank() > 0 or "RANK" in os.environ):
        raise BitfrontError("calibration is for one process; run this cell without torchrun, with trainer.devices=1")
    if rank() > 0:
        return _execute(cell, overrides, start, run)
    with run.locked(wait=nested):
        if finished := run.finished():  # by another process in the meantime
            return _found(finished, cell, run, nested)
        if run.checkpoint.is_file():
            CONSOLE.print(f"resuming '{run.path}' after its last finished epoch")
        elif run.blocks.is_dir():
            CONSOLE.print(f"resuming '{run.path}' after block {len(list(run.blocks.glob('[0-9]*.pt')))}")
        finished = _execute(cell, overrides, start, run)
    CONSOLE.print(summary(finished))
    return finished


def _found(finished: dict[str, Any], cell: dict[str, Any], run: Run, nested: bool) -> dict[str, Any]:
    if not nested:
        CONSOLE.print(f"{summary(finished)}\nfinished before; to run it again, delete {run.path}")
        if tracking.under_agent() and rank() == 0:
            tracking.mirror(cell["wandb"], finished)
    return finished


def start_of(cell: dict[str, Any], overrides: list[str]) -> dict[str, str] | None:
    """The artifact that a cell starts from: its path and hash, or None. "float" is trained first if there is none."""
    place = cell["init_from"]
    if place is None:
        return None
    if place != "float":
        if not Path(place).is_file():
            raise BitfrontError(f"init_from={place}: no such file; give a model.safetensors, or float, or null")
        return {"artifact": place, "sha256": record.sha256(Path(place))}
    overrides = float_start(cell, overrides) or []
    if not Run(directory(config.load(overrides), None)).finished():
        command = f"python -m src.run {shlex.join(overrides)}"
        if "RANK" in os.environ:
            raise BitfrontError(f"under torchrun, first run the start by itself: {command}")
        from src.cell import build, build_task

        build_task(cell), build(cell["quant"])  # refuse what cannot work before the start is trained
        CONSOLE.print(f"first the float start, with the task's own recipe: {command}")
    return as_start(run_cell(overrides, nested=True))


def as_start(floating: dict[str, Any]) -> dict[str, str]:
    """What a cell that starts from a finished run knows of it."""
    return {"artifact": floating["artifact"], "sha256": floating["artifact_sha256"]}


def float_start(cell: dict[str, Any], overrides: list[str]) -> list[str] | None:
    """The command line of the float cell that a cell starts from; None if it does not start from one."""
    if cell["init_from"] != "float":
        return None
    shared = ["task", "seed", "smoke", "root", "data_root", "wandb", "trainer"]
    shared += [knob for knob, _ in config.knobs("task", cell["names"]["task"])]
    words = [o for o in overrides if o.partition("=")[0].partition(".")[0] in shared]
    # The one W&B run of a sweep's agent is the cell's own.
    return [*words, "quant=float", *(["wandb=disabled"] if tracking.under_agent() else [])]


def directory(cell: dict[str, Any], start: dict[str, str] | None) -> Path:
    """Where a cell's run is."""
    names, init = cell["names"], start["sha256"] if start else None
    return Path(cell["root"]) / names["task"] / names["quant"] / record.identity(cell, init)


def rank() -> int:
    """This process's number among those of the run; only number 0 writes."""
    return int(next((os.environ[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ), 0))


def _execute(cell: dict[str, Any], overrides: list[str], start: dict[str, str] | None, run: Run) -> dict[str, Any]:
    from src.cell import execute

    return execute(cell, overrides, start, run, rank())


def summary(finished: dict[str, Any]) -> str:
    """One line: metric, size, ratio, file."""
    name, value = finished["primary"]["name"], finished["primary"]["value"]
    sizes = finished["sizes"]
    return (
        f"{' '.join([finished['task'], finished['method'], finished['setting']]).strip()}: {name} {value:.4g}, "
        f"{sizes['file']:,} bytes, {sizes['float'] / sizes['file']:.2f}x smaller than float  {finished['artifact']}"
    )


if __name__ == "__main__":
    main()
