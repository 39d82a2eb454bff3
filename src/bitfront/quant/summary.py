"""What became of a network, as a table: bits, bytes and loss of each tensor; what is not quantized, or was blindly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bitfront.quant.log import UNTUNED, blind, padded, partly, untuned
from bitfront.quant.storage.artifact import Artifact
from bitfront.quant.storage.packed import Packed

NAMED = 4  # tensors that a line names
MUCH = 0.05  # share of the file that is told about


def summary(artifact: Artifact, log: Mapping[str, Any], why_float: Mapping[str, str]) -> str:
    """The table and its lines.

    Args:
        artifact: the network as it is stored.
        log: of a calibration.
        why_float: of each tensor that is not quantized, the reason.
    """
    known, total = {entry["name"]: entry for entry in log.get("layers", [])}, len(artifact.to_bytes())
    rows = [("tensor", "shape", "bits", "bytes", "share", "loss")]
    for name, packed in artifact.packed.items():
        shape, loss = "x".join(map(str, packed.shape)), _loss(known.get(name, {}))
        rows.append((name, shape, _bits(packed), *_size(packed.nbytes, total), loss))
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    aligned = [
        "  ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, others, strict=True))])
        for name, *cells in rows
    ]
    return "\n".join([*aligned, *_remarks(artifact, known, why_float, total), *([UNTUNED] if untuned(log) else [])])


def _remarks(
    artifact: Artifact, known: Mapping[str, Mapping[str, Any]], why_float: Mapping[str, str], total: int
) -> list[str]:
    sizes = {name: t.numel() * t.itemsize for name, t in artifact.raw.items()}
    lines = [f"file: {total:,} bytes, {total - artifact.payload:,} of them for names and layout"]
    reasons: dict[str, list[str]] = {}
    for name in sizes:
        reasons.setdefault(why_float.get(name, "float"), []).append(name)
    for reason, names in reasons.items():
        lines.append(f"float, {reason}: {_listed(names, sum(sizes[name] for name in names), total)}")
    lines += _could_be_smaller(artifact.raw, why_float, total)
    for told, found in (
        ("rounded blind, to nearest, as their inputs were not seen", blind(known.values())),
        ("calibrated on a part of their uses", partly(known.values())),
        ("calibrated on padding, too, as their inputs are not of the mask's steps", padded(known.values())),
    ):
        if found:
            named = [f"{name} ({uses})" if uses else name for name, uses in found.items()]
            lines.append(f"{told}: {_listed(named, sum(artifact.packed[name].nbytes for name in found), total)}")
    return lines


def _could_be_smaller(raw: Mapping[str, Tensor], why_float: Mapping[str, str], total: int) -> list[str]:
    """What options there are for the float32 tensors, where these are much of the file."""
    floats = {name: t.nbytes for name, t in raw.items() if t.dtype == torch.float32}
    if sum(floats.values()) < MUCH * total:
        return []
    matrices = [name for name in floats if raw[name].dim() > 1 and "min_size" in why_float.get(name, "")]
    size = f"{sum(floats[name] for name in matrices):,} bytes"
    smaller = f"; a smaller min_size quantizes {len(matrices)} of these tensors, {size}" if matrices else ""
    return [f"raw_dtype=float16 saves {sum(floats.values()) // 2:,} bytes of them{smaller}"]


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
