"""Causal language models of the Llama architecture, for runtimes that know them by a config.json."""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitfront.errors import BitfrontError
from bitfront.quant.storage.artifact import Artifact

ARCHITECTURE, ACTIVATION = "LlamaForCausalLM", "silu"
LAYER, NORMS = "model.layers.{}.", ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Causal:
    """A network.

    Attributes:
        artifact: with its weights.
        config: its config.json.
        rules: its tokenizer.json.
        folder: where these lie.

    Raises:
        BitfrontError: it is of another architecture, or the artifact is another network's or not quantized.
    """

    artifact: Artifact
    config: Mapping[str, Any]
    rules: Mapping[str, Any]
    folder: Path

    def __post_init__(self) -> None:
        found = *(self.config.get("architectures") or ["none"]), self.config.get("hidden_act", ACTIVATION)
        if found != (ARCHITECTURE, ACTIVATION):
            raise BitfrontError(
                f"'{self.folder}' has {', '.join(map(str, found))}; {ARCHITECTURE} with {ACTIVATION} alone goes into "
                "this format; format=onnx takes any network"
            )
        if not self.artifact.packed:
            raise BitfrontError(
                "nothing in the artifact is quantized; transformers' save_pretrained saves such networks"
            )
        ours = {name: tuple(t.shape) for name, t in (self.artifact.packed | self.artifact.raw).items()}
        try:
            wanted = self._shapes()
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise BitfrontError(f"'{self.folder}/config.json' is damaged ({error!r}); get it anew") from None
        for name in sorted(ours.keys() | wanted.keys()):
            if ours.get(name) != wanted.get(name):
                raise BitfrontError(
                    f"the artifact is not of the network in '{self.folder}': '{name}' is {ours.get(name)}, where its "
                    f"config.json has {wanted.get(name)}; give model=hf:<folder> of that which was quantized"
                )

    @property
    def layers(self) -> int:
        """How many blocks of attention and feed-forward it has."""
        return int(self.config["num_hidden_layers"])

    @property
    def heads(self) -> dict[str, int]:
        """Of the queries and of the keys, by the name of the layer."""
        heads = self.config["num_attention_heads"]
        return {"q_proj": heads, "k_proj": self.config.get("num_key_value_heads") or heads}

    @property
    def head_size(self) -> int:
        """Values of a head."""
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"])

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding."""
        return bool(self.config.get("tie_word_embeddings", False))

    @property
    def rotation(self) -> dict[str, Any]:
        """Of positions: ``rope_theta``, ``rope_type``, and what else that has, wherever the config.json says so."""
        usual = {"rope_theta": self.config.get("rope_theta", 10000.0), "rope_type": "default"}
        scaled = self.config.get("rope_scaling") or {}
        scaled = {("rope_type" if key == "type" else key): value for key, value in scaled.items()}
        return usual | scaled | (self.config.get("rope_parameters") or {})

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of its tensors, by name."""
        width, inner, size = self.config["hidden_size"], self.config["intermediate_size"], self.head_size
        queries, keys = (n * size for n in self.heads.values())
        attention, feed = self.config.get("attention_bias", False), self.config.get("mlp_bias", False)
        linear = {
            "self_attn.q_proj": (queries, width, attention),
            "self_attn.k_proj": (keys, width, attention),
            "self_attn.v_proj": (keys, width, attention),
            "self_attn.o_proj": (width, queries, attention),
            "mlp.gate_proj": (inner, width, feed),
            "mlp.up_proj": (inner, width, feed),
            "mlp.down_proj": (width, inner, feed),
        }
        layer: dict[str, tuple[int, ...]] = {f"{name}.weight": (width,) for name in NORMS}
        layer |= {f"{name}.weight": (rows, columns) for name, (rows, columns, _) in linear.items()}
        layer |= {f"{name}.bias": (rows,) for name, (rows, _, bias) in linear.items() if bias}
        outer = ["model.embed_tokens", *([] if self.tied else ["lm_head"])]
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (self.config["vocab_size"], width) for name in outer}
        shapes |= {LAYER.format(n) + name: shape for n in range(self.layers) for name, shape in layer.items()}
        return shapes | {"model.norm.weight": (width,)}


@dataclass
class Written:
    """What came out.

    Attributes:
        size: bytes.
        moved: of each kind of tensors, how far the values of each lie from ours, at most, in steps of their grids.
        notes: what else is to be known.
    """

    size: int = 0
    moved: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = [f"{len(moved)} as {kind}, {_told(max(moved))}" for kind, moved in self.moved.items()]
        return "; ".join([f"{self.size:,} bytes; quantized tensors: {kinds[0]}", *kinds[1:], *self.notes])


def _told(moved: float) -> str:
    return f"values moved by {moved:.2g} of a step at most" if moved else "exact"


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A place beside a file or folder, of which that is made when all is written.

    Raises:
        BitfrontError: the disk is full or the place is not writable; nothing is left behind.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=out.absolute().parent) as temporary:
            yield Path(temporary) / out.name
            os.replace(Path(temporary) / out.name, out)
    except OSError as error:
        raise BitfrontError(f"could not write '{out}' ({error.strerror}); make room, or give another place") from None
