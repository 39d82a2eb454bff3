"""GSQ (2026, arXiv 2604.18556): from GPTQ's codes, each weight learns which of the values around it to
take, by Gumbel-softmax over them, together with the scales of the groups, so that the output of a block comes closest
to what the float block makes of the same inputs.

    ŵ = s Σ_k p_k v_k,      p = softmax((κ l + G) / τ),      G = -log(-log u) anew for each step

Up to 2 bits ``v`` is the whole grid, else the code and two values on each side of it. τ falls from 2 to 0.05 and κ
grows from 100 to 500, both linearly; in the end each weight takes the value of its largest logit. Lion moves a logit by
at most its rate, so that all of them can travel as far in few steps as in the paper's 640: by 0.07 along the cosine of
the rate, where two neighbours start 0.03 apart.

Differs from the official code: a block is tuned as a whole, not attention first and MLP then; the rate of scales is
relative to them; the best epoch on held-out inputs counts, with GPTQ's solution among the candidates, for which the
noise of the start leaves the largest logit where GPTQ's code is.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from timm.optim import Lion
from torch import Tensor, nn

from bitfront.quant.engine.blockwise import Tuner, Tuning
from bitfront.quant.engine.frozen import Frozen
from bitfront.quant.methods.gptq import GPTQ
from bitfront.quant.storage.packed import Packed
from bitfront.ranges import Ranges

TEMPERATURE, SHARPNESS = (2.0, 0.05), (100.0, 500.0)  # τ and κ, at the first and at the last step
TRAVEL = 0.128  # peak rate of the logits, times the steps
SCALES = 5e-3  # rate of the scales, relative to them: the paper's 1e-4 at its usual scale of 0.02
FLOOR = 0.1  # of both rates, at the end of their cosine
AROUND = 2  # neighbours on each side, above 2 bits
LEAST = 2.0**-25  # of the u above, which else is a multiple of 2^-24, 0 among them


class Soft(Frozen):
    """A tensor of which each code is yet to be chosen.

    Args:
        packed, symmetric: as of ``Frozen``.
        std, strength: of the logits at the start, ``std (n + strength (-d²/2 - mean))``, where ``d`` is a value's
            distance from the code, and ``n`` is normal.
        seed: of all noise.
    """

    moves = True

    def __init__(
        self, packed: Packed, symmetric: bool = True, std: float = 0.01, strength: float = 6.0, seed: int = 0
    ) -> None:
        super().__init__(packed, True, symmetric)
        self.seed, self.generator = seed, torch.Generator(packed.codes.device).manual_seed(seed)
        codes = packed.codes.long()
        choices = self.levels + 1 if self.levels < 4 else 2 * AROUND + 1
        first = torch.zeros_like(codes) if self.levels < 4 else codes - AROUND
        self.register_buffer("first", first.short())
        at = first + torch.arange(choices, device=codes.device)[:, None, None]
        self.register_buffer("outside", (at < 0) | (at > self.levels))
        near = -(at - codes).float().square() / 2
        noise = torch.empty_like(near).normal_(generator=self.generator)
        logits = std * (noise + strength * (near - near.mean(0)))
        own = (codes - first)[None]
        most = logits.masked_fill(self.get_buffer("outside"), -torch.inf).argmax(0, keepdim=True)
        both = logits.gather(0, torch.cat([most, own]))
        self.logits = nn.Parameter(logits.scatter(0, torch.cat([own, most]), both))
        self.at(0.0)

    def at(self, share: float) -> None:
        # The same noise in all processes, also in one that has no part of a batch.
        self.generator.manual_seed(zlib.crc32(f"{self.seed} {share}".encode()))
        self.temperature, self.sharpness = (a + (b - a) * share for a, b in (TEMPERATURE, SHARPNESS))

    def codes(self) -> Tensor:
        inside = self.logits.detach().masked_fill(self.get_buffer("outside"), -torch.inf)
        return (self.get_buffer("first") + inside.argmax(0)).to(self.get_buffer("packed_codes").dtype)

    def learned_codes(self) -> Tensor:
        """Their expectation, under fresh noise."""
        with torch.no_grad():
            noise = torch.empty_like(self.logits).uniform_(generator=self.generator).clamp_min_(LEAST)
            noise.log_().neg_().log_().div_(-self.temperature).masked_fill_(self.get_buffer("outside"), -torch.inf)
        odds = noise.add(self.logits, alpha=self.sharpness / self.temperature).softmax(0)
        shifts = torch.arange(len(odds), dtype=odds.dtype, device=odds.device)
        return self.get_buffer("first") + (shifts @ odds.flatten(1)).view(odds.shape[1:])


@dataclass(kw_only=True)
class GSQ(GPTQ):
    """GSQ. What is in no block of several layers stays as GPTQ leaves it.

    Attributes:
        moving: epochs.
        std, strength: of the logits at the start, as of ``Soft``.
        keep_codes: patterns of tensors that keep GPTQ's codes; their scales learn.
    """

    bits: int = 2
    group_size: int = 128
    symmetric: bool = True
    grid: str = "mse"
    damping: float = 0.1
    act_order: bool = False
    moving: int = 10
    target: str = "block"
    std: float = 0.01
    strength: float = 6.0
    keep_codes: list[str] = field(default_factory=lambda: ["*q_proj*", "*k_proj*"])
    ranges: ClassVar[Ranges] = {"std": "(0, inf)", "strength": "(0, inf)"}

    def mobile(self, name: str, packed: Packed, w: Tensor, symmetric: bool, seed: int) -> Frozen:
        if any(fnmatchcase(name, pattern) for pattern in self.keep_codes):
            return Frozen(packed, True, symmetric)
        return Soft(packed, symmetric, self.std, self.strength, zlib.crc32(f"{name} {seed}".encode()))

    def tuner(self, tuning: Tuning, steps: int) -> Tuner:
        if not any(f.moves for f in tuning.frozen.values()):
            return super().tuner(tuning, steps)
        logits = [f.logits for f in tuning.frozen.values() if isinstance(f, Soft)]
        groups: list[dict[str, Any]] = [
            {"params": logits, "lr": TRAVEL / steps, "weight_decay": 1.0},
            {"params": tuning.values(), "lr": SCALES},
        ]
        optimizer = Lion(groups, betas=(0.9, 0.95))
        return optimizer, torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda n: FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * n / steps)) / 2
        )
