"""What a launcher starts: one cell, in this process, a worker beside others, or one of several that share the cell."""

from __future__ import annotations

import itertools
import os
import shlex
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from bitfront.cells import compose
from bitfront.cells.cell import Cell
from bitfront.cells.runs import JOB
from bitfront.console import ERRORS
from bitfront.errors import BitfrontError, BusyError, first_line
from bitfront.progress import POSITION, phase

PARENT, WORKERS = "BITFRONT_SWEEP", "BITFRONT_WORKERS"


def job(composed: DictConfig) -> tuple[bool, str]:
    """One cell, where the launcher put it: whether another process runs it, and why it failed."""
    words = [word for word in HydraConfig.get().overrides.task if not compose.names(word, "cluster")]
    if os.getppid() == int(os.environ.get(PARENT, 0)):
        _enlist()
    cell = Cell(words)
    try:
        if _join(cell):
            cell.execute()
    except BusyError:
        return True, ""
    except BitfrontError as error:
        ERRORS.print(f"failed: {shlex.join(words)}: {error}")
        return False, str(error)
    except Exception as error:
        traceback.print_exc()
        return False, f"{type(error).__name__}: {first_line(error)} (a bug; traceback above)"
    return False, ""


def own_number(place: Path) -> int:
    """The first number that no other living process has taken here.

    Args:
        place: folder of locks, which processes hold as long as they live.
    """
    for number in itertools.count():
        lock = FileLock(place / str(number), timeout=0, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout:
            continue
        _HELD.append(lock)
        return number
    raise AssertionError


_HELD: list[FileLock] = []


def _join(cell: Cell) -> bool:
    """Make this process one of those that submitit started for the cell; false if it has nothing to do.

    The others wait until the first, which alone learns whether the cell is finished or runs elsewhere, holds it: where
    processes meet, they would wait for it in vain.
    """
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return True
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    if os.environ["SUBMITIT_EXECUTOR"] == "local":
        _watch(lambda: _lives(int(os.environ[PARENT])))
    processes, job = TorchDistributedEnvironment(), JobEnvironment()
    os.environ[JOB] = job.job_id
    if processes.rank > 0:
        first = job.paths.folder / f"{job.job_id}_0_result.pkl"  # submitit's, when the first process is done
        run = cell.run()
        while not (begun := run is not None and run.held(job.job_id)) and not first.exists():
            time.sleep(0.5)
        if not begun:
            return False
    if processes.world_size > 1:
        processes.export(set_cuda_visible_devices=False, overwrite=True)
    return True


def _enlist() -> None:
    """Once in a worker of this machine: end with the sweep, however that ends, and take a GPU and a line of its own."""
    if any(thread.name == PARENT for thread in threading.enumerate()):
        return
    parent = os.getppid()
    _watch(lambda: os.getppid() == parent)
    number = own_number(Path(os.environ[WORKERS]))
    if sys.stderr.isatty():
        os.environ[POSITION] = str(number)
    with phase("loading PyTorch"):
        import torch

        import bitfront.cells.flow  # noqa: F401 with which a cell would else begin

    there = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    if there:
        devices = there.split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]


def _watch(alive: Callable[[], bool]) -> None:
    """End this process when the sweep is gone, however that ended."""
    threading.Thread(target=_end_unless, args=(alive,), name=PARENT, daemon=True).start()


def _end_unless(alive: Callable[[], bool], pause: float = 1.0, end: Callable[[int], Any] = os._exit) -> None:
    while alive():
        time.sleep(pause)
    end(1)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
