"""One block of a network at post-training: its layers are solved one after the other, then it is tuned."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitfront.quant.engine.blockwise import Tuning, floats
from bitfront.quant.engine.by_blocks import ByBlocks
from bitfront.quant.engine.frozen import Frozen
from bitfront.quant.engine.plan import Unit
from bitfront.quant.engine.route import Exact, Route, forward, of_unit, parameters_as
from bitfront.quant.engine.sensitivity import probed
from bitfront.quant.forwards.captured import Captured
from bitfront.quant.forwards.together import gathered
from bitfront.quant.forwards.undisturbed import undisturbed
from bitfront.quant.layers.felt import Felt, FeltCalls, Sums, felt
from bitfront.quant.layers.inputs import Moments, Reached, Watch, of_weight, until
from bitfront.quant.layers.uses import Use
from bitfront.quant.storage.packed import Packed


@torch.no_grad()
def solve(
    method: ByBlocks, name: str, w: nn.Parameter, moments: Moments | None, looked_up: Tensor | None = None
) -> tuple[Packed, dict[str, Any]]:
    """Quantize one weight in place; return it packed, and its entry in the log.

    Args:
        method, name, w: solves the weight.
        moments: of its inputs, if they are known.
        looked_up: how often each of its rows is an output, ``[rows]``, if it has no other use that is known.
    """
    started = time.perf_counter()
    own = method.of(name)
    wanted = own.wanted(w.detach(), moments)
    packed, details = own.solve(w.detach(), moments)
    quantized = packed.decode().to(w.device)
    entry: dict[str, Any] = {"name": name, "shape": list(w.shape), "inputs": 0}
    if moments is not None and moments.count:
        entry |= {"inputs": moments.count, "loss": moments.relative_loss(wanted, quantized)}
    elif looked_up is not None:
        entry |= {"inputs": int(looked_up.sum()), "loss": loss_of_rows(looked_up, w.detach(), quantized)}
    w.data.copy_(quantized)
    return packed, entry | details | {"seconds": time.perf_counter() - started}


def loss_of_rows(counts: Tensor, w: Tensor, quantized: Tensor) -> float:
    """Power of the error relative to that of the output, where the rows are the outputs, each so often."""
    power, error = (
        x.double().reshape(len(x), -1).square().sum(1) @ counts.to(w.device).double() for x in (w, quantized - w)
    )
    return (error / power).item() if power else 0.0


def of_these(felt: FeltCalls, outputs: dict[tuple[int, int], list[Tensor]]) -> bool:
    """Whether it is known how much outputs count, in all processes: passes may have given others, as a decoder does of
    drawn words."""
    known = all(
        len(felt.get(of, ())) == len(own)
        and all(counts is None or counts.shape == x.shape for counts, x in zip(felt[of], own, strict=True))
        for of, own in outputs.items()
    )
    return all(gathered(known))


def several(network: nn.Module, unit: Unit) -> bool:
    """Whether it is a block of the network that is more than a layer."""
    return bool(unit.block) and next(network.get_submodule(unit.block).children(), None) is not None


@torch.no_grad()
def quantize_block(
    here: Route,
    exact: Exact | None,
    method: ByBlocks,
    unit: Unit,
    weights: dict[str, nn.Parameter],
    at_the_end: Felt,
    outputs: FeltCalls,
    n: int,
) -> dict[str, Any]:
    """Quantize the n-th block in place, tuned to give what it gives in the float network; return its state.

    Args:
        here: to the block through the network so far.
        exact: likewise through the float network, if that goes along.
        method, unit, weights: solves the weights, those of the block, all by name.
        at_the_end: of the inputs of layers, by weight, what the end of the float network feels, if that counts.
        outputs: likewise, how much what the block gives counts.
        n: its number.
    """
    began = time.perf_counter()
    work = Block(here, method, unit, weights, here.data.seed + n, at_the_end)
    inputs = here.to(unit) if unit.stages or work.tuned else []
    targets: dict[tuple[int, int], list[Tensor]] = {}
    exact = exact if several(here.network, unit) else None
    if exact:
        exact.to(unit)
        exact.run()  # while the block is float
    if work.tuned:
        of = exact if exact and method.target == "network" else here
        given = of.given or of.run()
        targets = {c.of: floats(output) for c, output in zip(of.calls, given, strict=True)}
        here.given = None  # of the block as it was
    entry: dict[str, Any] = {"name": unit.block or unit.names[0]}
    if work.tuned and method.weighs_outputs:
        known = of_these(outputs, targets)
        work.outputs = outputs if known else {}
        entry |= {} if known else {"block_loss": "squared"}
    with here.rest.at_work(of_unit(here.network, unit)):
        if exact and method.propagation:
            work.there = {c.of: c for c in exact.calls}
            work.as_it_was = exact.copies(unit)
        common = [c for c in inputs if c.of in targets]  # one of the two may not have come to the block
        wanted, last = [targets[c.of] for c in common], len(unit.stages) - 1
        for i, stage in enumerate(unit.stages):
            work.solve_stage(stage, inputs)
            if work.tuned and i < last and method.between:
                entry.setdefault("between", []).append(work.tune(common, wanted, method.between))
        for name in (*unit.looked_up, *unit.blind):
            work.solve(name, None)
        if work.tuned and method.moving:
            entry["moving"] = work.tune(common, wanted, method.moving, moving=True)
        if work.tuned and method.J:
            entry |= work.tune(common, wanted, method.J)
    return {
        "packed": {name: vars(p) for name, p in work.packed.items()},
        "norms": {name: p.cpu() for name, p in work.norms.items()},
        "layers": work.layers,
        "block": entry | {"seconds": time.perf_counter() - began},
    }


class Block:
    """A block at work.

    Attributes:
        tuned: whether the block-wise stage follows, as it does in a block that is more than a layer.
        there, as_it_was: its calls in the float network, and its weights and norms there, where layers make up for
            errors before them.
        outputs: how much the values that it gives count, if not alike.
        packed, layers, norms: what is found: its weights, the record's entries, its norms after tuning.
        before: the weights as they were when they were quantized, if their codes are yet to move.
    """

    def __init__(
        self,
        here: Route,
        method: ByBlocks,
        unit: Unit,
        weights: dict[str, nn.Parameter],
        seed: int,
        at_the_end: Felt,
    ) -> None:
        self.seed, self.at_the_end = seed, at_the_end
        self.here, self.network, self.method, self.unit, self.weights = here, here.network, method, unit, weights
        self.block = self.network.get_submodule(unit.block)
        self.tuned = method.tunes and several(self.network, unit)
        self.there: dict[tuple[int, int], Captured] = {}
        self.as_it_was: dict[str, Tensor] = {}
        self.outputs: FeltCalls = {}
        self.packed: dict[str, Packed] = {}
        self.before: dict[str, Tensor] = {}
        self.layers: list[dict[str, Any]] = []
        self.norms: dict[str, Tensor] = {}

    def solve_stage(self, stage: list[str], inputs: list[Captured]) -> None:
        """Quantize the layers that share an input."""
        if not self.method.sees_inputs:
            for name in stage:
                self.solve(name, None)
            return
        felt = {name: self.at_the_end[name] for name in stage if name in self.at_the_end}
        # The output of a block that is one layer feels all of its inputs alike.
        if self.method.feels == "block" and several(self.network, self.unit):
            felt = self.feel(stage, inputs)
        for alike in [[name] for name in stage] if felt else [stage]:
            first = alike[0]
            sums = Sums(first, self.here.rest.device, self.unit.forms[first], felt.get(first))
            with undisturbed(self.network):
                for captured in inputs:
                    sums.begin(captured.of[0], captured.valid, self.seen_there(first, captured))
                    add = until(self.unit.uses[first], sums.add)
                    with suppress(Reached), Watch({first: self.weights[first]}, add):
                        forward(self.network, self.unit, self.here.data, self.here.rest, captured)
            moments, as_felt = sums.moments()
            seen = sums.plain
            about: dict[str, Any] = {"padding": "counted"} if seen.padded else {}
            unfelt = self.method.feels and moments and not as_felt and (felt or not self.unit.block)
            about |= {"hessian": "inputs"} if unfelt else {}
            if self.there and moments:
                about |= {"propagation": "none"} if moments.drift is None else {"apart": moments.apart}
            idle = [f"{seen.idle} of its {len(seen.counts)} entries not used on these data"] if seen.idle else []
            for name in alike:
                own = of_weight(self.weights[name].detach(), self.unit.forms[name], moments, seen.lookup)
                self.solve(name, own, idle, rows_alone=seen.lookup, **about)

    def seen_there(self, name: str, captured: Captured) -> list[list[Tensor]]:
        """The columns of each use of a weight in the float network, in the call that is the counterpart of this one."""
        call, seen = self.there.get(captured.of), list[list[Tensor]]()
        if call is None:
            return seen

        def see(_: str, use: Use) -> None:
            seen.append([x for x, _, _ in use.columns(call.valid)] if use.columns else [])

        watch = Watch({name: self.weights[name]}, until(self.unit.uses[name], see))
        with parameters_as(self.network, self.as_it_was), suppress(Reached), watch:
            forward(self.network, self.unit, self.here.data, self.here.rest, call)
        return seen

    def feel(self, stage: list[str], inputs: list[Captured]) -> Felt:
        """What of the inputs of layers the output of the block, as it now is, feels."""
        network, unit = self.network, self.unit
        run = partial(forward, network, unit, self.here.data, self.here.rest)
        forwards = ((captured.of[0], captured.valid, partial(run, captured)) for captured in inputs)
        with undisturbed(network), probed(self.block, forwards, self.seed, unit.time_last) as passes:
            return felt({name: self.weights[name] for name in stage}, passes)

    def solve(
        self, name: str, moments: Moments | None, idle: Sequence[str] = (), rows_alone: bool = False, **about: Any
    ) -> None:
        """Quantize one layer, of which a part may be idle, or whose rows alone are outputs."""
        looked_up = self.unit.looked_up.get(name) if self.method.sees_inputs else None
        if self.tuned and self.method.moving:
            self.before[name] = self.method.of(name).wanted(self.weights[name].detach(), moments).clone()
        self.packed[name], entry = solve(self.method, name, self.weights[name], moments, looked_up)
        blind = not (moments and moments.count) and looked_up is None and not rows_alone
        told = name in self.unit.unseen or idle or blind
        unseen = {"unseen": [*self.unit.unseen.get(name, []), *idle]} if told and self.method.sees_inputs else {}
        self.layers.append(entry | {"block": self.unit.block} | unseen | about)

    def learned(self, name: str, moving: bool) -> Frozen:
        """A quantized weight whose values learn, and whose codes do, if they are moving."""
        packed, symmetric = self.packed[name], self.method.of(name).keeps_zero
        if not moving:
            return Frozen(packed, True, symmetric)
        return self.method.mobile(name, packed, self.before[name], symmetric, self.seed)

    def tune(
        self, inputs: list[Captured], targets: list[list[Tensor]], epochs: int, moving: bool = False
    ) -> dict[str, Any]:
        """The block-wise stage, in which also learns what of the block is yet to be quantized, and codes, if they are
        moving; return its entry in the record."""
        names = {id(p): name for name, p in self.block.named_parameters()}
        # A tied weight has another name here; one that the block is called with is not tuned.
        local = {name: names[id(self.weights[name])] for name in self.packed if id(self.weights[name]) in names}
        later = [id(self.weights[name]) for stage in self.unit.stages for name in stage if name not in self.packed]
        learned = {own: self.learned(name, moving) for name, own in local.items()}
        still_float = [names[one] for one in later if one in names]
        dtype = self.method.computed_in(self.here.rest.device)
        tuning = Tuning(self.block, learned, self.unit.time_last, still_float, dtype, self.outputs)
        if not tuning.frozen and not tuning.norms:
            return {}
        with torch.enable_grad(), undisturbed(self.network):
            entry = tuning.run(inputs, targets, self.method, epochs, self.seed)
        for name, own in local.items():
            self.packed[name] = tuning.packed[own]
            self.weights[name].data.copy_(self.packed[name].decode())  # what the layers to come see the output of
        self.norms = {f"{self.unit.block}.{name}": self.block.get_parameter(name).detach() for name in tuning.norms}
        return entry
