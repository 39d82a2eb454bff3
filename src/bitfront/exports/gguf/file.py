"""A GGUF file, which llama.cpp and what is made of it run: weights in the types of ``types``, names and header by the
package gguf. The rows of queries and keys stand in pairs there, as the rotation takes them, and in transformers in
halves of a head; a tied output layer is left out.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import torch

from bitfront.errors import BitfrontError
from bitfront.exports.blocks import REMEDY
from bitfront.exports.causal import Causal, Written, whole
from bitfront.exports.gguf import types, vocabulary

ARCHITECTURE = gguf.MODEL_ARCH.LLAMA


def export(network: Causal, out: Path) -> Written:
    """Write the file.

    Args:
        network: with its weights.
        out: the file.

    Raises:
        BitfrontError: a tensor's groups fit no type, the rotation or the tokenizer is of another kind, or the place
            cannot be written to.
    """
    written = Written()
    file = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[ARCHITECTURE])
    _add_header(file, network)
    vocabulary.add(file, network)
    names = gguf.get_tensor_name_map(ARCHITECTURE, network.layers)
    for name, (kind, data) in _tensors(network, written).items():
        layer, _, part = name.rpartition(".")
        data = _paired(data, network.heads.get(layer.rpartition(".")[2], 0))
        file.add_tensor(f"{names.get_name(layer)}.{part}", data, raw_dtype=gguf.GGMLQuantizationType[kind])
    with whole(out) as place:
        file.write_header_to_file(place)
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
        file.close()
        written.size = place.stat().st_size
    return written


def _tensors(network: Causal, written: Written) -> dict[str, tuple[str, np.ndarray]]:
    """Type and data of each tensor, ``[rows, ...]``."""
    found = {}
    others: Counter[str] = Counter()
    for name, packed in network.artifact.packed.items():
        if len(packed.shape) < 2:  # a norm of a wide network
            found[name] = types.FLOAT, packed.decode().numpy()
            continue
        encoded = types.smallest(packed)
        if encoded is None:
            raise BitfrontError(f"'{name}' is not in groups that a type of GGUF has; {REMEDY}")
        kind, data, moved = encoded
        found[name] = kind, data
        written.moved[kind].append(moved)
        if (fitting := types.fitting(packed)) and fitting.name != kind:
            others[f"no {fitting.name}, which is for a grid {fitting.needs}"] += 1
    written.notes += [f"{n} are {what}" for what, n in others.items()]
    for name, t in network.artifact.raw.items():
        half = t.dtype == torch.float16 and t.dim() > 1
        found[name] = (types.HALF if half else types.FLOAT), (t if half else t.float()).numpy()
    return found


def _add_header(file: gguf.GGUFWriter, network: Causal) -> None:
    config, rotation = network.config, network.rotation
    if rotation["rope_type"] != "default":
        raise BitfrontError(
            f"positions are rotated with rope_type={rotation['rope_type']}, which format=gguf does not write; "
            "format=mlx does"
        )
    file.add_name(network.folder.resolve().name)
    file.add_quantization_version(gguf.GGML_QUANT_VERSION)
    file.add_block_count(network.layers)
    file.add_context_length(config.get("max_position_embeddings", 2048))
    file.add_embedding_length(config["hidden_size"])
    file.add_feed_forward_length(config["intermediate_size"])
    file.add_head_count(network.heads["q_proj"])
    file.add_head_count_kv(network.heads["k_proj"])
    for add in (file.add_key_length, file.add_value_length, file.add_rope_dimension_count):
        add(network.head_size)
    file.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    file.add_rope_freq_base(rotation["rope_theta"])
    file.add_vocab_size(config["vocab_size"])


def _paired(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order of pairs; as they are if there are no heads."""
    if not heads:
        return rows
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
