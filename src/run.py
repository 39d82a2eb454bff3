"""One cell of the suite, from configuration to record.

    python -m src.run task=vit quant=diffq penalty=5
    python -m src.run -m task=vit quant=diffq penalty=1,2,5

build -> start from an artifact -> attach -> train -> save -> reload into a fresh float network -> evaluate -> record.
torch is imported only once there is something to do.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from src import config, record
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
    except BitfrontError as error:
        sys.exit(f"error: {error}")
    flags = [word for word in words if word in ("-m", "--multirun")]
    rest = [word for word in words if word not in flags]
    sys.argv[1:] = [*flags, *(config.swept(rest) if flags else rest)]  # Hydra wants its flags before the options
    job()


@hydra.main(version_base="1.3", config_path=str(config.CONF), config_name="config")
def job(composed: DictConfig) -> float:
    """A single run, or one job of a sweep; gives the headline metric to the sweeper."""
    overrides, sweep = list(HydraConfig.get().overrides.task), HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        if sweep and composed.trainer.devices != 1:
            raise BitfrontError(
                "a sweep in one process cannot use several devices: each process would start the whole sweep again; "
                "run the cells one by one"
            )
        group = " ".join(word for word in sys.argv[1:] if not word.startswith("-")) if sweep else ""
        return run_cell(overrides, group)["primary"]["value"]
    except BitfrontError as error:
        if not sweep:
            sys.exit(f"error: {error}")
        # Hydra prints this kind without a traceback, and goes on with the other jobs of the sweep.
        raise CompactHydraException(f"error: {error}") from None


def run_cell(overrides: list[str], group: str = "", nested: bool = False) -> dict[str, Any]:
    """Run a cell, unless it is finished already; resume it if it was interrupted.

    Args:
        overrides: as on the command line, without sweeps.
        group: the sweep that the cell belongs to, for W&B.
        nested: on behalf of another cell: no word if it is finished, no error but waiting if another process runs it.

    Returns:
        The record.

    Raises:
        BitfrontError: with what the user can do.
    """
    cell = config.load(overrides)
    start = start_of(cell, overrides)
    run = Run(directory(cell, start))
    finished = run.finished()
    if finished:
        if not nested:
            CONSOLE.print(f"{summary(finished)}\nfinished before; to run it again, delete {run.path}")
        return finished
    if "sft" in cell["quant"] and (rank() > 0 or "RANK" in os.environ):
        raise BitfrontError("calibration is for one process; run this cell without torchrun")
    if rank() > 0:
        return _execute(cell, overrides, start, run, group)
    with run.locked(wait=nested):
        if run.checkpoint.is_file():
            CONSOLE.print(f"resuming '{run.path}' after its last finished epoch")
        elif run.blocks.is_dir():
            CONSOLE.print(f"resuming '{run.path}' after block {len(list(run.blocks.glob('[0-9]*.pt')))}")
        finished = run.finished() or _execute(cell, overrides, start, run, group)
    CONSOLE.print(summary(finished))
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
    if cell["names"]["quant"] == "float":
        raise BitfrontError("quant=float cannot start from itself; give init_from=<artifact> or null")
    shared = ["task", "seed", "smoke", "root", "data_root", "wandb", "trainer"]
    shared += [knob for knob, _ in config.knobs("task", cell["names"]["task"])]
    overrides = [o for o in overrides if o.partition("=")[0].partition(".")[0] in shared]
    overrides = [*overrides, "quant=float"]
    if not Run(directory(config.load(overrides), None)).finished():
        command = f"python -m src.run {' '.join(overrides)}"
        if "RANK" in os.environ:
            raise BitfrontError(f"under torchrun, first run the start by itself: {command}")
        from src.cell import build, build_task

        build_task(cell), build(cell["quant"])  # refuse what cannot work before the start is trained
        CONSOLE.print(f"first the float start, with the task's own recipe: {command}")
    floating = run_cell(overrides, nested=True)
    return {"artifact": floating["artifact"], "sha256": floating["artifact_sha256"]}


def directory(cell: dict[str, Any], start: dict[str, str] | None) -> Path:
    """Where a cell's run is."""
    names, init = cell["names"], start["sha256"] if start else None
    return Path(cell["root"]) / names["task"] / names["quant"] / record.identity(cell, init)


def rank() -> int:
    """This process's number among those of the run; only number 0 writes."""
    return int(next((os.environ[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ), 0))


def _execute(
    cell: dict[str, Any], overrides: list[str], start: dict[str, str] | None, run: Run, group: str
) -> dict[str, Any]:
    from src.cell import execute

    return execute(cell, overrides, start, run, rank(), group)


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
