"""How much each input of a layer counts: the squared gradient, at the layer's output, of a later output times random
signs, whose mean is what an error there costs that output (Hutchinson); or of a loss with labels drawn from what the
network says, whose mean is what it costs the network's answers (Fisher). With it, the layer's problem has

    H = (1 - f) c E[s x xᵀ] + f E[x xᵀ],      s = mean over the layer's outputs of (d probe / d output)²

with c such that both have the same trace (GuidedQuant, arXiv 2505.07004, with one group of outputs, labels that are
drawn, and a floor, so that what this probe does not feel still counts).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from bitfront.quant.forwards.functional import needing_gradients
from bitfront.quant.forwards.together import gathered
from bitfront.quant.layers.inputs import Accumulator, Moments, Watch
from bitfront.quant.layers.uses import Form, Parts, Use

FLOOR = 0.1  # share of H in which all inputs count alike
NOTHING = 1e-9  # of the largest power among several outputs
Pass = tuple[int, Tensor | None, Callable[[], Tensor]]  # number of the batch, what is not padding, forward to the probe
Felt = dict[str, dict[int, list[Tensor | None]]]  # by weight and batch, of its uses in their order: ``Use.felt``
FeltCalls = dict[tuple[int, int], list[Tensor | None]]  # by batch and call of its forward, of the outputs of a module
FeltOutputs = dict[str, FeltCalls]


def felt(weights: dict[str, nn.Parameter], passes: Iterable[Pass]) -> Felt:
    """What of the inputs of layers counts.

    Args:
        weights: of the layers.
        passes: forwards, each to a scalar.

    Returns:
        None for a use of which it is not known, as where the forward is without gradients; nothing for one that has no
        ``Use.felt``.
    """
    found: Felt = {name: defaultdict(list) for name in weights}
    for n, valid, run in passes:
        seen: list[tuple[str, Use, Tensor | None]] = []

        def after(name: str, use: Use, output: Tensor, seen: list[Any] = seen) -> Tensor:
            if not torch.is_grad_enabled():
                seen.append((name, use, None))
                return output
            x = output if output.requires_grad else output.detach().requires_grad_()
            seen.append((name, use, x))
            return x.clone()  # what follows may write to it

        with torch.enable_grad(), Watch(weights, lambda *_: None, after):
            probed = run()
        known = [x for _, _, x in seen if x is not None] if probed.requires_grad else []
        grads = iter(_gradients(probed, known, "hessian=inputs") if known else ())
        for name, use, x in seen:
            assert use.felt is not None
            g = None if x is None else next(grads, None)
            if g is None or not torch.isfinite(g).all():
                found[name][n].append(None)
            else:
                found[name][n].append(use.felt(g.float().square(), valid).cpu())
    return found


def felt_outputs(modules: dict[str, nn.Module], passes: Iterable[Pass]) -> FeltOutputs:
    """How much each value counts of what modules give: its squared gradient (BRECQ, arXiv 2102.05426, equation 10),
    scaled to the mean 1 - ``FLOOR`` over all batches of all processes, and ``FLOOR``.

    Args:
        modules: by name.
        passes: forwards, each to a scalar.

    Returns:
        In bfloat16, on the CPU: half of what all outputs take in float32. Nothing for a module of which it is not
        known; None for an output that is not felt.
    """
    found: dict[str, FeltCalls] = {name: {} for name in modules}
    for n, _, run in passes:
        seen: list[tuple[str, list[Tensor]]] = []

        def after(name: str, output: Any, seen: list[Any] = seen) -> Any:
            leaves, form = tree_flatten(output)
            known = [x if x.requires_grad else x.detach().requires_grad_() for x in leaves if floating(x)]
            seen.append((name, known))
            copies = iter([x.clone() for x in known])  # what follows may write to it
            return tree_unflatten([next(copies) if floating(x) else x for x in leaves], form)

        hooks = [
            module.register_forward_hook(lambda _module, _args, output, name=name: after(name, output))
            for name, module in modules.items()
        ]
        try:
            with torch.enable_grad():
                probed = run()
        finally:
            for hook in hooks:
                hook.remove()
        known = [x for _, outputs in seen for x in outputs]
        grads = iter(_gradients(probed, known, "block_loss=squared") if known and probed.requires_grad else ())
        for name, outputs in seen:
            own = [next(grads, None) for _ in outputs]
            call = sum(batch == n for batch, _ in found[name])
            found[name][n, call] = [None if g is None else g.float().square().to(torch.bfloat16).cpu() for g in own]
    return {name: calls for name, own in found.items() if (calls := _shares(own))}


def floating(x: Any) -> bool:
    """Whether it is a tensor of floating point, as is compared of an output."""
    return isinstance(x, Tensor) and x.is_floating_point()


def _shares(found: FeltCalls) -> FeltCalls:
    """From squared gradients; nothing if one is missing, or all are 0."""
    missing = any(g is None or not torch.isfinite(g).all() for gs in found.values() for g in gs)
    powers = [[(g.sum(dtype=torch.float64).item(), g.numel()) for g in gs if g is not None] for gs in found.values()]
    everyone = gathered(None if missing else powers)
    if None in everyone:
        return {}
    outputs = list(zip(*(call for one in everyone for call in one or ()), strict=True))
    means = [sum(power for power, _ in calls) / max(1, sum(n for _, n in calls)) for calls in outputs]
    if not any(means):
        return {}
    return {
        of: [
            (g.float() * ((1 - FLOOR) / mean) + FLOOR).to(g.dtype) if g is not None and mean else None
            for g, mean in zip(gs, means, strict=True)
        ]
        for of, gs in found.items()
    }


def _gradients(probed: Tensor, of: list[Tensor], without: str) -> Sequence[Tensor | None]:
    with needing_gradients("the network", without):
        return torch.autograd.grad(probed, of, allow_unused=True, materialize_grads=True)


def probe(outputs: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """The sum of outputs times random signs, each relative to the root of its power: a scalar. One of next to no power
    is left out, as one that is 0 but has a gradient."""
    felt = [output for output in outputs if output.requires_grad and output.numel()]
    powers = [output.detach().float().square().mean() for output in felt]
    total = torch.zeros(())
    for output, power in zip(felt, powers, strict=True):
        if power > NOTHING * max(powers):
            signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
            total = total.to(output.device) + (output * signs).float().sum() * power.rsqrt()
    return total


class Sums:
    """The second moments of a layer's inputs, each of which counts as much as it is felt, if that is known of all.

    Args:
        name, device, form: as of an ``Accumulator``.
        felt: of the layer; None if all inputs count alike.
    """

    def __init__(
        self, name: str, device: torch.device, form: Form | None, felt: dict[int, list[Tensor | None]] | None
    ) -> None:
        self.plain, self.scaled = (Accumulator(name, device, form) for _ in range(2))
        self.felt, self.batch = None if felt is None else {n: iter(uses) for n, uses in felt.items()}, 0
        self.there: Iterator[list[Tensor]] = iter(())

    def begin(self, n: int, valid: Tensor | None, there: Iterable[list[Tensor]] = ()) -> None:
        """The uses to come are of the n-th batch, whose passes come in their order; ``there`` are their columns in the
        float network."""
        self.batch, self.plain.valid, self.scaled.valid = n, valid, valid
        self.there = iter(there)

    def add(self, name: str, use: Use) -> None:
        """One use of the weight."""
        there = next(self.there, None)
        self.plain.add(name, use, there)
        felt = next(self.felt.get(self.batch, iter(())), None) if self.felt is not None and use.felt else None
        if felt is not None:
            roots = _roots(felt, there) if there else None
            there = [x * root for x, root in zip(there, roots, strict=True)] if there and roots else None
            self.scaled.add(name, _scaled(use, felt), there)

    def moments(self) -> tuple[Moments | None, bool]:
        """Of all processes, None if there was no input, and whether they are as felt.

        Raises:
            BitfrontError: an input was not finite.
        """
        alike = self.plain.moments()
        if self.felt is None or not any(gathered(bool(self.scaled.counts.any()))):
            return alike, False
        counted = self.scaled.moments()
        assert alike and counted
        if not torch.equal(self.scaled.counts, self.plain.counts):
            return alike, False
        power, felt = (m.H.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] for m in (alike, counted))
        share = torch.where(felt > 0, (1 - FLOOR) * power / felt, 0.0)
        rest = torch.where(felt > 0, FLOOR, 1.0)
        drift = None if counted.drift is None or alike.drift is None else share * counted.drift + rest * alike.drift
        return replace(alike, H=share * counted.H + rest * alike.H, drift=drift), True


def _scaled(use: Use, felt: Tensor) -> Use:
    """With inputs such that each counts so much in ``x xᵀ``."""

    def columns(valid: Tensor | None) -> Parts:
        assert use.columns is not None
        parts = list(use.columns(valid))
        roots = _roots(felt, [x for x, _, _ in parts])
        for (x, counts, known), root in zip(parts, roots, strict=True) if roots else ():
            yield x * root, counts, known

    return replace(use, columns=columns)


def _roots(felt: Tensor, parts: Sequence[Tensor]) -> list[Tensor] | None:
    """What columns are to be multiplied with, ``[batch, 1, n]`` for each part; None where a forward has not done the
    same twice."""
    sizes = [x.shape[2] for x in parts]
    if sum(sizes) != felt.shape[1]:
        return None
    return [s[:, None].to(x).sqrt() for x, s in zip(parts, felt.split(sizes, 1), strict=True)]
