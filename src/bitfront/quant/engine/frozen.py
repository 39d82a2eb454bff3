"""The quantizer that post-training methods leave behind: codes that stay, on a grid that may learn."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from bitfront.quant.model import Quantizer
from bitfront.quant.storage.packed import Packed, middle_code
from bitfront.quant.storage.rounding import by_rows
from bitfront.quant.storage.scales import Scales, told


class Frozen(Quantizer):
    """The result of a post-training method: the codes stay as they were solved, and are part of the state.

    Args:
        packed: with one width for all codes if trainable.
        trainable: learn the values that the codes stand for, as decoupleQ's block-wise and fine-tuning stages do. The
            parameters are ``gain`` (the distance of neighbours) and ``shift`` (the middle value).
        relative: both in units of the distance at the start, so that one learning rate fits every tensor; else they are
            the paper's s and z.
        symmetric: the values stay where they are relative to each other and to 0: no ``shift``.
    """

    moves: ClassVar[bool] = False  # whether codes learn, too

    def __init__(self, packed: Packed, trainable: bool = False, symmetric: bool = False, relative: bool = True) -> None:
        super().__init__()
        self.shape, self.rows, self.view, self.axes = packed.shape, packed.rows, packed.view, packed.axes
        self.scales = Scales(packed.lo.dtype, packed.table, symmetric)
        self.by_rows = by_rows(packed.lo, torch.Size((packed.lines, *packed.shape[1:]))).shape
        form = {"scale_dtype": told(packed.lo.dtype), "scale_bits": packed.table}
        self.settings = {"bits": int(packed.bits.max()), **form}
        self.fixed = not trainable
        for name in ("codes", "bits", "lo", "span"):
            self.register_buffer(f"packed_{name}", getattr(packed, name))
        self.levels, self.middle = (1 << int(packed.bits.max())) - 1, middle_code(int(packed.bits.max()))
        self.gain = self.shift = None
        if trainable:
            distance = packed.span.float() / self.levels
            usual = distance[distance != 0].abs().mean() if distance.any() else torch.ones(())
            unit = torch.where(distance == 0, usual, distance) if relative else torch.ones_like(distance)
            self.register_buffer("unit", unit)
            self.gain = nn.Parameter(distance / self.get_buffer("unit"))
            middle = packed.lo.float() / self.get_buffer("unit") + self.gain.detach() * self.middle
            self.shift = nn.Parameter(middle, requires_grad=not symmetric)

    @property
    def packed(self) -> Packed:
        as_solved = (self.get_buffer(f"packed_{name}") for name in ("lo", "span"))
        lo, span = as_solved if self.gain is None else self._stored()
        return self._on(lo, span, self.codes())

    def _on(self, lo: Tensor, span: Tensor, codes: Tensor) -> Packed:
        """Codes on grids."""
        bits = self.get_buffer("packed_bits")
        return Packed(codes, bits, lo, span, self.shape, self.rows, self.scales.table, self.view, self.axes)

    def _learned(self) -> tuple[Tensor, Tensor]:
        assert self.gain is not None and self.shift is not None
        unit = self.get_buffer("unit")
        return unit * (self.shift - self.gain * self.middle), unit * self.gain * self.levels

    def _stored(self) -> list[Tensor]:
        lo, span = (x.detach().view(self.by_rows) for x in self._learned())
        return [x.flatten() for x in self.scales.stored(lo, span)]

    def values(self) -> Tensor:
        """The weight, float32, differentiable in what is learned."""
        if self.gain is None:
            return self.packed.decode()
        # as they are stored, with the gradients of what is learned
        lo, span = (x + (s.to(x) - x.detach()) for x, s in zip(self._learned(), self._stored(), strict=True))
        return self._on(lo, span, self.learned_codes()).decode()

    def at(self, share: float) -> None:
        """So much of the training is done, 0..1."""

    def codes(self) -> Tensor:
        """As they are stored."""
        return self.get_buffer("packed_codes")

    def learned_codes(self) -> Tensor:
        """The same numbers, with the gradients of what is learned."""
        return self.codes()

    def surrogate(self, w: Tensor) -> Tensor:
        return self.values()

    def encode(self, w: Tensor) -> Packed:
        return self.packed

    def bits(self) -> Tensor:
        return torch.tensor(float(self.packed.rule_bits()))
