"""A cell, a task x a method: the words of its command line, what they mean, and where its run is.

torch is imported only once there is something to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from bitfront.cells import compose, tracking
from bitfront.cells.identity import identity
from bitfront.cells.record import Record
from bitfront.cells.runs import Origin, Run
from bitfront.console import CONSOLE
from bitfront.downloads import sha256
from bitfront.errors import BitfrontError
from bitfront.processes import expect, launched, rank

# with the float cell that one starts from
SHARED = ("task", "seed", "smoke", "root", "data_root", "offload", "wandb", "trainer")


class Cell:
    """One cell.

    Args:
        words: its command line, without sweeps.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self._origin: Origin | None = None

    @cached_property
    def config(self) -> compose.Config:
        """What the words mean.

        Raises:
            BitfrontError: they do not fit, or data of the user's is not there.
        """
        return compose.fingerprinted(compose.load(self.words))

    @cached_property
    def start(self) -> Cell | None:
        """The float cell that it starts from, if it does from one."""
        if self.config.values["init_from"] != "float":
            return None
        shared = (*SHARED, *(knob for knob, _ in compose.knobs("task", self.config.task)))
        words = [word for word in self.words if compose.names(word, *shared)]
        # The one W&B run of a sweep's agent is the cell's own.
        return Cell([*words, "quant=float", *(["wandb=disabled"] if tracking.under_agent() else [])])

    @property
    def origin(self) -> Origin | None:
        """The artifact that it starts from; None from scratch, or as long as the start is not finished.

        Raises:
            BitfrontError: there is no such file.
        """
        place = self.config.values["init_from"]
        if self._origin is None and self.start:
            record = self.start.record()
            self._origin = Origin(record.artifact, record.artifact_sha256) if record else None
        elif self._origin is None and place is not None:
            file = _file(place, self.config.values["data_root"])
            self._origin = Origin(str(file), sha256(file))
        return self._origin

    def run(self) -> Run | None:
        """Its run directory; None as long as the start that names it is not finished."""
        origin, config = self.origin, self.config
        if origin is None and self.start:
            return None
        name = identity(config.task, config.method, config.values, origin.sha256 if origin else None)
        return Run(Path(config.values["root"]) / config.task / config.method / name)

    def record(self) -> Record | None:
        """Of the finished run."""
        run = self.run()
        return run.finished() if run else None

    def execute(self, nested: bool = False) -> Record:
        """Run the cell, unless it is finished already; resume it if it was interrupted.

        Args:
            nested: on behalf of another cell: no word if it is finished, and where another process runs it, wait.

        Raises:
            BitfrontError: with what the user can do.
        """
        self._begin()
        expect(self.config.values["trainer"]["devices"])
        run = self.run()
        assert run is not None
        if finished := run.finished():
            return self._found(finished, run, nested)
        if rank() > 0:
            return self._execute(run)
        with run.locked(wait=nested):
            if finished := run.finished():  # by another process in the meantime
                return self._found(finished, run, nested)
            if begun := run.begun():
                CONSOLE.print(f"resuming '{run.path}' after {begun}")
            elif spoilt := run.spoilt():
                CONSOLE.print(f"'{run.path}' is run again: {spoilt}")
            finished = self._execute(run)
        CONSOLE.print(finished.summary())
        return finished

    def _begin(self) -> None:
        """Train the float network that the cell starts from, if there is none."""
        if self.start is None or self.start.record():
            return
        command = compose.command(self.start.words)
        if launched():
            raise BitfrontError(f"under torchrun, first run the start by itself: {command}")
        from bitfront.cells.flow import build_method, build_task

        build_task(self.config), build_method(self.config)  # refuse what cannot work before the start is trained
        CONSOLE.print(f"first the float start, with the task's own recipe: {command}")
        self.start.execute(nested=True)

    def _execute(self, run: Run) -> Record:
        from bitfront.cells.flow import execute

        return execute(self.config, self.words, self.origin, run)

    def _found(self, finished: Record, run: Run, nested: bool) -> Record:
        run.clean()  # where it was killed in its last instant
        if not nested:
            CONSOLE.print(f"{finished.summary()}\nfinished before; to run it again, delete {run.path}")
            if tracking.under_agent() and rank() == 0:
                tracking.mirror(self.config.values["wandb"], finished)
        return finished


def _file(place: str, data_root: str) -> Path:
    """Of trained weights, below the working directory or ``data_root``."""
    for path in (Path(place).expanduser(), Path(data_root) / place):
        if path.is_file():
            return path
    told = f"{told}, or " if (told := compose.fetched(place)) else ""
    raise BitfrontError(
        f"init_from={place}: no such file, nor below '{data_root}'; {told}give a model.safetensors or .pth, or float, "
        "or null"
    )
