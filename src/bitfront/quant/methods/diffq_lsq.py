"""Widths by DiffQ, values by LSQ: both papers' gradients are of one function,

    w_train = clip(w + span / (2**b - 1) * e, lo, lo + span)

with ``e`` noise, U[-1/2, 1/2], as long as widths ``b`` learn (DiffQ, arXiv 2104.09987; the learned range is NIPQ's,
arXiv 2206.00820, whose noise spares what is clipped: as that comes and goes with the range, its gradient is not that of
the expected loss); then the error of rounding on the grid of whole widths, in steps of it, whose gradient in ``span``
is that of a learned step (LSQ, arXiv 1902.08153, eq. 3).

Each group, as a row, has a width and a grid. The grid starts, for every width, as the one on which rounding has the
least squared error; what is learned is by how much it is moved and stretched, relative to its size, so that one
learning rate fits all tensors. When the widths are whole, it is fitted anew to what the weights are then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bitfront.quant.model import QuantizedModel
from bitfront.quant.steered import Steering
from bitfront.quant.storage.packed import Packed, grouped, ungrouped
from bitfront.quant.storage.rounding import fitted_range, on_stored_grid, reciprocal
from bitfront.quant.storage.scales import Scales
from bitfront.quant.widths import LearnedWidth, LearnedWidths
from bitfront.ranges import Ranges


class DiffQLSQQuantizer(LearnedWidth):
    """Width and grid of each group."""

    whole: Tensor
    fitted: Tensor

    def __init__(self, w: Tensor, method: DiffQLSQ) -> None:
        super().__init__(w, method)
        self.grid = nn.Parameter(torch.zeros(2, len(self.logits), device=w.device))  # moved, stretched
        self.register_buffer("whole", torch.zeros(len(self.logits), dtype=torch.uint8, device=w.device))
        self.register_buffer("fitted", self._fit(w))

    def _fit(self, w: Tensor) -> Tensor:
        """Smallest values and ranges of the best grids, ``[2, widths, groups]``."""
        some = range(self.method.min_bits, self.method.max_bits + 1)
        grids = [torch.stack(fitted_range(w.detach(), self.method.group_size, bits)) for bits in some]
        return torch.stack(grids, 1)

    @property
    def held(self) -> bool:
        """Whether the widths have learned."""
        return bool(self.whole[0])

    def widths(self) -> Tensor:
        # Logits stay in the graph: DistributedDataParallel waits for all gradients.
        return torch.where(self.whole > 0, self.whole.float(), super().widths())

    def stored_widths(self) -> Tensor:
        return self.whole.float() if self.held else super().stored_widths()

    def hold(self, w: Tensor) -> None:
        self.whole.copy_(self.stored_widths())
        self.fitted.copy_(self._fit(w))
        self.grid.data.zero_()

    def grids(self, widths: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest value and range of each group's grid, ``[groups]`` each; between whole widths, in proportion."""
        at = widths.clamp(self.least, self.least + self.fitted.shape[1] - 1) - self.least
        below = at.detach().floor().long().clamp(max=self.fitted.shape[1] - 2)
        low, high = (self.fitted.gather(1, n.expand(2, 1, -1))[:, 0] for n in (below, below + 1))
        lo, span = torch.lerp(low, high, at - below)
        moved, stretched = self.grid
        return lo + span * (moved + (1 - stretched.exp()) / 2), span * stretched.exp()  # around the middle

    def surrogate(self, w: Tensor) -> Tensor:
        groups, widths = grouped(w, self.method.group_size), self.widths()
        rounds = self.held or self.method.noise == "rounding"
        if rounds:
            widths = widths + (widths.round() - widths).detach()
        lo, span = (x[:, None] for x in self.grids(widths))
        step = span / (torch.exp2(widths)[:, None] - 1)
        if not rounds:
            groups = torch.addcmul(groups, step, torch.rand_like(groups).sub_(0.5))
        seen = torch.minimum(torch.maximum(groups, lo), lo + span)
        if rounds:
            at = ((seen - lo) * reciprocal(step)).detach()
            seen = torch.addcmul(seen, step, at.round().sub_(at))
        return ungrouped(seen, w.shape)

    def encode(self, w: Tensor) -> Packed:
        widths = self.stored_widths().int()
        lo, span = (x.detach() for x in self.grids(widths.float()))
        return on_stored_grid(w, widths, lo, span, self.method.group_size, Scales(self.method.dtype))

    def bits(self) -> Tensor:
        return self.coded_bits() + 2 * 8 * self.method.dtype.itemsize * len(self.logits)


@dataclass(kw_only=True)
class DiffQLSQ(LearnedWidths):
    """Differentiable widths, then learned step size.

    Attributes:
        learning: share of the steps in which widths learn.
        noise: "uniform" there, or "rounding": the error of rounding already (HGQ, arXiv 2405.00645).
        scale_dtype: in which grids are stored.
        travel: how far a logit can go by its gradients; the learning rate (Adam) is that much in the steps in which
            widths learn.
        grid_lr: learning rate (Adam) of the grids, relative to their size.
    """

    penalty: float = field(default=1.0)
    group_size: int = -1
    min_bits: int = 1
    init_bits: int = 6
    max_bits: int = 8
    learning: float = 0.5
    noise: str = "uniform"
    scale_dtype: str = "float16"
    travel: float = 6.0
    grid_lr: float = 1e-3
    ranges: ClassVar[Ranges] = {
        "learning": "(0, 1)",
        "noise": ("uniform", "rounding"),
        "scale_dtype": ("float32", "float16", "bfloat16"),
        "travel": "(0, inf)",
        "grid_lr": "(0, inf)",
    }

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored grids."""
        return getattr(torch, self.scale_dtype)

    def quantizer(self, w: Tensor) -> DiffQLSQQuantizer:
        return DiffQLSQQuantizer(w, self)

    def remedy(self) -> str:
        return f"give a larger penalty than {self.penalty:g}, or a larger {type(self).__name__}(travel=...)"

    @property
    def steered(self) -> bool:
        return True

    def steering(self, model: QuantizedModel, about: Mapping[str, Any]) -> Steering:
        steering = super().steering(model, about)
        steering.learning = self.learning
        return steering

    def optimizer(self, parameters: list[nn.Parameter], steps: int = 0) -> torch.optim.Optimizer | None:
        grids = [p for p in parameters if p.dim() == 2]
        logits = [p for p in parameters if p.dim() == 1]
        lr = self.travel / max(self.learning * steps, 1)
        return torch.optim.Adam([{"params": logits, "lr": lr}, {"params": grids, "lr": self.grid_lr}])
