"""What a calibration's log says of the layers. Starts without torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

EXACT = "embedding"  # a use for which rounding to nearest is the solution: its rows are the outputs
UNTUNED = "no block was tuned: the network has none of several layers whose values or norms could learn"


def blind(layers: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The tensors that were rounded without a word of their inputs, and the functions that these go into."""
    found = {}
    for entry in layers:
        uses = entry.get("unseen", [EXACT])
        if not entry["inputs"] and uses != [EXACT]:
            found[entry["name"]] = ", ".join(uses) or "not used on these data"
    return found


def blind_share(layers: Sequence[Mapping[str, Any]]) -> float:
    """How much of all weights these are, 0..1."""
    found, sizes = blind(layers), {entry["name"]: math.prod(entry["shape"]) for entry in layers}
    return sum(sizes[name] for name in found) / (sum(sizes.values()) or 1)


def partly(layers: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The tensors that were calibrated on some of their uses alone, and the functions of the others."""
    uses = {entry["name"]: entry.get("unseen", [EXACT]) for entry in layers if entry["inputs"]}
    return {name: ", ".join(others) for name, others in uses.items() if others != [EXACT]}


def padded(layers: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The tensors in whose calibration padding may have counted."""
    return {entry["name"]: "" for entry in layers if "padding" in entry}


def untuned(log: Mapping[str, Any]) -> bool:
    """Whether there was to be a block-wise stage, and was none."""
    return log.get("tuned") == 0
