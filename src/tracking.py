"""Weights & Biases: a mirror of the records. The only file that imports wandb.

Online for users who are logged in, else offline (``wandb sync`` later). It never asks, never waits for long, and its
failures are a warning: a run does not depend on it.
"""

from __future__ import annotations

import netrc
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse


def logged_in() -> bool:
    """Whether W&B has a key for this user: from the environment or from ``wandb login``'s netrc entry."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class Tracker:
    """One W&B run beside one run of ours.

    Args:
        mode: "auto", "online", "offline" or "disabled"; the environment's WANDB_MODE decides "auto".
        run_id: resumes the W&B run of the same id.
        name, group: shown in W&B; the group holds a sweep together.
        config: plain dictionary.
        directory: W&B's files go to ``directory/wandb``.
    """

    def __init__(
        self, mode: str, *, run_id: str, name: str, group: str, config: dict[str, Any], directory: Path
    ) -> None:
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
        self.run: Any = None
        if mode == "disabled":
            return
        settings = {"id": run_id, "name": name, "group": group[:120], "config": config, "dir": str(directory)}
        if mode != "online" or logged_in():  # W&B would ask for a key
            with _harmless():
                self.run = _start(mode, settings)
        if self.run is None and mode == "online":
            warnings.warn("W&B is offline for this run; send it later with `wandb sync`", stacklevel=2)
            with _harmless():  # W&B keeps the id of the attempt that failed
                self.run = _start("offline", settings | {"id": f"{run_id}-offline"})

    def log(self, epoch: int, values: dict[str, float], widths: dict[str, list[int]]) -> None:
        """Add an epoch's numbers, and each layer's histogram of bits.

        Args:
            epoch: from 1.
            values: numbers by name.
            widths: by tensor, the weights that have 0, 1, 2, ... bits.
        """
        if self.run is None:
            return
        with _harmless():
            import numpy as np
            import wandb

            histograms = {
                f"bits/{name}": wandb.Histogram(np_histogram=(np.array(counts), np.arange(len(counts) + 1) - 0.5))
                for name, counts in widths.items()
            }
            self.run.log(values | histograms, step=epoch)

    def finish(self, summary: dict[str, Any], artifact: Path) -> None:
        """Add the final numbers and the packed file."""
        if self.run is None:
            return
        with _harmless():
            import wandb

            self.run.summary.update(summary)
            packed = wandb.Artifact(f"model-{self.run.id}", type="model", metadata=summary)
            packed.add_file(str(artifact))
            self.run.log_artifact(packed)

    def close(self) -> None:
        """End the W&B run, so that the next cell in this process does not continue it."""
        if self.run is None:
            return
        with _harmless():
            self.run.finish()
        self.run = None


def _start(mode: str, settings: dict[str, Any]) -> Any:
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb.init(
        project="bitfront",
        mode=mode,  # type: ignore[arg-type]
        resume="allow" if mode == "online" else None,
        settings=wandb.Settings(
            init_timeout=15, login_timeout=15, finish_timeout=120, console="off", x_disable_stats=mode == "offline"
        ),
        **settings,
    )


@contextmanager
def _harmless() -> Iterator[None]:
    """Whatever goes wrong in W&B is a warning: it must not cost the run."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"W&B failed, the run goes on without it: {error}", stacklevel=3)
