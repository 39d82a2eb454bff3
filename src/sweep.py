"""Sweeps: the cells of one command line, on any of Hydra's launchers.

    python -m src.run -m task=vit,lm quant=diffq penalty=0.5,2,8 cluster=local

Hydra composes the cells and starts them: in this process, in several (joblib), by submitit here or on SLURM, on Ray.
Its own sweeper would start finished cells again, hear of failures when all is over, and tell of the first only. Here
what is finished is not started; float networks that other cells start from come first, once; a cell that another
process runs is waited for; a process that dies takes no other cell with it; and what failed is listed at the end.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import shlex
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from src import config, record
from src.errors import BitfrontError, BusyError
from src.record import Run
from src.run import as_start, directory, float_start, run_cell, start_of, summary

CONSOLE = Console(highlight=False, soft_wrap=True, markup=False)
ERRORS = Console(highlight=False, soft_wrap=True, markup=False, stderr=True)
PARENT, WORKERS, GROUP = "BITFRONT_SWEEP", "BITFRONT_WORKERS", "WANDB_RUN_GROUP"


@dataclass
class Cell:
    """One cell of a sweep.

    Attributes:
        words: its command line.
        error: why it failed, if it did.
        busy: another process runs it.
    """

    words: list[str]
    error: str = ""
    busy: bool = False
    _run: Run | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        """As ``config.load`` gives it."""
        return config.load(self.words)

    @cached_property
    def start(self) -> Cell | None:
        """The float cell that it starts from."""
        words = float_start(self.config, self.words)
        return Cell(words) if words else None

    def run(self) -> Run | None:
        """Its run directory; None as long as the start that names it is not finished."""
        if self._run is None:
            finished = self.start.record() if self.start else None
            if self.start and not finished:
                return None
            start = as_start(finished) if finished else start_of(self.config, self.words)
            self._run = Run(directory(self.config, start))
        return self._run

    def record(self) -> dict[str, Any] | None:
        """Of the finished run."""
        run = self.run()
        return run.finished() if run else None

    def begun(self, since: float) -> bool:
        """Whether a process took its directory after a time."""
        run = self.run()
        return run is not None and run.lock.is_file() and run.lock.stat().st_mtime >= since


def main(words: Sequence[str]) -> None:
    """Run a sweep's command line.

    Raises:
        BitfrontError: some cells failed, or the cluster does not start them.
    """
    os.environ.setdefault(GROUP, " ".join(words)[:120])
    with (
        tempfile.TemporaryDirectory(prefix="bitfront-") as workers,
        initialize_config_dir(str(config.CONF), version_base="1.3"),
    ):
        os.environ |= {PARENT: str(os.getpid()), WORKERS: workers}
        sweep = Sweep(words)
        if sweep.config.hydra.runtime.choices.sweeper == "optuna":
            from src.search import search

            cells = search(sweep)
        elif any(o.is_sweep_override() and not o.is_discrete_sweep() for o in sweep.overrides.values()):
            raise BitfrontError("an interval has no end of values; add sweeper=optuna to search it")
        else:
            cells = [Cell(list(point)) for point in BasicSweeper.split_arguments([*sweep.overrides.values()], None)[0]]
            sweep.complete(cells)
    failed = {tuple(cell.words): cell.error for cell in cells if cell.error}
    if failed:
        listed = "".join(f"\n{error}\n  python -m src.run {shlex.join(words)}" for words, error in failed.items())
        raise BitfrontError(
            f"{len(failed)} of {len(cells)} cells failed; the same command runs only those again:{listed}"
        )


class Sweep:
    """Completes cells on a cluster.

    Args:
        words: the command line without flags.

    Attributes:
        config: where and how many cells run at once, in ``cluster``, ``sweeper`` and ``hydra``.
        overrides: the words that make cells, with what they mean.

    Raises:
        BitfrontError: several devices for a cell, on a cluster that starts one process for it.
    """

    def __init__(self, words: Sequence[str]) -> None:
        loader = GlobalHydra.instance().config_loader()
        parsed = dict(zip(words, OverridesParser.create(config_loader=loader).parse_overrides([*words]), strict=True))
        own = (*config.SWEEP, "hydra")
        single = [word for word, o in parsed.items() if not o.is_sweep_override()]
        shared = [word for word in single if config.names(word, *own, "root", "trainer")]
        self.overrides = {word: o for word, o in parsed.items() if not config.names(word, *own)}
        try:
            self.config: DictConfig = loader.load_configuration("config", shared, RunMode.MULTIRUN)
            launcher = OmegaConf.to_container(self.config.hydra.launcher, resolve=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise BitfrontError(f"{_first_line(error)}; hydra.launcher.* are options of the cluster= chosen") from None
        assert isinstance(launcher, dict)
        if self.config.cluster.workers < 1:
            raise BitfrontError(f"cluster.workers is positive, got {self.config.cluster.workers}")
        self.place, self.launched = [word for word, o in parsed.items() if config.names(word, "cluster")], 0
        if self.config.trainer.devices != launcher.get("tasks_per_node", 1):
            command = shlex.join([*(word for word in words if word not in self.place), "cluster=local_ddp"])
            raise BitfrontError(
                "a sweep in one process cannot use several devices: each process would start the whole sweep again; "
                f"run it in processes of their own: python -m src.run -m {command}"
            )
        self.shown = "submitit_folder" not in launcher  # or the jobs print into files
        if not self.shown:
            CONSOLE.print(f"what the cells print: {Path(self.config.root) / '.submitit'}/<job>/*_log.*")
        HydraConfig.instance().set_config(self.config)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=HydraContext(config_loader=loader, callbacks=Callbacks()),
            task_function=job,
            config=self.config,
        )

    def complete(self, cells: Sequence[Cell]) -> None:
        """Run cells until each is finished or has an error."""
        starts: dict[tuple[str, ...], Cell] = {}
        for cell in cells:
            try:
                if cell.start:
                    cell.start = starts.setdefault(tuple(cell.start.words), cell.start)
                else:
                    cell.run()
            except BitfrontError as error:
                cell.error = str(error)
        missing = [start for start in starts.values() if not start.record()]
        if missing:
            CONSOLE.print(f"first {len(missing)} float networks to start from")
            self.complete(missing)
        for cell in cells:
            if not cell.error and cell.start and cell.start.error:
                cell.error = f"the float network to start from: {cell.start.error}"
        pending = [cell for cell in cells if not cell.error and not _told(cell)]
        while pending:
            self.launch(pending)
            busy = [cell for cell in pending if cell.busy]
            _wait(busy)
            pending = [cell for cell in busy if not _told(cell)]

    def launch(self, cells: Sequence[Cell]) -> None:
        """Run cells once, as many at a time as the launcher takes."""
        size = self.config.hydra.sweeper.max_batch_size or len(cells)
        for first in range(0, len(cells), size):
            self._launch(cells[first : first + size])

    def _launch(self, cells: Sequence[Cell]) -> None:
        began, number = time.time() - 2, self.launched  # some file systems count time in seconds
        self.launched += len(cells)
        try:
            results = self.launcher.launch([[*self.place, *cell.words] for cell in cells], initial_job_idx=number)
        except Exception as error:  # a process died; or the cluster is not there
            self._after_crash(cells, began, error)
            return
        for cell, result in zip(cells, results, strict=True):
            cell.busy, cell.error = result.return_value
            finished = None if self.shown else cell.record()
            if finished:
                CONSOLE.print(summary(finished))

    def _after_crash(self, cells: Sequence[Cell], began: float, error: Exception) -> None:
        """Run what a dead process left, those cells one by one that may have killed it."""
        left = [cell for cell in cells if not cell.record()]
        suspects = [cell for cell in left if cell.begun(began)]
        _wait(suspects)  # those beside it may go on
        reason = ""
        if not suspects:
            reason = "the cluster does not run it"
        elif not self.shown:
            reason = "its job died, or waits in the cluster's queue still"
        elif len(cells) == 1:
            reason = "its process died, perhaps for want of memory"
        if reason:
            for cell in left:
                cell.busy, cell.error = False, "" if cell.record() else f"{reason} ({_first_line(error)})"
            return
        for cell in suspects:
            if not cell.record():
                self._launch([cell])
        others = [cell for cell in left if cell not in suspects]
        if others:
            self.launch(others)


def job(composed: DictConfig) -> tuple[bool, str]:
    """One cell, where the launcher put it: whether another process runs it, and why it failed."""
    words = [word for word in HydraConfig.get().overrides.task if not config.names(word, "cluster")]
    if os.getppid() == int(os.environ.get(PARENT, 0)):
        _enlist()
    try:
        if not _join(Cell(words)):
            return False, ""
        run_cell(words)
    except BusyError:
        return True, ""
    except BitfrontError as error:
        ERRORS.print(f"failed: {shlex.join(words)}: {error}")
        return False, str(error)
    except Exception as error:
        traceback.print_exc()
        return False, f"{type(error).__name__}: {_first_line(error)} (a bug; traceback above)"
    return False, ""


def _told(cell: Cell) -> bool:
    """Whether a cell is finished already; says so."""
    finished = cell.record()
    if finished:
        CONSOLE.print(f"finished before: {summary(finished)}")
    return finished is not None


def _wait(cells: Sequence[Cell]) -> None:
    """Until no other process holds the cells."""
    runs = [run for cell in cells if (run := cell.run())]
    if any(run.held() for run in runs):
        CONSOLE.print(f"waiting for {len(runs)} cells that other processes run")
    while any(run.held() for run in runs):
        time.sleep(1)


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
    os.environ[record.JOB] = job.job_id
    if processes.rank > 0:
        first = job.paths.folder / f"{job.job_id}_0_result.pkl"  # submitit's, when the first process is done
        run = cell.run()
        while not (begun := run is not None and run.held(job.job_id)) and not first.exists():
            time.sleep(0.5)
        if not begun or not record.trains(cell.config):
            return False
    if processes.world_size > 1 and record.trains(cell.config):
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
        os.environ["TQDM_POSITION"] = str(number)
    import torch

    there = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    if there:
        devices = there.split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]


def own_number(place: Path) -> int:
    """The first number that no other living process has taken here.

    Args:
        place: folder of locks, which processes hold as long as they live.
    """
    for number in itertools.count():
        lock = open(place / str(number), "w")  # noqa: SIM115 held until the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        _HELD.append(lock)
        return number
    raise AssertionError


_HELD: list[Any] = []


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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
