"""Reads a packed file of Bitfront without Bitfront, by numpy and torch alone; free to copy into any program.

    from standalone import load
    network.load_state_dict(load("net.safetensors"))        # the same weights, bit for bit

A file is safetensors: 8 bytes with the length of a JSON header, the header, the tensors. What is quantized is an entry
of bytes: widths of the groups, codes (bit planes, group widths from the smallest), lo, span; and means

    w = lo + span * code / (2**bits - 1)

in rows of axes that may come in another order. Widths are bit planes or entropy-coded (rANS); lo and span floats, or
whole numbers relative to a float16 of the row.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def load(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict of the float network, in the types that it was stored from; quantized weights are float32."""
    with open(path, "rb") as file:
        data = file.read()
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:start])
    text = entries.pop("__metadata__")["bitfront"]
    header = json.loads(text)
    if header["version"] > 4:
        raise ValueError(f"format {header['version']} is newer than this program")
    state, checksum = {}, 0
    for name in sorted(entries):
        begin, end = entries[name]["data_offsets"]
        content = np.frombuffer(data, np.uint8, end - begin, start + begin)
        checksum = zlib.crc32(content.tobytes(), zlib.crc32(name.encode(), checksum))
        if name in header["quantized"]:
            state[name] = _decoded(content, header["quantized"][name])
        else:
            kind, shape = TYPES[entries[name]["dtype"]], entries[name]["shape"]
            values = torch.from_numpy(content.copy()).view(kind) if content.size else torch.empty(0, dtype=kind)
            state[name] = values.reshape(shape)
    lines = [f"{name} {TYPES[entry['dtype']]} {entry['shape']}" for name, entry in sorted(entries.items())]
    own = zlib.crc32("\n".join([text.rpartition(',"own_crc32":')[0], *lines]).encode())
    if checksum != header["crc32"] or own != header.get("own_crc32", own):  # older files have the first alone
        raise ValueError(f"'{path}' is damaged")
    for kind, names in header.get("narrow", {}).items():  # of what is float32 in the network; [] means all of it
        for name in names or [name for name, t in state.items() if t.dtype == getattr(torch, kind)]:
            state[name] = state[name].float()
    return state | {alias: state[name] for alias, name in header["tied"].items()}


def _decoded(data: np.ndarray, layout: dict[str, Any]) -> torch.Tensor:
    size, rows, (lowest, highest) = layout["group_size"], layout.get("rows", 0), layout["bits"]
    numel = int(np.prod(layout["shape"], dtype=np.int64))
    view, axes = layout.get("view") or layout["shape"], layout.get("axes") or [*range(len(layout["shape"]))]
    stored = [view[axis] for axis in axes]
    columns = numel // max(rows, 1)  # that are cut into groups together; the last one may be longer than they are
    groups = max(rows, 1) * -(-columns // size)
    at = 0

    def take(n: int) -> np.ndarray:
        nonlocal at
        at += n
        return data[at - n : at]

    def codes(n: int, width: int) -> np.ndarray:  # plane i has bit i of each code
        length = -(-n // 8)
        planes = np.unpackbits(take(width * length).reshape(width, length), axis=1, count=n, bitorder="little")
        return (planes.astype(np.int32) << np.arange(width)[:, None]).sum(0, dtype=np.int32)

    coded = layout.get("coded")
    bits = lowest + (_symbols(take(coded), groups) if coded else codes(groups, (highest - lowest).bit_length()))
    kept = np.ones((groups, size), bool)
    if rows:  # whose padding is not stored
        row = np.arange(-(-columns // size) * size) < columns
        kept = np.tile(row.reshape(-1, size), (rows, 1))
    found = np.zeros((groups, size), np.int32)
    for width in np.unique(bits):
        here = np.flatnonzero(bits == width)
        part = np.zeros((len(here), size), np.int32)
        part[kept[here]] = codes(int(kept[here].sum()), int(width))
        found[here] = part

    def numbers(n: int) -> torch.Tensor:  # of the grids
        if table := layout.get("table"):
            q = torch.from_numpy(codes(n, table)).view(rows or stored[0], -1)
            top = torch.from_numpy(take(2 * len(q)).copy()).view(torch.float16)
            return (q.float() / (2**table - 1) * top.float()[:, None]).view(-1)
        kind = getattr(torch, layout["dtype"])
        return torch.from_numpy(take(n * kind.itemsize).copy()).view(kind).float()

    lo, span = numbers(layout["scales"]), numbers(layout["scales"])
    lo, span = (x.repeat_interleave(groups // layout["scales"])[:, None] for x in (lo, span))
    step = span / ((1 << torch.from_numpy(bits).int()) - 1)[:, None]
    values = torch.from_numpy(found).float() * step + lo
    if rows:
        values = values.reshape(rows, -1)[:, :columns]
    values = values.reshape(-1)[:numel].reshape(stored).permute(np.argsort(axes).tolist() if axes else [])
    return values.reshape(layout["shape"]).contiguous()


def _symbols(data: np.ndarray, n: int) -> np.ndarray:
    """Of a stream of rANS: frequencies of 4096, states of lanes of 1024 symbols, words of 16 bits."""
    k, lanes = int(data[0]) + 1, -(-n // 1024)
    f = data[1 : 1 + 2 * k].copy().view("<u2").astype(np.int64)
    symbol, below = np.repeat(np.arange(k), f), np.cumsum(f) - f
    x = data[1 + 2 * k : 1 + 2 * k + 4 * lanes].copy().view("<u4").astype(np.int64)
    words = data[1 + 2 * k + 4 * lanes :].copy().view("<u2").astype(np.int64)
    rows, at = np.empty((-(-n // lanes), lanes), np.int64), 0
    for row in rows:
        slot = x & 4095
        row[:] = symbol[slot]
        x = f[row] * (x >> 12) + slot - below[row]
        low = np.flatnonzero(x < 1 << 16)
        x[low] = x[low] << 16 | words[at : at + len(low)]
        at += len(low)
    return rows.reshape(-1)[:n]
