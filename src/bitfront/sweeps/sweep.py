"""Sweeps: many cells on any of Hydra's launchers.

    python -m src.run -m task=vit,lm quant=diffq penalty=0.5,2,8 cluster=local

Hydra starts the cells: in this process, in several (joblib), by submitit here or on SLURM, on Ray. Its own sweeper
would start finished cells again, hear of failures when all is over, and tell of the first only. Here what is finished
is not started; float networks that other cells start from come first, once; a cell that another process runs is waited
for; a process that dies takes no other cell with it; and why cells failed is told.
"""

from __future__ import annotations

import os
import shlex
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from bitfront.cells import compose
from bitfront.cells.cell import Cell
from bitfront.console import CONSOLE
from bitfront.errors import BitfrontError, first_line
from bitfront.shipped import module
from bitfront.sweeps.workers import PARENT, WORKERS, job


@dataclass
class Attempt:
    """What became of a cell that was started.

    Attributes:
        error: why it failed, if it did.
        busy: another process runs it.
    """

    cell: Cell
    error: str = ""
    busy: bool = False

    def finished(self) -> bool:
        """Whether the cell has its record."""
        return self.cell.record() is not None

    def begun(self, since: float) -> bool:
        """Whether a process took its directory after a time."""
        run = self.cell.run()
        return run is not None and run.owner.is_file() and run.owner.stat().st_mtime >= since


class Sweep:
    """Completes cells on a cluster.

    Args:
        words: of the command line. What they say of where and how many cells run at once counts, and what of ``root``
            and ``trainer`` all cells have.

    Attributes:
        config: of ``cluster``, ``sweeper`` and ``hydra``.

    Raises:
        BitfrontError: several devices for a cell, on a cluster that starts one process for it.
    """

    def __init__(self, words: Sequence[str]) -> None:
        loader = GlobalHydra.instance().config_loader()
        single = [str(o.input_line) for o in compose.parse(words) if not o.is_sweep_override()]
        own = [word for word in single if compose.names(word, *compose.SWEEP, "hydra", "root", "trainer")]
        try:
            self.config: DictConfig = loader.load_configuration(
                "config", [*own, *compose.searchpath()], RunMode.MULTIRUN
            )
            launcher: Any = OmegaConf.to_container(self.config.hydra.launcher, resolve=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise BitfrontError(f"{first_line(error)}; hydra.launcher.* are options of the cluster= chosen") from None
        if self.config.cluster.workers < 1:
            raise BitfrontError(f"cluster.workers is positive, got {self.config.cluster.workers}")
        if launcher.get("ray", {}).get("init", {}).get("address"):  # the cluster has its own, and refuses to be told
            own = self.config.hydra.launcher.ray.init
            with open_dict(own):
                own.num_cpus = own.object_store_memory = None
        self.place, self.launched = [word for word in words if compose.names(word, "cluster")], 0
        if self.config.trainer.devices != launcher.get("tasks_per_node", 1):
            raise BitfrontError(
                "a sweep in one process cannot use several devices: each process would start the whole sweep again; "
                f"run its cells in processes of their own: {_instead(words)}"
            )
        self.batch = self.config.hydra.sweeper.max_batch_size
        self.shown = "submitit_folder" not in launcher  # or the jobs print into files
        self.shares_terminal = launcher["_target_"].endswith((".JoblibLauncher", ".LocalLauncher"))
        HydraConfig.instance().set_config(self.config)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=HydraContext(config_loader=loader, callbacks=Callbacks()),
            task_function=job,
            config=self.config,
        )

    def complete(self, cells: Sequence[Cell]) -> list[Attempt]:
        """Run cells until each is finished or has an error."""
        attempts = [Attempt(cell) for cell in cells]
        starts: dict[tuple[str, ...], Cell] = {}
        for attempt in attempts:
            try:
                if start := attempt.cell.start:
                    attempt.cell.start = starts.setdefault(tuple(start.words), start)
                else:
                    attempt.cell.run()
            except BitfrontError as error:
                attempt.error = str(error)
        missing = [start for start in starts.values() if not start.record()]
        if missing:
            CONSOLE.print(f"first {len(missing)} float networks to start from")
            failed = {attempt.cell: attempt.error for attempt in self.complete(missing) if attempt.error}
            for attempt in attempts:
                if not attempt.error and attempt.cell.start in failed:
                    attempt.error = f"the float network to start from: {failed[attempt.cell.start]}"
        pending = [attempt for attempt in attempts if not attempt.error and not _told(attempt)]
        while pending:
            self._launch(pending)
            busy = [attempt for attempt in pending if attempt.busy]
            _wait(busy)
            pending = [attempt for attempt in busy if not _told(attempt)]
        return attempts

    def _launch(self, attempts: Sequence[Attempt]) -> None:
        """Run cells once, as many at a time as the launcher takes."""
        size = self.batch or len(attempts)
        for first in range(0, len(attempts), size):
            self._launch_batch(attempts[first : first + size])

    def _launch_batch(self, attempts: Sequence[Attempt]) -> None:
        began, number = time.time() - 2, self.launched  # some file systems count time in seconds
        if not self.shown and not number:
            CONSOLE.print(f"what the cells print: {Path(self.config.root) / '.submitit'}/<job>/*_log.*")
        self.launched += len(attempts)
        words = [[*self.place, *attempt.cell.words] for attempt in attempts]
        try:
            with _deaf() if self.shares_terminal else nullcontext():
                results = self.launcher.launch(words, initial_job_idx=number)
        except Exception as error:  # a process died; or the cluster is not there
            self._after_crash(attempts, began, error)
            return
        for attempt, result in zip(attempts, results, strict=True):
            attempt.busy, attempt.error = result.return_value
            finished = None if self.shown else attempt.cell.record()
            if finished:
                CONSOLE.print(finished.summary())

    def _after_crash(self, attempts: Sequence[Attempt], began: float, error: Exception) -> None:
        """Run what a dead process left, those cells one by one that may have killed it."""
        left = [attempt for attempt in attempts if not attempt.finished()]
        suspects = [attempt for attempt in left if attempt.begun(began)]
        _wait(suspects)  # those beside it may go on
        reason = ""
        if not suspects:
            reason = "the cluster does not run it"
        elif not self.shown:
            reason = "its job died, or waits in the cluster's queue still"
        elif len(attempts) == 1:
            reason = "its process died, perhaps for want of memory"
        if reason:
            for attempt in left:
                attempt.busy, attempt.error = False, "" if attempt.finished() else f"{reason} ({first_line(error)})"
            return
        for attempt in suspects:
            if not attempt.finished():
                self._launch_batch([attempt])
        others = [attempt for attempt in left if attempt not in suspects]
        if others:
            self._launch(others)


@contextmanager
def opened(words: Sequence[str]) -> Iterator[Sweep]:
    """A sweep whose workers end with it, and W&B runs whose group is the command line."""
    before = dict(os.environ)
    with (
        tempfile.TemporaryDirectory(prefix="bitfront-") as workers,
        initialize_config_dir(str(compose.CONF), version_base="1.3"),
    ):
        os.environ.setdefault("WANDB_RUN_GROUP", shlex.join(words)[:120])
        os.environ |= {PARENT: str(os.getpid()), WORKERS: workers}
        try:
            yield Sweep(words)
        finally:
            for name in (PARENT, WORKERS, "WANDB_RUN_GROUP"):
                os.environ.pop(name, None)
                if name in before:
                    os.environ[name] = before[name]


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes that start within do not hear the terminal's Ctrl-C, on which each would print where it was: they end
    with the sweep.
    """
    done = threading.Event()
    threading.Thread(target=done.wait, daemon=True).start()  # a thread that hears it; what it does, the main one does
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        done.set()


def _instead(words: Sequence[str]) -> str:
    """The command line with the cluster that has processes for a cell."""
    others = shlex.join([word for word in words if not compose.names(word, "cluster")])
    return f"{module('run')} -m {others} cluster=local_ddp"


def _told(attempt: Attempt) -> bool:
    """Whether a cell is finished already; says so."""
    finished = attempt.cell.record()
    if finished:
        CONSOLE.print(f"finished before: {finished.summary()}")
    return finished is not None


def _wait(attempts: Sequence[Attempt]) -> None:
    """Until no other process holds the cells."""
    runs = [run for attempt in attempts if (run := attempt.cell.run())]
    if any(run.held() for run in runs):
        CONSOLE.print(f"waiting for {len(runs)} cells that other processes run")
    while any(run.held() for run in runs):
        time.sleep(1)
