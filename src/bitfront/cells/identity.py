"""A run's identity: a hash of what determines its result, by names and values, never by Python paths.

An option that comes later is entered in ``BORN`` with the value that all cells had before it: where it has that value
it is no part of the hash, so that every id from before stays. A default that changes is another value, and another id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from bitfront.theirs import FOLDER

BORN: dict[str, Any] = {
    "train.optim": "adamw",
    "train.momentum": 0.9,
    "train.schedule": "cosine",
    "train.warmup_steps": 0,
    "train.warmup_lr": 0.0,
    "train.min_lr": 0.0,
    "train.period": 0.0,
    "train.decay": 1.0,
    "train.cycle": 0,
    "train.cycle_growth": 1.0,
    "train.clip": 0.0,
    "train.ema": 0.0,
    "train.keep": "last",
    "train.max_size": 0.0,
    "train.repeats": 1,
    "train.workers": 0,
    "trainer.devices": 1,
    "trainer.accumulate_grad_batches": 1,
    "quant.reestimate_bn": False,
    "quant.include": [],
    "quant.layers": None,
    "quant.max_size": 0.0,
    "quant.scale_bits": 0,
    "quant.propagation": 0,
    "quant.moving": 0,
    "quant.travel": 0.5,
    "quant.momentum": 0.9,
    "quant.block_dtype": "auto",
    "quant.sft_codes": False,
    "quant.distill": 0,
    "quant.between": 0,
    "quant.hessian": "inputs",
    "quant.block_loss": "squared",
    "quant.unbiased": False,
    "quant.grid": "minmax",
    "quant.round_zero": False,
    "quant.raw_dtype": "float32",
    "task.train_data": [],
    "task.test_tokens": 0,
    "task.dtype": "auto",
}
BORN_TRAINED: dict[str, Any] = {"quant.scale_dtype": "float32"}  # of what trains; other methods always had one
BATCHES = ("batch_size", "repeats", "workers")  # of the training: what batch norms are measured on
TRIED = ("samples", "batch_size")  # of what trains: data that widths are tried on
FINGERPRINT = "fingerprint"  # of the user's own data, of the tasks that have it
PLACES = ("accelerator",)  # of the trainer: where a cell runs


def identity(task: str, method: str, config: Mapping[str, Any], init: str | None) -> str:
    """The id of a cell: of its names, its values, its seed and what it starts from.

    Not of the folders of runs and data (the user's own data count by their content), the accelerator and the tracking,
    nor, where nothing is trained, of the recipe (but for what batch norms are measured on): none of them changes the
    result, which ``tests/test_identity.py`` shows.

    Args:
        task, method: names of the choices.
        config: as ``compose.load`` gives it, or as a record has it.
        init: hash of the artifact that the cell starts from.
    """
    kept: dict[str, Any] = {key: config[key] for key in ("task", "quant")}
    if FINGERPRINT in config["task"]:  # which says more than where data and a saved network are
        places = {"data", "network"} if str(config["task"].get("network")).startswith(FOLDER) else {"data"}
        kept["task"] = {key: value for key, value in config["task"].items() if key not in places}
    if trains(config):
        kept["train"] = config["train"]
    elif config["quant"].get("reestimate_bn"):
        kept["train"] = {key: config["train"][key] for key in BATCHES}
    kept["trainer"] = {key: value for key, value in config["trainer"].items() if key not in PLACES}
    if not calibrated(config) and not config["quant"].get("max_size"):  # which alone looks at them
        kept["quant"] = {key: value for key, value in config["quant"].items() if key not in TRIED}
    if config["quant"].get("layers"):  # where patterns overlap, their order counts
        kept["quant"] = kept["quant"] | {"layers": list(config["quant"]["layers"].items())}
    born = BORN if calibrated(config) else BORN | BORN_TRAINED
    told: dict[str, Any] = {
        group: {key: value for key, value in values.items() if not _as_born(born, f"{group}.{key}", value)}
        for group, values in kept.items()
    }
    told |= {"names": [task, method], "seed": config["seed"], "smoke": config["smoke"], "init": init}
    return hashlib.sha1(json.dumps(_canonical(told), sort_keys=True).encode()).hexdigest()[:10]


def calibrated(config: Mapping[str, Any]) -> bool:
    """Whether the method works on trained weights and calibration data."""
    return "sft" in config["quant"]


def trains(config: Mapping[str, Any]) -> bool:
    """Whether a cell has a training stage: a calibrated method only for fine-tuning."""
    return not calibrated(config) or bool(config["quant"]["sft"])


def _as_born(born: Mapping[str, Any], key: str, value: Any) -> bool:
    return key in born and value == born[key] and isinstance(value, bool) == isinstance(born[key], bool)


def _canonical(value: Any) -> Any:
    """With 5 and 5.0 the same."""
    if isinstance(value, Mapping):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
