"""Run directories, each named by the identity of its cell, so that the same command finds its finished result, or what
an interrupted run left.

    <root>/<task>/<method>/<id>/{model.safetensors, record.json, lock, owner}, and while running last.ckpt, blocks/
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bitfront.cells.record import FILE, Record, read, text_of
from bitfront.downloads import sha256
from bitfront.errors import BitfrontError, BusyError
from bitfront.files import clear, write_atomically

PROBE = 0.3  # seconds: who only looks whether a directory is held holds it for an instant
LOCKLESS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
JOB = "BITFRONT_JOB"  # the cluster's name of this process's job


@dataclass(frozen=True)
class Origin:
    """An artifact that a run starts from."""

    path: str
    sha256: str


class Run:
    """One run directory.

    Args:
        path: the directory; made when the run is locked.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.artifact, self.checkpoint, self.blocks = path / "model.safetensors", path / "last.ckpt", path / "blocks"
        self.lock, self.owner = path / "lock", path / "owner"

    def finished(self) -> Record | None:
        """The record, if the run is complete and its artifact is the one that the record is of; it names that where the
        directory is now."""
        record = read(self.path / FILE)
        if not record or not self.artifact.is_file() or sha256(self.artifact) != record.artifact_sha256:
            return None
        return replace(record, artifact=str(self.artifact))

    def begun(self) -> str:
        """After what an interrupted run would go on; empty if there is nothing of it."""
        if self.checkpoint.is_file():
            return "its last finished epoch"
        blocks = len(list(self.blocks.glob("*/[0-9]*.pt")))
        return f"block {blocks}" if self.blocks.is_dir() else ""

    def spoilt(self) -> str:
        """Why a run that was finished is to be run again; empty if it was not."""
        was = read(self.path / FILE) and not self.finished()
        return "its file is missing, or not the one that its record is of" if was else ""

    def clean(self) -> None:
        """Remove what only an interrupted run needs."""
        with suppress(OSError):
            self.checkpoint.unlink()
        shutil.rmtree(self.blocks, ignore_errors=True)

    @contextmanager
    def locked(self, wait: bool) -> Iterator[None]:
        """Hold the run directory; the system lets go of it when the process dies, however it dies.

        Raises:
            BusyError: another process holds it and ``wait`` is false.
            BitfrontError: it cannot be written.
        """
        lock = FileLock(self.lock, fallback_to_soft=False)  # which a dead process would leave behind
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=-1 if wait else PROBE)
        except Timeout:
            raise BusyError(
                f"this cell is running already ({self._owner() or 'elsewhere'}, '{self.path}'); wait for it"
            ) from None
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            job = f", job {os.environ[JOB]}" if JOB in os.environ else ""
            clear(self.path)
            self.write(self.owner, f"process {os.getpid()} on {socket.gethostname()}{job}")
            yield
        finally:
            lock.release()

    def held(self, job: str = "") -> bool:
        """Whether a process holds the directory; if a job is named, whether one of that job does."""
        if not self.lock.is_file():
            return False
        try:
            with FileLock(self.lock, timeout=PROBE, fallback_to_soft=False):
                return False
        except Timeout:
            return not job or self._owner().endswith(f", job {job}")
        except OSError as error:
            raise self._unwritable(error) from None

    def finish(self, record: Record) -> None:
        """Write the record of a finished run.

        Raises:
            BitfrontError: the directory cannot be written.
        """
        self.write(self.path / FILE, text_of("finished", record.as_json()))

    def fail(self, head: Mapping[str, Any], error: str) -> None:
        """Write why a run failed; it is tried again next time."""
        self.write(self.path / FILE, text_of("failed", {"error": error, **head}))

    def write(self, path: Path, text: str) -> None:
        """Write a file of the directory atomically.

        Raises:
            BitfrontError: it cannot be written.
        """
        write_atomically(path, text)

    def _owner(self) -> str:
        return self.owner.read_text() if self.owner.is_file() else ""

    def _unwritable(self, error: OSError) -> BitfrontError:
        if error.errno in LOCKLESS:
            return BitfrontError(
                f"the file system of '{self.path}' has no locks (flock), by which two processes know that they are on "
                "the same cell; choose a root=<folder> on another, as the machine's own disk or NFS 4"
            )
        return BitfrontError(
            f"cannot write to '{self.path}' ({error.strerror}); make room or choose another root=<folder>"
        )
