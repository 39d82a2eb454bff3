"""Weights & Biases: a mirror of the records. The only file that imports wandb.

Online for users who are logged in, else offline, to be sent later with ``wandb sync runs/*/*/*/wandb/offline-run-*``.
It never asks, never waits for long, and its failures are a warning: a run does not depend on it.
"""

from __future__ import annotations

import netrc
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from bitfront.cells.record import Head, Record

CONFIG = ("task", "method", "setting", "seed", "overrides", "init_sha256", "config")  # what W&B has of a record's head


def logged_in() -> bool:
    """Whether W&B has a key for this user: from the environment or from ``wandb login``'s netrc entry."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def quiet() -> None:
    """Keep W&B from talking on the console and from sending its own errors home."""
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


def project() -> str:
    """The W&B project of all runs."""
    return os.environ.get("WANDB_PROJECT") or "bitfront"


def entity() -> str:
    """The user or team whose project that is, unless another is named; asks the server."""
    import wandb

    return os.environ.get("WANDB_ENTITY") or wandb.Api().default_entity or ""


def under_agent() -> bool:
    """Whether ``wandb agent`` started this process, for one run of a W&B sweep."""
    return "WANDB_SWEEP_ID" in os.environ


def summary(record: Record) -> dict[str, float]:
    """A record's final numbers under their names in W&B: ``test/top1``, ``size/mib`` and so on."""
    sizes = record.sizes
    numbers = {f"{split}/{name}": value for split, part in record.metrics.items() for name, value in part.items()}
    numbers |= {f"size/{name}": value for name, value in vars(sizes).items()}
    numbers["size/mib"] = sizes.file / 2**20
    numbers["size/ratio"] = sizes.float / sizes.file
    numbers["size/bits_per_weight"] = 8 * sizes.file / sizes.parameters
    numbers["minutes"] = sum(stage["seconds"] for stage in record.stages.values()) / 60
    return numbers | mean_bits(record.widths)


def mean_bits(widths: Mapping[str, list[int]]) -> dict[str, float]:
    """Mean bits of all quantized weights and of each tensor's; nothing for a float network.

    Args:
        widths: by tensor, the weights that have 0, 1, 2, ... bits.
    """
    if not widths:
        return {}
    bits = {name: sum(b * n for b, n in enumerate(counts)) for name, counts in widths.items()}
    weights = {name: sum(counts) for name, counts in widths.items()}
    means = {f"mean_bits/{name}": bits[name] / weights[name] for name in widths}
    return {"mean_bits": sum(bits.values()) / sum(weights.values())} | means


class Tracker:
    """One W&B run beside one run of ours.

    Args:
        mode: "auto", "online", "offline" or "disabled"; the environment's WANDB_MODE decides "auto".
        about: the head of the record; the W&B run of the same id is resumed. A sweep's agent has its own id.
        directory: W&B's files go to ``directory/wandb``.
    """

    def __init__(self, mode: str, about: Head, directory: Path) -> None:
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
        self.run: Any = None
        if mode == "disabled":
            return
        settings = {
            "id": about.id,
            "name": f"{about.task} {about.method} {about.setting}".strip(),
            "group": os.environ.get("WANDB_RUN_GROUP") or about.task,  # a sweep's cells have its own
            "config": {key: getattr(about, key) for key in CONFIG} | {"smoke": about.smoke},
            "dir": str(directory),
        }
        if mode != "online" or logged_in():  # W&B would ask for a key
            with _harmless():
                self.run = _start(mode, settings)
        if self.run is None and mode == "online":
            later = f"wandb sync {directory}/wandb/offline-run-*"
            warnings.warn(f"W&B is offline for this run; send it later with: {later}", stacklevel=2)
            with _harmless():  # W&B keeps the id of the attempt that failed
                self.run = _start("offline", settings | {"id": f"{about.id}-offline"})

    def log(self, epoch: int, values: Mapping[str, float], widths: Mapping[str, list[int]]) -> None:
        """Add an epoch's numbers, and each layer's bits: their mean and their histogram.

        Args:
            epoch: from 1.
            values: numbers by name.
            widths: by tensor, the weights that have 0, 1, 2, ... bits.
        """
        if self.run is None:
            return
        with _harmless():
            self.run.log({**values, **mean_bits(widths), **_histograms(widths)}, step=epoch)

    def finish(self, record: Record) -> None:
        """Add the final numbers and the packed file."""
        if self.run is None:
            return
        with _harmless():
            import wandb

            numbers = summary(record)
            self.run.summary.update(numbers | _histograms(record.widths))
            # W&B takes 100 at most, and networks have more tensors.
            whole = {name: value for name, value in numbers.items() if not name.startswith("mean_bits/")}
            packed = wandb.Artifact(f"model-{self.run.id}", type="model", metadata=whole)
            packed.add_file(record.artifact, policy="immutable", skip_cache=True)  # where it is, not a copy in the home
            self.run.log_artifact(packed)

    def close(self) -> None:
        """End the W&B run, so that the next cell in this process does not continue it."""
        if self.run is None:
            return
        with _harmless():
            self.run.finish()
        self.run = None


def mirror(mode: str, record: Record) -> None:
    """Show a finished record as a W&B run of its own: an agent that drew a finished cell owes its sweep the numbers."""
    tracker = Tracker(mode, record, Path(record.artifact).parent)
    for numbers in record.history:
        tracker.log(int(numbers["epoch"]), numbers, {})
    tracker.finish(record)
    tracker.close()


def _histograms(widths: Mapping[str, list[int]]) -> dict[str, Any]:
    import numpy as np
    import wandb

    return {
        f"bits/{name}": wandb.Histogram(np_histogram=(np.array(counts), np.arange(len(counts) + 1) - 0.5))
        for name, counts in widths.items()
    }


def _start(mode: str, settings: dict[str, Any]) -> Any:
    quiet()
    import wandb

    if under_agent():  # W&B takes id and project from the agent, and does not resume
        settings = {key: value for key, value in settings.items() if key != "id"}
    else:
        settings |= {"project": project(), "resume": "allow" if mode == "online" else None}
    return wandb.init(
        mode=mode,  # type: ignore[arg-type]
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
