"""Learned widths within a size: the loss says which groups get bits, the size how many (RCO, arXiv 2605.00649).

    g <- g - (g · n / n · n) n,     n = dS/dl      the gradient of the logits, along the surface of equal size
    a step of the optimizer, then  l <- l + t      one shift for all, such that  S(l) = S*

``S`` are the bits of all codes, ``S*`` goes from those of the start to the room that the file has for them, linearly
over the first half of the time in which widths learn. In the end widths are whole: all are rounded down after a shift,
the largest with which the file has at most its size. A method that then goes on with them says when (``hold``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bitfront.errors import BitfrontError
from bitfront.quant.storage.artifact import Artifact
from bitfront.quant.storage.layout import MAX_BITS
from bitfront.quant.storage.packed import Packed

RAMP = 0.5  # share of the steps in which widths learn, after which the size is reached
NEAR = 1.02
NEWTON = 4  # steps to the shift, of which the first is close
HALVINGS = 30  # of the range in which the last shift is sought


class Widths(Protocol):
    """Of a quantizer: ``logits``, of which its widths are, the ``least`` of these, and what they are rounded with."""

    logits: nn.Parameter
    group_numel: int
    least: int
    threshold: Tensor

    def widths(self) -> Tensor:
        """Of each group, continuous and differentiable."""

    def hold(self, w: Tensor) -> None:
        """Keep the widths that are stored for the rest of the training."""


class Steering(nn.Module):
    """Keeps a model that trains on its way to a size.

    Args:
        quantizers: with widths, of all tensors.
        network: whose file is meant.
        limit: bytes of the file; 0 for any, where a penalty decides.
        about: what the file says of itself, which counts.
        raw_dtype: of what is not quantized.

    Attributes:
        steps: of the whole training; to be set before its first.
        learning: share of it in which widths learn.
    """

    def __init__(
        self,
        quantizers: Mapping[str, Widths],
        network: nn.Module,
        limit: int,
        about: Mapping[str, Any],
        raw_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.learning = 1.0
        self.quantizers = tuple(quantizers.values())  # which the model has already
        self.names, self.network = tuple(quantizers), (network,)
        self.limit, self.about, self.raw_dtype, self.steps = limit, dict(about), raw_dtype, 0
        self.register_buffer("done", torch.zeros((), dtype=torch.long))
        self.register_buffer("room", torch.zeros(()))
        self.start = self._size().item()
        self.least = sum(q.group_numel * len(q.logits) * q.least for q in self.quantizers)

    def project(self) -> None:
        """Take out of the logits' gradients what would change the size."""
        if not self.steps:
            raise BitfrontError("widths learn along the training; say of how many steps= it is")
        if not self.limit or self.held:
            return
        logits = [q.logits for q in self.quantizers if q.logits.grad is not None]
        if not logits:
            return
        normals = self._normals(logits)
        grads = [p.grad for p in logits if p.grad is not None]
        power = torch.stack([(n * n).sum() for n in normals]).sum().clamp_min(1e-30)
        along = torch.stack([(g * n).sum() for g, n in zip(grads, normals, strict=True)]).sum() / power
        for g, n in zip(grads, normals, strict=True):
            g.sub_(along * n)

    @property
    def held(self) -> bool:
        """Whether the widths have learned, and the training goes on with them."""
        return self.learning < 1 and self.get_buffer("done").item() >= self.learning * self.steps > 0

    @torch.no_grad()
    def step(self) -> None:
        """Bring the size to where it is to be after this step of the optimizer; the last in which widths learn makes
        them whole."""
        if self.held:
            return
        self.get_buffer("done").add_(1)
        if self.limit:
            self._shift(min(1.0, self.get_buffer("done").item() / (RAMP * self.learning * self.steps)))
        if self.held:
            if self.limit:
                self._choose()
            for name, q in zip(self.names, self.quantizers, strict=True):
                q.hold(self.network[0].get_parameter(name).detach())

    def _shift(self, share: float) -> None:
        """All logits alike, such that of the way to the size so much is done."""
        room = max(self.get_buffer("room").item(), NEAR * self.least)  # a logit never gets to the least
        wanted = self.start + share * (room - self.start)
        logits = [q.logits for q in self.quantizers]
        for _ in range(NEWTON):
            excess = self._size() - wanted
            slope = torch.stack([n.sum() for n in self._normals(logits)]).sum().clamp_min(1e-30)
            t = (-excess / slope).clamp(-1.0, 1.0)
            for p in logits:
                p.add_(t)
            if abs(excess) < 1e-5 * wanted:
                break

    def _size(self) -> Tensor:
        """Bits of all codes."""
        return torch.stack([q.group_numel * q.widths().sum() for q in self.quantizers]).sum()

    def _normals(self, logits: Sequence[nn.Parameter]) -> Sequence[Tensor]:
        with torch.enable_grad():
            return torch.autograd.grad(self._size(), logits)

    @torch.no_grad()
    def fit(self) -> None:
        """Make the widths whole, such that the file has its size."""
        if self.limit and not self.held:
            self._choose()

    def _choose(self) -> None:
        shells = self._shells()
        widths = {name: q.widths() for name, q in zip(self.names, self.quantizers, strict=True)}

        def at(shift: float) -> dict[str, Packed]:
            whole = {
                name: stored(widths[name], shift, q.least) for name, q in zip(self.names, self.quantizers, strict=True)
            }
            return {name: replace(shells[name], bits=bits.to(torch.uint8)) for name, bits in whole.items()}

        limit = self.limit
        while True:
            low, high = -float(MAX_BITS), 1.0  # all groups have the least; none is rounded down
            rest = self._file(at(low)) - sum(p.nbytes for p in at(low).values())  # is the same for all
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                fits = rest + sum(p.estimate for p in at(middle).values()) <= limit
                low, high = (middle, high) if fits else (low, middle)
            excess = self._file(at(low)) - self.limit
            if excess <= 0 or low <= -MAX_BITS:  # all have the least: what is left is for the one who saves
                break
            limit -= excess  # the header has a few digits more
        for q in self.quantizers:
            q.threshold.fill_(low)
        chosen = at(low)
        self._give(chosen)

    @torch.no_grad()
    def measure(self) -> None:
        """Find out how many bits the codes may have; if groups of all widths are there, as long as that is not known.

        Raises:
            BitfrontError: the file cannot be so small.
        """
        if not self.limit:
            return
        shells = self._shells()
        for (name, p), q in zip(shells.items(), self.quantizers, strict=True):
            shells[name] = replace(p, bits=torch.full((len(p.codes),), q.least, dtype=torch.uint8))
        if (smallest := self._file(shells)) > self.limit:
            raise BitfrontError(
                f"max_size cannot be kept: with min_bits for all, the file has {smallest:,} bytes, and {self.limit:,} "
                "are allowed; give fewer min_bits, raw_dtype=float16, or a smaller min_size, which quantizes more"
            )
        for p in shells.values():
            p.bits = torch.arange(len(p.codes)).remainder(MAX_BITS).add(1).to(torch.uint8)
        self._give(shells)

    def _give(self, packed: Mapping[str, Packed]) -> None:
        """The codes get the bits that they have in a file, and those that are left."""
        codes = sum(sum(bits * n for bits, n in enumerate(p.width_counts())) for p in packed.values())
        self.get_buffer("room").fill_(8.0 * (self.limit - self._file(packed)) + codes)

    def _shells(self) -> dict[str, Packed]:
        """The tensors as they are stored, without their codes."""
        found = {}
        for name, q in zip(self.names, self.quantizers, strict=True):
            packed: Any = q.encode(self.network[0].get_parameter(name).detach())  # type: ignore[attr-defined]
            codes = packed.codes.new_zeros(1, 1, dtype=torch.int16).expand(packed.codes.shape)
            found[name] = replace(packed, codes=codes)
        return found

    def _file(self, packed: Mapping[str, Packed]) -> int:
        return len(Artifact.of(self.network[0], packed, self.about, self.raw_dtype).to_bytes())


def stored(widths: Tensor, shift: float | Tensor, least: int) -> Tensor:
    """Whole widths."""
    return (widths + shift).floor().clamp(least, MAX_BITS)
