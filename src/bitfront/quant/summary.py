"""What became of a network, as a table: bits, bytes and loss of each tensor; what is not quantized, or was blindly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bitfront.quant.artifact import Artifact
from bitfront.quant.packed import Packed

EXACT = "embedding"  # a use for which rounding to nearest is the solution: its rows are the outputs
NAMED = 8  # tensors that a line names


def summary(artifact: Artifact, layers: Sequence[Mapping[str, Any]], why_float: Mapping[str, str]) -> str:
    """The table and its lines.

    Args:
        artifact: the network as it is stored.
        layers: of a calibration, what its log says of them.
        why_float: of each tensor that is not quantized, the reason.
    """
    known, total = {entry["name"]: entry for entry in layers}, len(artifact.to_bytes())
    rows = [("tensor", "shape", "bits", "bytes", "share", "loss")]
    for name, packed in artifact.packed.items():
        shape, loss = "x".join(map(str, packed.shape)), _loss(known.get(name, {}))
        rows.append((name, shape, _bits(packed), *_size(packed.nbytes, total), loss))
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    aligned = [
        "  ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, others, strict=True))])
        for name, *cells in rows
    ]
    return "\n".join([*aligned, *_remarks(artifact, known, why_float, total)])


def blind(layers: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The tensors of a calibration's log that were rounded without a word of their inputs, and in which function these
    are used."""
    found = {}
    for entry in layers:
        uses = entry.get("unseen", [EXACT])
        if not entry["inputs"] and uses != [EXACT]:
            found[entry["name"]] = ", ".join(uses) or "not used on these data"
    return found


def _remarks(
    artifact: Artifact, known: Mapping[str, Mapping[str, Any]], why_float: Mapping[str, str], total: int
) -> list[str]:
    sizes = {name: t.numel() * t.itemsize for name, t in artifact.raw.items()}
    lines = [f"file: {total:,} bytes, header and names among them"]
    reasons: dict[str, list[str]] = {}
    for name in sizes:
        reasons.setdefault(why_float.get(name, "float"), []).append(name)
    for reason, names in reasons.items():
        lines.append(f"float, {reason}: {_listed(names, sum(sizes[name] for name in names), total)}")
    unseen = blind(list(known.values()))
    if unseen:
        named = [f"{name} ({use})" for name, use in unseen.items()]
        size = sum(artifact.packed[name].nbytes for name in unseen)
        lines.append(f"rounded blind, to nearest, as their inputs were not seen: {_listed(named, size, total)}")
    partly = {name: e["unseen"] for name, e in known.items() if e["inputs"] and e.get("unseen", [EXACT]) != [EXACT]}
    if partly:
        named = [f"{name} ({', '.join(uses)})" for name, uses in partly.items()]
        size = sum(artifact.packed[name].nbytes for name in partly)
        lines.append(f"calibrated on a part of their uses: {_listed(named, size, total)}")
    return lines


def _listed(names: Sequence[str], size: int, total: int) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    size_text, share = _size(size, total)
    return f"{len(names)} tensors, {size_text} bytes, {share}: {', '.join(names[:NAMED])}{more}"


def _bits(packed: Packed) -> str:
    low, high = int(packed.bits.min()), int(packed.bits.max())
    return str(low) if low == high else f"{low}-{high}"


def _size(size: int, total: int) -> tuple[str, str]:
    return f"{size:,}", f"{100 * size / total:.1f} %"


def _loss(entry: Mapping[str, Any]) -> str:
    return f"{entry['loss']:.3g}" if "loss" in entry else "-"
