"""What a run was made with: code revision, versions, machine, threads, memory."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bitfront.shipped import PACKAGE, shipped

PACKAGES = ("bitfront", "torch", "torchvision", "lightning", "timm", "numpy", "hydra-core", "torchmetrics")


def environment(package: Path = PACKAGE, conf: Path | None = None) -> dict[str, Any]:
    """Code revision, versions and machine; dirty is code or configuration that the revision does not have.

    Args:
        package: folder of the code. Where git does not know it, as once installed, there is no revision.
        conf: of the configuration.
    """
    known = _git(package, "ls-files", "--error-unmatch", str(package / "errors.py")) is not None
    places = (str(package), str(conf or shipped("conf")))
    return {
        "git": _git(package, "rev-parse", "HEAD") if known else None,
        "dirty": known and bool(_git(package, "status", "--porcelain", "--", *places)),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "threads": torch.get_num_threads(),  # the last digits of sums depend on them
    }


def peak_memory() -> int:
    """Bytes of main memory that the process has held at most so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
