"""Run directories and records. A run's directory is named by a hash of what determines its result, so that the same
command finds its finished result, or what an interrupted run left.

    <root>/<task>/<method>/<id>/{model.safetensors, record.json, lock}, and while running last.ckpt, blocks/
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from src.errors import BitfrontError, BusyError

JOB = "BITFRONT_JOB"  # the cluster's name of this process's job
SCHEMA = "bitfront/record/1"
ARTIFACT, RECORD, CHECKPOINT, BLOCKS = "model.safetensors", "record.json", "last.ckpt", "blocks"
PACKAGES = ("torch", "torchvision", "lightning", "timm", "numpy", "hydra-core", "torchmetrics")


def identity(config: dict[str, Any], init_sha256: str | None) -> str:
    """The run's id: a hash of task, recipe, method, seed, start and precision.

    Keys without a value are left out, so that a new option that is off by default keeps all ids. Places, devices and
    tracking do not count, nor does the recipe of a cell that does not train.
    """
    kept = {key: config[key] for key in ("task", "quant", "seed", "smoke", *(["train"] if trains(config) else []))}
    if config["quant"].get("layers"):  # where patterns overlap, their order counts
        kept["quant"] = kept["quant"] | {"layers": list(config["quant"]["layers"].items())}
    kept |= {"precision": config["trainer"]["precision"], "init": init_sha256}
    return hashlib.sha1(json.dumps(_canonical(kept), sort_keys=True).encode()).hexdigest()[:10]


def trains(config: dict[str, Any]) -> bool:
    """Whether a cell has a training stage: post-training methods only with ``sft``."""
    return bool(config["quant"].get("sft", True))


class Run:
    """One run directory.

    Args:
        path: the directory; made when the run is locked.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.artifact, self.checkpoint, self.blocks = path / ARTIFACT, path / CHECKPOINT, path / BLOCKS
        self.lock = path / "lock"

    def finished(self) -> dict[str, Any] | None:
        """The record, if the run is complete; it names the artifact where the directory is now."""
        record = read(self.path / RECORD)
        if not record or record["status"] != "finished" or not self.artifact.is_file():
            return None
        if self.artifact.stat().st_size != record["sizes"]["file"]:
            return None  # damaged since: run the cell again
        return record | {"artifact": str(self.artifact)}

    def clean(self) -> None:
        """Remove what only an interrupted run needs."""
        self.checkpoint.unlink(missing_ok=True)
        shutil.rmtree(self.blocks, ignore_errors=True)

    @contextmanager
    def locked(self, wait: bool) -> Iterator[None]:
        """Hold the run directory; the system lets go of it when the process dies, however it dies.

        Raises:
            BusyError: another process holds it and ``wait`` is false.
            BitfrontError: it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.lock, "a+")  # noqa: SIM115 closed below
        except OSError as error:
            raise self._unwritable(error) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                lock.seek(0)
                raise BusyError(
                    f"this cell is running already ({lock.read().strip() or 'elsewhere'}, '{self.path}'); wait for it"
                ) from None
            try:
                lock.truncate(0)
                job = f", job {os.environ[JOB]}" if JOB in os.environ else ""
                lock.write(f"process {os.getpid()} on {socket.gethostname()}{job}")
                lock.flush()
            except OSError as error:
                raise self._unwritable(error) from None
            yield

    def held(self, job: str = "") -> bool:
        """Whether a process holds the directory; if a job is named, whether one of that job does."""
        try:
            with open(self.lock) as lock:
                about = lock.read()
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return not job or about.endswith(f", job {job}")
        return False

    def write(self, record: dict[str, Any]) -> None:
        """Write the record atomically.

        Raises:
            BitfrontError: the directory cannot be written.
        """
        temporary = self.path / f".{RECORD}"
        try:
            temporary.write_text(json.dumps({"schema": SCHEMA} | record, indent=1) + "\n")
            os.replace(temporary, self.path / RECORD)
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> BitfrontError:
        return BitfrontError(
            f"cannot write to '{self.path}' ({error.strerror}); make room or choose another root=<folder>"
        )


def read(path: Path) -> dict[str, Any] | None:
    """A record, or None if the file is missing, cut off or no record."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("schema") == SCHEMA else None


def read_all(root: Path) -> list[dict[str, Any]]:
    """Every finished record below a folder: run directories, or copies of their records under any name."""
    records = (read(path) for path in sorted(root.rglob("*.json")) if "wandb" not in path.parts)
    return [record for record in records if record and record["status"] == "finished"]


def sha256(path: Path) -> str:
    """Of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def environment() -> dict[str, Any]:
    """Code revision, versions and machine; dirty is code or configuration that the revision does not have."""
    return {
        "git": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", ".", "../conf")),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
    }


def peak_memory() -> int:
    """Bytes of main memory that the process has held at most so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _canonical(value: Any) -> Any:
    """Without empty values, and with 5 and 5.0 the same."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
