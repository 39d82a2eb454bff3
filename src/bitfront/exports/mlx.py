"""A folder that mlx-lm loads: weights by MLX's affine rule (mlx.core.quantize; https://ml-explore.github.io/mlx)

    w = scales * code + biases,      groups of 32, 64 or 128 values of a row, codes of 2, 3, 4, 5, 6 or 8 bits

which is ours with biases = lo and scales = step: floats are exact zeros. Codes are a row's bits from the lowest on, in
uint32; a code may straddle two. Grids of more values stand in several groups, codes of other widths in the next wider
one. Scales are float32, as MLX computes weights in their type, and float16 would round every one.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from bitfront.errors import BitfrontError
from bitfront.exports.blocks import REMEDY, Blocks
from bitfront.exports.causal import Causal, Written, whole
from bitfront.quant.storage.packed import Packed

BITS, SIZES = (2, 3, 4, 5, 6, 8), (128, 64, 32)
BESIDE = ("token*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat*", "generation*")
ROWS = 4096  # packed at once


def export(network: Causal, out: Path) -> Written:
    """Write the folder.

    Args:
        network: with its weights.
        out: the folder; is not there yet.

    Raises:
        BitfrontError: a tensor's groups or widths are none of MLX's, or the place cannot be written to.
    """
    written = Written()
    tensors, layers = dict(network.artifact.raw), {}
    for name, packed in network.artifact.packed.items():
        if len(packed.shape) < 2:  # a norm of a wide network
            tensors[name] = packed.decode()
            continue
        layer = name.removesuffix(".weight")
        layers[layer], parts = _affine(name, packed)
        tensors |= {f"{layer}.{part}": t for part, t in parts.items()}
        written.moved["{bits} bits in groups of {group_size}".format(**layers[layer])].append(0.0)
    with whole(out) as folder:
        folder.mkdir()
        for file in [file for pattern in BESIDE for file in network.folder.glob(pattern) if file.is_file()]:
            shutil.copy(file, folder)
        (folder / "config.json").write_text(json.dumps(_config(network, layers), indent=2))
        content = save({name: t.contiguous() for name, t in tensors.items()}, {"format": "mlx"})
        (folder / "model.safetensors").write_bytes(content)
        written.size = len(content)
    return written


def _affine(name: str, packed: Packed) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Its layer's entry in the config.json, and its tensors."""
    width = int(packed.bits.max())
    bits = next((b for b in BITS if b >= width), None)
    if bits is None:
        raise BitfrontError(f"'{name}' has codes of {width} bits, and MLX up to {BITS[-1]}; quantize with fewer")
    blocks = next((found for size in SIZES if (found := Blocks.of(packed, size))), None)
    if blocks is None:
        raise BitfrontError(f"'{name}' is not in groups that MLX has; {REMEDY}")
    codes = [bit_stream(blocks.codes[n : n + ROWS], bits) for n in range(0, len(blocks.codes), ROWS)]
    weight = torch.from_numpy(np.concatenate(codes))
    return {"group_size": blocks.size, "bits": bits}, {"weight": weight, "scales": blocks.step, "biases": blocks.lo}


def bit_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """A row's codes one after the other, each from its lowest bit on.

    Args:
        codes: whole numbers ``[rows, columns]`` of so many bits; columns are a multiple of 32.

    Returns:
        uint32 ``[rows, columns * bits / 32]``.
    """
    each = np.unpackbits(codes.astype(np.uint8)[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(each.reshape(len(codes), -1), axis=-1, bitorder="little").view("<u4")


def _config(network: Causal, layers: dict[str, dict[str, int]]) -> dict[str, Any]:
    """The config.json, with what each layer has that differs from most. mlx-lm reads the rotation where transformers
    had it before its fifth version."""
    rotation = network.rotation
    config = {**network.config, "rope_theta": rotation["rope_theta"]}
    config["rope_scaling"] = rotation if rotation["rope_type"] != "default" else None
    (usual, _), *_ = Counter(tuple(entry.items()) for entry in layers.values()).most_common(1)
    others = {name: entry for name, entry in layers.items() if entry != dict(usual)}
    return config | {"quantization": dict(usual) | others}
