"""The block-wise stage (decoupleQ, arXiv 2404.12759, equation 2): with the codes fixed, the values that they stand for
and the norms of a block are tuned so that the block's output comes closest to what the float block gives. Codes may
move first (``moving``).

Between the layers of a block (as in QuIP#, arXiv 2402.04396, section 5) the weights that are still float learn with
them: they make up for the errors so far before they are quantized themselves, which moves their codes.

Differs from the official code: float32 masters, so that norms of half precision learn too; relative learning rates;
batches are shuffled; a part is held out, measured with the values as they will be stored, and the best epoch on it
counts, with the untuned block among the candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bitfront.errors import BitfrontError, first_line
from bitfront.quant.engine.frozen import Frozen
from bitfront.quant.engine.moving import Moving
from bitfront.quant.forwards.captured import Captured
from bitfront.quant.forwards.functional import call, differentiable, needing_gradients, places
from bitfront.quant.forwards.narrow import check_convolutions
from bitfront.quant.forwards.together import gathered, summed_gradients
from bitfront.quant.layers.felt import FeltCalls, floating
from bitfront.quant.layers.uses import inside

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
Call = tuple[Captured, list[Tensor], list[float]]  # inputs, what the float block makes of them, how much outputs count
SQUARES = 0.99  # of the mean of squared gradients that codes move by
UNTUNED = "J=0, moving=0, between=0"
FASTER = 10  # times the rate of values and norms: what is still float may move by more than its distance of values
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


Tuner = tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]  # both take each step


class Recipe(Protocol):
    """Of the tuning: what ``ByBlocks`` has."""

    held_out: float
    patience: int

    def tuner(self, tuning: Tuning, steps: int) -> Tuner:
        """What takes so many steps, at most."""
        ...


def norm_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of the normalization layers: those of torch, and scales and shifts of others that are called
    so."""
    for name, child in module.named_modules():
        for own, p in child.named_parameters(recurse=False):
            named = "Norm" in type(child).__name__ and not isinstance(child, LAYERS) and p.dim() < 2
            if named or isinstance(child, NORMS):
                yield f"{name}.{own}" if name else own, p


class Tuning:
    """A block that is quantized, or part of it.

    Args:
        block: float network part, in evaluation mode, on the device to work on. Its norms, and what is still float, are
            overwritten.
        learned: its quantized weights by their name in the block.
        time_last: where padding is, in outputs: in the last axis, or in that between samples and features.
        still_float: names of weights that are yet to be quantized, and learn until then.
        dtype: that products are computed in (autocast): float32, or bfloat16.
        felt: how much each value of its outputs counts, by call; where that is not known, all count alike.

    Raises:
        BitfrontError: this processor's products are not to be trusted (``check_convolutions``).
    """

    def __init__(
        self,
        block: nn.Module,
        learned: dict[str, Frozen],
        time_last: bool,
        still_float: Iterable[str] = (),
        dtype: torch.dtype = torch.float32,
        felt: FeltCalls | None = None,
    ) -> None:
        self.dtype, self.felt = dtype, felt or {}
        self.block, self.time_last, self.places = block, time_last, places(block)
        self.device = next(block.parameters()).device
        check_convolutions(block, self.device, "block_dtype=float32", dtype)
        self.frozen = {name: f.to(self.device) for name, f in learned.items()}
        self.packed = {name: f.packed for name, f in learned.items()}
        own = dict(norm_parameters(block))
        self.norms = {name: nn.Parameter(p.detach().float().clone()) for name, p in own.items() if name not in learned}
        self.still_float = {
            name: nn.Parameter(block.get_parameter(name).detach().float().clone()) for name in still_float
        }

    def values(self) -> list[nn.Parameter]:
        """What the values of the codes follow from."""
        learned = [p for f in self.frozen.values() for p in (f.gain, f.shift)]
        return [p for p in learned if p is not None and p.requires_grad]

    def run(
        self, inputs: Sequence[Captured], targets: Sequence[list[Tensor]], method: Recipe, epochs: int, seed: int
    ) -> dict[str, Any]:
        """Tune.

        Args:
            inputs: of the block.
            targets: what the float block made of each: its ``floats``.
            method: how fast, and when to stop.
            epochs: at most.
            seed: of the order.

        Returns:
            For the record: the relative error on the held-out inputs before and after each epoch, and the best epoch;
            nothing, if there are no inputs.

        Raises:
            BitfrontError: the error is not finite, or the block gives more in one call than in another.
        """
        calls = self._weighed(inputs, targets)
        if not calls:
            return {}
        held = min(math.ceil(method.held_out * len(calls)), len(calls) - 1)
        train, test = calls[: len(calls) - held], calls[len(calls) - held :] or calls[:1]
        steps = epochs * len(train)
        optimizer, schedule = method.tuner(self, steps)
        # Codes jump, less and less so: what the first epochs lose, the last ones gain.
        patience = epochs if any(f.moves for f in self.frozen.values()) else method.patience
        generator = torch.Generator().manual_seed(seed)
        losses, best, done = [self._measured(test)], 0, 0
        best_of = self.packed, self._floats()
        for epoch in range(1, epochs + 1):
            if epoch - best > patience:
                break
            for n in torch.randperm(len(train), generator=generator).tolist():
                for f in self.frozen.values():
                    f.at(done / steps)
                self._step(optimizer, train[n])
                schedule.step()
                done += 1
            losses.append(self._measured(test))
            if losses[-1] < losses[best]:
                best, best_of = epoch, ({name: f.packed for name, f in self.frozen.items()}, self._floats())
        self.packed, found = best_of
        for name, p in found.items():
            self.block.get_parameter(name).data.copy_(p)
        return {"held_out": losses, "best_epoch": best}

    def _step(self, optimizer: torch.optim.Optimizer, call: Call | None) -> None:
        optimizer.zero_grad()
        loss = self._error(*call, self._weights()) if call else torch.zeros((), device=self.device)
        if loss.requires_grad:
            with needing_gradients("a block", UNTUNED):
                loss.backward()
        learned = [p for group in optimizer.param_groups for p in group["params"]]
        if not torch.isfinite(summed_gradients(loss, learned)):
            raise BitfrontError("a block's output is not finite while it is tuned; lower quant.block_lr")
        optimizer.step()

    @torch.no_grad()
    def _measured(self, calls: Sequence[Call | None]) -> float:
        """The mean error with the values as they will be stored."""
        weights = self._stored()
        return sum(gathered(sum(self._error(*call, weights).item() for call in calls if call))) / len(calls)

    def _weighed(self, inputs: Sequence[Captured], targets: Sequence[list[Tensor]]) -> list[Call | None]:
        """The calls of all processes in their order; None where this one has no part of it. The error of each output
        counts by the share of it that is here, over the output's mean power."""
        own = {c.of: [self._power(t, c) for t in target] for c, target in zip(inputs, targets, strict=True)}
        everyone = gathered(own)
        numbers = sorted({len(outputs) for one in everyone for outputs in one.values()})
        if len(numbers) > 1:
            raise BitfrontError(
                f"a block cannot be tuned that gives {numbers[0]} tensors in one call and {numbers[-1]} in another; "
                f"give {UNTUNED}"
            )
        whole = {
            of: [_pooled(parts) for parts in zip(*(one[of] for one in everyone if of in one), strict=True)]
            for of in sorted({of for one in everyone for of in one})
        }
        powers = zip(*([power for _, power in outputs] for outputs in whole.values()), strict=True)
        scales = [len(whole) / (sum(power) or len(whole)) for power in powers]

        def weights(of: tuple[int, int]) -> list[float]:
            parts = zip(scales, own[of], whole[of], strict=True)
            return [scale * (here / (total or 1)) for scale, (here, _), (total, _) in parts]

        calls = {c.of: (c, target, weights(c.of)) for c, target in zip(inputs, targets, strict=True)}
        return [calls.get(of) for of in whole]

    def _power(self, target: Tensor, captured: Captured) -> tuple[int, float]:
        """How many values count, and their mean square."""
        values = kept(_finite(target, target.float()).square(), captured.valid, self.time_last)
        return values.numel(), values.mean().item()

    def _error(
        self, captured: Captured, target: list[Tensor], scales: list[float], weights: dict[str, Tensor]
    ) -> Tensor:
        """Squared error of the outputs, each relative to its power."""
        args, kwargs = captured.on(self.device)
        with (
            torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32),
            differentiable(self.block) if torch.is_grad_enabled() else nullcontext(),
        ):
            output = self._output(weights, args, kwargs)
        total = torch.zeros((), device=self.device)
        felt = self.felt.get(captured.of) or [None] * len(target)
        for got, wanted, scale, counts in zip(floats(output), target, scales, felt, strict=True):
            wanted = wanted.to(self.device).float()
            difference = _finite(wanted, got.float() - wanted).square()
            difference = difference if counts is None else difference * counts.to(self.device)
            total = total + scale * kept(difference, captured.valid, self.time_last).mean()
        return total

    def _output(self, weights: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
        try:
            return call(self.block, weights, self.places, args, kwargs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a forward that is particular about types
            if self.dtype == torch.float32:
                raise
            raise BitfrontError(
                f"a block cannot be tuned with products in {self.dtype} ({first_line(error)}); give block_dtype=float32"
            ) from None

    def _weights(self) -> dict[str, Tensor]:
        """What training sees: float32 masters, in the type of the network."""
        masters: dict[str, Tensor] = {name: f.values() for name, f in self.frozen.items()}
        masters |= dict(self.norms) | dict(self.still_float)
        return {name: w.to(self.block.get_parameter(name).dtype) for name, w in masters.items()}

    def _stored(self) -> dict[str, Tensor]:
        """What will be stored."""
        stored = {name: f.packed.decode() for name, f in self.frozen.items()} | self._floats()
        return {name: w.to(self.block.get_parameter(name).dtype) for name, w in stored.items()}

    def _floats(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in (self.norms | self.still_float).items()}


def adam(tuning: Tuning, lr: float, steps: int, travel: float, momentum: float) -> Tuner:
    """Adam for values and norms, for weights that are still float, and for codes, whose steps become less and less.

    Args:
        tuning: what learns.
        lr: of values and norms, in their units.
        steps: at most.
        travel: of codes, in steps of their grids, all steps together.
        momentum: of codes; at 0 each step goes by the sign of its gradient alone.
    """
    places = [f.place for f in tuning.frozen.values() if isinstance(f, Moving)]
    groups: list[dict[str, Any]] = [{"params": [*tuning.values(), *tuning.norms.values()]}]
    groups += [{"params": [w], "lr": lr * FASTER * _size(w)} for w in tuning.still_float.values()]
    rates: list[Callable[[int], float]] = [lambda _: 1.0] * len(groups)
    if places:
        groups.append({"params": places, "lr": 2 * travel / steps, "betas": (momentum, SQUARES if momentum else 0.0)})
        rates.append(lambda n: 1 - n / steps)
    # Errors are small numbers, and so are their gradients: an epsilon of 1e-8 would swallow the steps.
    optimizer = torch.optim.Adam(groups, lr=lr, eps=1e-15)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rates)


def kept(x: Tensor, valid: Tensor | None, time_last: bool) -> Tensor:
    """An output without padding, where that can be told.

    Args:
        x: ``[samples, ...]``.
        valid: as ``inside`` takes it.
        time_last: as of ``Tuning``.
    """
    if valid is None or x.dim() < 2:
        return x
    x = x.movedim(-1, 1) if time_last and x.dim() > 2 else x
    here = inside(x, valid)
    return x if here is None or not here.any() else x[here]


def _pooled(parts: Sequence[tuple[int, float]]) -> tuple[int, float]:
    """Number and mean of all values, of those of each process."""
    total = sum(n for n, _ in parts)
    return total, sum(mean * (n / (total or 1)) for n, mean in parts)


def _size(w: Tensor) -> float:
    """Root mean square; 1 of what is all zero."""
    return w.detach().square().mean().sqrt().item() or 1.0


def _finite(wanted: Tensor, x: Tensor) -> Tensor:
    """0 where infinity is wanted, as in a mask that a block hands on."""
    return x.masked_fill(wanted.isinf(), 0.0)


def floats(tree: Any) -> list[Tensor]:
    """The tensors of floating point in an output: what is compared."""
    return [x for x in tree_leaves(tree) if floating(x)]
