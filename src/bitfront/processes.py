"""Which process of a run this is, and how many train together."""

from __future__ import annotations

import os
import sys

COUNTED = {"WORLD_SIZE", "MASTER_ADDR"}  # by whoever starts the processes of a cell: torchrun, Lightning
LAUNCHED = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # by torchrun, Lightning, SLURM, in the order in which they count
_devices = 1


def launched() -> bool:
    """Whether this process was started as one of a cell's."""
    return os.environ.keys() >= COUNTED


def several() -> bool:
    """Whether the cell is of several processes. Else, what the environment says is of others: SLURM numbers the tasks
    of a job, whatever they do, and shells keep what was exported."""
    return _devices > 1 or launched()


def expect(devices: int) -> None:
    """Say how many processes, each with its device, the cell is to have."""
    global _devices
    _devices = devices


def rank() -> int:
    """This process's number; only number 0 writes. As the processes agreed on, or before they have met, as launched."""
    if _met():
        return processes()[0]
    if not several():
        return 0
    return int(next((os.environ[name] for name in LAUNCHED if name in os.environ), 0))


def processes() -> tuple[int, int]:
    """Number of this process among those that train together, and how many they are; 0 of 1 before they have met."""
    if not _met():
        return 0, 1
    distributed = sys.modules["torch"].distributed
    return distributed.get_rank(), distributed.get_world_size()


def _met() -> bool:
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    return bool(distributed and distributed.is_available() and distributed.is_initialized())
