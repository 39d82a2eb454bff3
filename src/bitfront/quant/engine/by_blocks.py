"""What a post-training method says of how the blocks of a network are solved and tuned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitfront.quant.core import Sampled
from bitfront.quant.engine.blockwise import Tuner, Tuning, adam
from bitfront.quant.engine.frozen import Frozen
from bitfront.quant.engine.moving import Moving
from bitfront.quant.layers.inputs import Moments
from bitfront.quant.storage.packed import Packed
from bitfront.ranges import Ranges


@dataclass(kw_only=True)
class ByBlocks(Sampled):
    """A method that goes through a network block by block.

    Attributes:
        propagation: share, 0..1, of the errors before a layer that it makes up for: its weight is solved for what it
            gives in the float network, instead of what the float weight would give on the inputs it now gets (QEP,
            arXiv 2504.09629). In blocks of several layers; not where samples choose their experts.
        moving: epochs of the block-wise stage in which the codes move too (``moving``), before those of J; 0 for none.
        travel: how far their steps go together, in steps of the grid; codes begin at most 0.4 of one off their middle.
        momentum: of these steps: a code whose gradients do not agree hardly moves; 0 goes by the sign of each gradient,
            as AutoRound does.
        J: most epochs of it with the codes fixed (the paper's J), 0 for none.
        between: most epochs of it after each group of layers that share an input but the last, in which the weights of
            the others, still float, learn with them.
        target: of that stage: "network", the output of the block in the float network, so that a block makes up for the
            errors of those before it; "block" (the paper), that of the float block on the inputs it now gets.
        block_loss: of that stage, whether all values that a block gives count alike ("squared"), or as much as the end
            of the float network feels them ("fisher", ``felt_outputs``).
        held_out: share of the batches that it is not tuned but measured on; the best epoch on them counts.
        patience: epochs without a better one after which it stops.
        block_dtype: that products are computed in there, and where gradients of the whole network say what counts:
            "float32", "bfloat16", or "auto", the latter on a GPU.
        block_lr: learning rate (Adam) there, relative: a share of the distance of two values, of 1 for norms, and of
            the root mean square of what is still float.
    """

    propagation: float = 0.0
    moving: int = 0
    travel: float = 0.5
    momentum: float = 0.9
    J: int = 0
    between: int = 0
    target: str = "network"
    block_loss: str = "squared"
    held_out: float = 0.125
    patience: int = 2
    block_lr: float = 1e-3
    block_dtype: str = "auto"
    sees_inputs: ClassVar[bool] = True  # whether ``solve`` makes use of what a layer sees
    ranges: ClassVar[Ranges] = {
        "propagation": "[0, 1]",
        "moving": "0..",
        "travel": "(0, inf)",
        "momentum": "[0, 1)",
        "J": "0..",
        "between": "0..",
        "target": ("network", "block"),
        "block_loss": ("squared", "fisher"),
        "held_out": "[0, 1)",
        "patience": "1..",
        "block_lr": "(0, inf)",
        "block_dtype": ("auto", "float32", "bfloat16"),
    }

    @property
    def calibrates(self) -> bool:
        """Whether it goes through the network's blocks."""
        return self.sees_inputs or self.tunes

    @property
    def feels(self) -> str:
        """What says how much of what a layer sees counts: the output of its "block", the "end" of the network; or "",
        if all of it counts alike."""
        return ""

    @property
    def weighs_outputs(self) -> bool:
        """Whether the block-wise stage wants to know how much each value that a block gives counts."""
        return self.tunes and self.block_loss == "fisher"

    @property
    def feels_the_end(self) -> bool:
        """Whether gradients of the whole network say how much what is in it counts."""
        return self.feels == "end" or self.weighs_outputs

    def computed_in(self, device: torch.device) -> torch.dtype:
        usual = "bfloat16" if device.type == "cuda" else "float32"
        return getattr(torch, usual if self.block_dtype == "auto" else self.block_dtype)

    @property
    def tunes(self) -> bool:
        """Whether there is a block-wise stage."""
        return self.moving > 0 or self.J > 0 or self.between > 0

    @property
    def follows(self) -> bool:
        """Whether the float network goes along, as what a block, or a layer in it, gives there is wanted of it."""
        return self.propagation > 0 or (self.tunes and self.target == "network")

    @property
    def keeps_zero(self) -> bool:
        """Whether the values are tied to 0, also when they are tuned."""
        return False

    def wanted(self, w: Tensor, inputs: Moments | None) -> Tensor:
        """What ``solve`` comes as close to as it can, of the shape of ``w``: not the weight itself, where it makes up
        for errors before the layer."""
        return w

    def mobile(self, name: str, packed: Packed, w: Tensor, symmetric: bool, seed: int) -> Frozen:
        """A quantized weight whose codes can move.

        Args:
            name, packed, w: before and after.
            symmetric: as of ``Frozen``.
            seed: of noise.
        """
        return Moving(packed, w, symmetric)

    def tuner(self, tuning: Tuning, steps: int) -> Tuner:
        """The optimizer of the block-wise stage, and the schedule of its rates."""
        return adam(tuning, self.block_lr, steps, self.travel, self.momentum)

    def solve(self, w: Tensor, inputs: Moments | None) -> tuple[Packed, dict[str, Any]]:
        """Quantize one tensor, with the settings of this instance.

        Args:
            w: its weight, any shape.
            inputs: what the layer sees; None where that is unknown, or each row is an output: of look-ups, and
                of what is added, as biases.

        Returns:
            The packed tensor, and what is worth recording.
        """
        raise NotImplementedError

    def tried(self, w: Tensor, inputs: Moments | None, every: int = 1) -> Packed:
        """A tensor in as many bytes as ``solve`` makes of it, in less time, with an error not far above that one's:
        what ``max_size`` chooses by. Of ``Moments.rows``, the first of every so many counts; the others may be
        anything."""
        return self.solve(w, inputs)[0]
