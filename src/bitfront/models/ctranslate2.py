"""Whisper in CTranslate2's files, ``model.bin``, as transformers has it.

Such a file is, little-endian: the version of the format; of the model's kind, its name and revision; how many variables
there are, and of each its name, rank, dimensions, type, bytes and values; how many aliases, and of each its name and
that of a variable. A name is its length, and bytes that end with a 0. Projections with one input are stacked: queries,
keys and values of self-attention, keys and values of cross-attention; keys have a bias of zeros.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitfront.errors import BitfrontError
from bitfront.models import hf

VERSION, KIND, REVISION = 6, "WhisperSpec", 3
TYPES = ("<f4", "i1", "<i2", "<i4", "<f2")  # by their number in a file
DEEPEST = 8  # dimensions
FIXED = {"activation": 3, "alibi": 0, "pre_norm": 1, "scale_embeddings": 0, "start_from_zero_embedding": 0}  # 3: GELU
MODULES = {  # of the encoder, the decoder, or a layer; several where one variable has them stacked
    "conv1": ["conv1"],
    "conv2": ["conv2"],
    "embeddings": ["embed_tokens"],
    "position_encodings": ["embed_positions"],
    "layer_norm": ["layer_norm"],
    "self_attention/layer_norm": ["self_attn_layer_norm"],
    "self_attention/linear_0": [f"self_attn.{part}_proj" for part in "qkv"],
    "self_attention/linear_1": ["self_attn.out_proj"],
    "attention/layer_norm": ["encoder_attn_layer_norm"],
    "attention/linear_0": ["encoder_attn.q_proj"],
    "attention/linear_1": [f"encoder_attn.{part}_proj" for part in "kv"],
    "attention/linear_2": ["encoder_attn.out_proj"],
    "ffn/layer_norm": ["final_layer_norm"],
    "ffn/linear_0": ["fc1"],
    "ffn/linear_1": ["fc2"],
}
ASIDE = ("num_heads", "alignment_heads", "alignment_layer")  # the last two: of timestamps of words
PARTS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias", "encodings": "weight"}
NAME = re.compile(rf"(encoder|decoder)/(?:layer_(\d+)/)?({'|'.join(MODULES)})/({'|'.join(PARTS)})")
TABLE, HEAD = "decoder/embeddings/weight", "decoder/projection/weight"


class _Bytes:
    """What is left of a file."""

    def __init__(self, content: bytes) -> None:
        self.content, self.at = memoryview(content), 0

    def take(self, size: int) -> memoryview:
        if size > len(self.content) - self.at:
            raise ValueError(f"it ends at byte {len(self.content)}, {size} are needed from {self.at}")
        self.at += size
        return self.content[self.at - size : self.at]

    def number(self, kind: str) -> int:
        """As ``struct`` has it."""
        return int(struct.unpack(f"<{kind}", self.take(struct.calcsize(kind)))[0])

    def name(self) -> str:
        raw = bytes(self.take(self.number("H")))
        if not raw.endswith(b"\0"):
            raise ValueError(f"a name before byte {self.at} has no end")
        return raw[:-1].decode("ascii")


def read(path: Path) -> dict[str, np.ndarray]:
    """The variables of a file, and their aliases, by name.

    Raises:
        BitfrontError: it is damaged, or no Whisper of the version that is read here.
    """
    try:
        return _variables(_Bytes(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise BitfrontError(
            f"'{path}' is no Whisper of CTranslate2 (version {VERSION}), or damaged: {error}; get it anew"
        ) from None


def _variables(file: _Bytes) -> dict[str, np.ndarray]:
    told = file.number("I"), file.name(), file.number("I")
    if told != (VERSION, KIND, REVISION):
        raise ValueError("it begins with {}, {}, {}".format(*told))
    found: dict[str, np.ndarray] = {}
    for _ in range(file.number("I")):
        name, rank = file.name(), file.number("B")
        if name in found or rank > DEEPEST:
            raise ValueError(f"'{name}' is there twice, or has {rank} dimensions")
        shape = [file.number("I") for _ in range(rank)]
        kind, size = file.number("B"), file.number("I")
        if kind >= len(TYPES) or size != math.prod(shape) * np.dtype(TYPES[kind]).itemsize:
            raise ValueError(f"'{name}' of shape {shape} and type {kind} has {size} bytes")
        found[name] = np.frombuffer(file.take(size), TYPES[kind]).reshape(shape)
    for _ in range(file.number("I")):
        alias, name = file.name(), file.name()
        if name not in found:
            raise ValueError(f"'{alias}' is another name of '{name}', which is not there")
        found[alias] = found[name]
    if file.at != len(file.content):
        raise ValueError(f"{len(file.content) - file.at} bytes follow its end")
    return found


def whisper(path: Path, **tokens: Any) -> nn.Module:
    """``transformers.WhisperForConditionalGeneration`` of a file, in float32; its sizes are those of the variables.

    Args:
        path: of the file.
        tokens: what it does not say of the configuration, as ``eos_token_id``.

    Raises:
        BitfrontError: as ``read``; or a variable is missing, left over, quantized, or of another shape.
    """
    transformers, found = hf.library("Whisper"), read(path)
    try:
        network = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**_sizes(found), **tokens))
        network.load_state_dict(_state(found))
    except KeyError as error:
        raise BitfrontError(f"'{path}' lacks {error}; get it anew") from None
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        told = " ".join(str(error).split())
        raise BitfrontError(f"'{path}' is another network than transformers' Whisper: {told}") from None
    return network


def _sizes(found: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Of the configuration."""
    sizes: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        layers = {match[2] for name in found if (match := NAME.fullmatch(name)) and match[1] == side and match[2]}
        sizes |= {
            f"{side}_layers": len(layers),
            f"{side}_attention_heads": int(found[f"{side}/num_heads"]),
            f"{side}_ffn_dim": len(found[f"{side}/layer_0/ffn/linear_0/bias"]),
        }
    vocabulary, dim = found[TABLE].shape
    return sizes | {
        "vocab_size": vocabulary,
        "d_model": dim,
        "num_mel_bins": found["encoder/conv1/weight"].shape[1],
        "max_source_positions": len(found["encoder/position_encodings/encodings"]),
        "max_target_positions": len(found["decoder/position_encodings/encodings"]),
    }


def _state(found: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """The variables under transformers' names."""
    state: dict[str, Tensor] = {}
    for name, values in found.items():
        match = NAME.fullmatch(name)
        if match and values.dtype.kind == "f":
            side, layer, place, part = match.groups()
            inside = f"layers.{layer}." if layer else ""
            modules = MODULES[place]
            stacked = torch.from_numpy(values.astype(np.float32)).chunk(len(modules))
            for module, own in zip(modules, stacked, strict=True):
                state[f"model.{side}.{inside}{module}.{PARTS[part]}"] = own
        elif name == HEAD and values is found[TABLE]:
            state["proj_out.weight"] = torch.from_numpy(values.astype(np.float32))
        elif not _told(name.rpartition("/")[2], values):
            raise ValueError(f"it has '{name}', {values.dtype} {list(values.shape)}")
    for name in [name for name in state if name.endswith("k_proj.bias")]:
        if state.pop(name).any():
            raise ValueError(f"it has a bias of keys, '{name}'")
    return state


def _told(name: str, values: np.ndarray) -> bool:
    """Whether a variable is no weight, and says nothing else than what holds for every Whisper."""
    return name in ASIDE or (name in FIXED and values.tolist() == FIXED[name])
