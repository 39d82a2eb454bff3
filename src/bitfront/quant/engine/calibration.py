"""Post-training quantization, block by block (decoupleQ, arXiv 2404.12759, section 3; GPTQ's "true-sequential").

For each block of the network, in the order in which they are called:

1. its inputs are captured from a forward of the network so far, whose earlier blocks are quantized already;
2. the target is kept: what the float network gives there, or, as in the paper, what the block, still float, makes of
   these inputs;
3. layer by layer, the second moments ``H = E[x xᵀ]`` of the inputs are measured and the method solves for the weight;
   layers that share an input share its ``H``;
4. the values of all codes of the block, and its norms, are tuned so that its output is closest to the target.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bitfront.progress import Bar
from bitfront.quant.core import Method, Sampled, check
from bitfront.quant.engine.blockwise import Tuner, Tuning, adam, floats, kept, norm_parameters
from bitfront.quant.engine.frozen import Frozen
from bitfront.quant.engine.moving import Moving
from bitfront.quant.engine.plan import Calibration, Unit, plan
from bitfront.quant.engine.route import Exact, Route, forward, of_unit
from bitfront.quant.engine.states import States, fingerprint
from bitfront.quant.forwards.captured import Captured, copied
from bitfront.quant.forwards.functional import differentiable
from bitfront.quant.forwards.offload import Offload
from bitfront.quant.forwards.together import check_alike, place, together
from bitfront.quant.forwards.undisturbed import undisturbed
from bitfront.quant.layers.felt import Felt, Sums, felt, probe
from bitfront.quant.layers.inputs import Moments, Reached, Watch, no_fast_path, until
from bitfront.quant.log import blind_share
from bitfront.quant.model import QuantizedModel, Quantizer, check_finite, check_quantizable
from bitfront.quant.storage.packed import Packed
from bitfront.ranges import Ranges

STAGES = ("between", "moving", "held_out")  # of the tuning of a block, as its entry in the log has them


@dataclass(kw_only=True)
class PostTraining(Sampled):
    """A method that quantizes a trained network.

    Attributes:
        moving: epochs of the block-wise stage in which the codes move too (``moving``), before those of J; 0 for none.
        travel: how far their steps go together, in steps of the grid; codes begin at most 0.4 of one off their middle.
        momentum: of these steps: a code whose gradients do not agree hardly moves; 0 goes by the sign of each gradient,
            as AutoRound does.
        J: most epochs of it with the codes fixed (the paper's J), 0 for none.
        between: most epochs of it after each group of layers that share an input but the last, in which the weights of
            the others, still float, learn with them.
        target: of that stage: "network", the output of the block in the float network, so that a block makes up for the
            errors of those before it; "block" (the paper), that of the float block on the inputs it now gets.
        held_out: share of the batches that it is not tuned but measured on; the best epoch on them counts.
        patience: epochs without a better one after which it stops.
        block_dtype: that products are computed in there: "float32", "bfloat16", or "auto", the latter on a GPU.
        block_lr: learning rate (Adam) there, relative: a share of the distance of two values, of 1 for norms, and of
            the root mean square of what is still float.
        sft: fine-tune on the task's labels with the training loop and recipe (``train.*``): codes stay, their values
            and the norms learn.
        sft_relative: its learning rate is in units of each tensor's distance of values; else as in the paper, s and z
            are learned as they are.
        sft_codes: codes learn, too, straight through (``moving``).
        distill: share of the float network's answers in what is trained on; the rest are labels.
    """

    moving: int = 0
    travel: float = 0.5
    momentum: float = 0.9
    J: int = 0
    between: int = 0
    target: str = "network"
    held_out: float = 0.125
    patience: int = 2
    block_lr: float = 1e-3
    block_dtype: str = "auto"
    sft: bool = False
    sft_relative: bool = True
    sft_codes: bool = False
    distill: float = 0.0
    sees_inputs: ClassVar[bool] = True  # whether ``solve`` makes use of what a layer sees
    ranges: ClassVar[Ranges] = {
        "moving": "0..",
        "travel": "(0, inf)",
        "momentum": "[0, 1)",
        "J": "0..",
        "between": "0..",
        "target": ("network", "block"),
        "held_out": "[0, 1)",
        "patience": "1..",
        "block_lr": "(0, inf)",
        "block_dtype": ("auto", "float32", "bfloat16"),
        "distill": "[0, 1]",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("sft_codes", "distill"):
            check(self.sft or not getattr(self, option), f"{option} is of fine-tuning; give sft=true with it")

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
    def tunes(self) -> bool:
        """Whether there is a block-wise stage."""
        return self.moving > 0 or self.J > 0 or self.between > 0

    @property
    def needs_data(self) -> bool:
        """Whether it looks at any."""
        return self.calibrates or self.max_size > 0

    @property
    def keeps_zero(self) -> bool:
        """Whether the values are tied to 0, also when they are tuned."""
        return False

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

    def attach(self, network: nn.Module, data: Calibration | None = None) -> QuantizedModel:
        """Quantize a trained network; its weights are overwritten. Processes of a group do it together, each with
        batches of its own.

        Raises:
            BitfrontError: there is no data, or a layer cannot be quantized as asked.
        """
        with together(self.needs_data):
            there = not self.needs_data or (data is not None and not data.empty)
            check(there, f"{type(self).__name__} needs calibration data")
            check_quantizable(network, self.eligible(network))
            check_finite(network)
            before = {name: w.detach().clone() for name, w in self.eligible(network).items()} if self.sft_codes else {}
            packed, log = calibrate(network, self, data)
        frozen: dict[str, Quantizer] = {}
        for name, p in packed.items():
            how = self.of(name).keeps_zero, self.sft_relative
            frozen[name] = Moving(p, before[name], *how) if name in before else Frozen(p, self.sft, *how)
        if self.sft:
            norms = {name for name, _ in norm_parameters(network)} - packed.keys()
            for name, own in network.named_parameters():
                own.requires_grad_(name in norms)
        model = QuantizedModel(network, frozen, self)
        model.log = log
        return model


def calibrate(
    network: nn.Module, method: PostTraining, data: Calibration | None
) -> tuple[dict[str, Packed], dict[str, Any]]:
    """Quantize a network block by block; its weights become the quantized ones, all else stays as it was.

    Args:
        network: float, on the device to work on, or, if it does not fit there, on the CPU.
        method: solves the layers.
        data: to calibrate on, where the method does.

    Returns:
        Packed tensors by name, and a log for the record: of layers and blocks; where ``solve`` makes use of what layers
        see, which share of the weights it had to do without (``blind``, 0..1); how many blocks were ``tuned``, if any
        were to be.

    Raises:
        BitfrontError: an input is not finite, settings do not fit a layer, or a state cannot be read or written.
    """
    weights = method.eligible(network)
    log: dict[str, Any] = {"layers": [], "blocks": []}
    found: dict[str, Packed] = {}
    if data is None or not method.calibrates:
        for name, w in weights.items():
            found[name], entry = solve(method, name, w, None)
            log["layers"].append(entry | {"block": ""})
        return found, log
    whole = "hessian=fisher needs gradients of the whole network at once; leave offload out"
    check(not data.offload or method.feels != "end", whole)
    check_processes(network, method, data)
    rest = data.offloaded(network)
    with undisturbed(network), no_fast_path(), rest.streamed():
        network.eval()
        for state in _walk(network, method, weights, data, rest):
            for name, fields in state["packed"].items():
                p = Packed(**fields).to(weights[name].device)
                found[name] = replace(p, codes=rest.stays(p.codes)) if rest.place else p
            log["layers"] += state["layers"]
            log["blocks"].append(state["block"])
    if method.sees_inputs:
        log["blind"] = blind_share(log["layers"])
    if method.tunes:
        log["tuned"] = sum(any(block.get(stage) for stage in STAGES) for block in log["blocks"])
    return {name: found[name] for name in weights}, log


def check_processes(network: nn.Module, method: Method, data: Calibration) -> None:
    """Refuse processes with different networks or settings.

    Raises:
        BitfrontError: there are such.
    """
    check_alike(
        lambda: fingerprint(dict(network.named_parameters()), method, data.blocks, data.seed),
        "the processes have not the same weights, method, blocks and seed; each needs the whole network from one file, "
        "and data of its own alone",
    )


def _walk(
    network: nn.Module, method: PostTraining, weights: dict[str, nn.Parameter], data: Calibration, rest: Offload
) -> Iterator[dict[str, Any]]:
    """Quantize one block after the other, or take what an earlier attempt left of it; the state of each."""
    units = plan(network, weights, data) if weights else []
    states = States(data.states, network, method, data) if data.states else None
    at_the_end: Felt = {}
    if method.feels == "end" and units and not (states and all(map(states.load, range(len(units))))):
        at_the_end = felt_at_the_end(network, weights, data, units[-1].time_last)
    here = Route(network, data, rest)
    exact = Exact(network, data, rest) if method.tunes and method.target == "network" else None
    tuned = {unit.block for unit in units if tunes(method, network, unit)}
    anew = [unit.block in tuned and not (unit.link and unit.link.before in tuned) for unit in units]
    bar = Bar(units, unit="block")
    for n, unit in enumerate(bar):
        bar.set_description(unit.block, refresh=False)
        state = states.load(n) if states else None
        if exact and (state or any(anew[n + 1 :])):
            exact.keep(unit)
        if state is None:
            state = quantize_block(here, exact, method, unit, weights, at_the_end, n)
            if states:
                states.save(n, state)
        for name, fields in state["packed"].items():
            weights[name].data.copy_(Packed(**fields).decode())
        for name, p in state["norms"].items():
            network.get_parameter(name).data.copy_(p)
        yield state


def felt_at_the_end(
    network: nn.Module, weights: dict[str, nn.Parameter], data: Calibration, time_last: bool = False
) -> Felt:
    """What of the inputs of all layers the end of the float network feels.

    Args:
        network, weights, data: of the calibration.
        time_last: where padding is, in outputs, as of a ``Unit``.
    """
    generator, found = torch.Generator().manual_seed(data.seed + place()[0]), list[Tensor]()

    def probed(batch: Any) -> Tensor:
        if data.loss:
            return data.loss(network, copied(batch), generator)
        found.clear()
        data.forward(network, batch)
        valid = data.valid(batch)
        return probe([kept(x, valid, time_last) for x in found], generator)

    hook = network.register_forward_hook(lambda _module, _args, output: found.extend(floats(output)))
    bar = Bar(data.batches, desc="what the end feels", unit="batch")
    try:
        with undisturbed(network), differentiable(network):
            passes = ((n, data.valid(batch), partial(probed, batch)) for n, batch in enumerate(bar))
            return felt(weights, passes)
    finally:
        hook.remove()


@torch.no_grad()
def solve(
    method: PostTraining, name: str, w: nn.Parameter, moments: Moments | None, looked_up: Tensor | None = None
) -> tuple[Packed, dict[str, Any]]:
    """Quantize one weight in place; return it packed, and its entry in the log.

    Args:
        method, name, w: solves the weight.
        moments: of its inputs, if they are known.
        looked_up: how often each of its rows is an output, ``[rows]``, if it has no other use that is known.
    """
    started = time.perf_counter()
    packed, details = method.of(name).solve(w.detach(), moments)
    quantized = packed.decode().to(w.device)
    entry: dict[str, Any] = {"name": name, "shape": list(w.shape), "inputs": 0}
    if moments is not None:
        entry |= {"inputs": moments.count, "loss": moments.relative_loss(w.detach(), quantized)}
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


def tunes(method: PostTraining, network: nn.Module, unit: Unit) -> bool:
    """Whether the block-wise stage follows, as it does in a block that is more than a layer."""
    return method.tunes and several(network, unit)


def several(network: nn.Module, unit: Unit) -> bool:
    """Whether it is a block of the network that is more than a layer."""
    return bool(unit.block) and next(network.get_submodule(unit.block).children(), None) is not None


@torch.no_grad()
def quantize_block(
    here: Route,
    exact: Route | None,
    method: PostTraining,
    unit: Unit,
    weights: dict[str, nn.Parameter],
    at_the_end: Felt,
    n: int,
) -> dict[str, Any]:
    """Quantize the n-th block in place, tuned to give what it gives in the float network; return its state.

    Args:
        here: to the block through the network so far.
        exact: likewise through the float network, where its output is the target; else that is of the inputs here.
        method, unit, weights: solves the weights, those of the block, all by name.
        at_the_end: of the inputs of layers, by weight, what the end of the float network feels, if that counts.
        n: its number.
    """
    began = time.perf_counter()
    work = _Block(here, method, unit, weights, here.data.seed + n, at_the_end)
    inputs = here.to(unit) if unit.stages or work.tuned else []
    targets: dict[tuple[int, int], list[Tensor]] = {}
    if work.tuned:
        if exact:
            exact.to(unit)
        outputs = exact.run() if exact else here.run()
        targets = {c.of: floats(output) for c, output in zip((exact or here).calls, outputs, strict=True)}
        here.given = None  # of the block as it was
    entry: dict[str, Any] = {"name": unit.block or unit.names[0]}
    with here.rest.at_work(of_unit(here.network, unit)):
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


class _Block:
    """A block at work.

    Attributes:
        tuned: whether the block-wise stage follows.
        packed, layers, norms: what is found: its weights, the record's entries, its norms after tuning.
        before: the weights as they were when they were quantized, if their codes are yet to move.
    """

    def __init__(
        self,
        here: Route,
        method: PostTraining,
        unit: Unit,
        weights: dict[str, nn.Parameter],
        seed: int,
        at_the_end: Felt,
    ) -> None:
        self.seed, self.at_the_end = seed, at_the_end
        self.here, self.network, self.method, self.unit, self.weights = here, here.network, method, unit, weights
        self.block = self.network.get_submodule(unit.block)
        self.tuned = tunes(method, self.network, unit)
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
                    sums.begin(captured.of[0], captured.valid)
                    add = until(self.unit.uses[first], sums.add)
                    with suppress(Reached), Watch({first: self.weights[first]}, add):
                        forward(self.network, self.unit, self.here.data, self.here.rest, captured)
            moments, as_felt = sums.moments()
            seen = sums.plain
            about = {"padding": "counted"} if seen.padded else {}
            unfelt = self.method.feels and not as_felt and (felt or not self.unit.block)
            about |= {"hessian": "inputs"} if unfelt else {}
            idle = (
                [f"{seen.idle} of its {moments.batch} entries not used on these data"] if moments and seen.idle else []
            )
            for name in alike:
                own = moments.with_lookup(self.weights[name].detach()) if moments and seen.lookup else moments
                self.solve(name, own, idle, **about)

    def feel(self, stage: list[str], inputs: list[Captured]) -> Felt:
        """What of the inputs of layers the output of the block, as it now is, feels."""
        network, unit, found = self.network, self.unit, list[Tensor]()
        generator = torch.Generator().manual_seed(self.seed + place()[0])

        def probed(captured: Captured) -> Tensor:
            found.clear()
            forward(network, unit, self.here.data, self.here.rest, captured)
            return probe([kept(x, captured.valid, unit.time_last) for x in found], generator)

        hook = self.block.register_forward_hook(lambda _module, _args, output: found.extend(floats(output)))
        try:
            with undisturbed(network):
                passes = ((captured.of[0], captured.valid, partial(probed, captured)) for captured in inputs)
                return felt({name: self.weights[name] for name in stage}, passes)
        finally:
            hook.remove()

    def solve(self, name: str, moments: Moments | None, idle: Sequence[str] = (), **about: Any) -> None:
        """Quantize one layer, of which a part may be idle."""
        looked_up = self.unit.looked_up.get(name) if self.method.sees_inputs else None
        if self.tuned and self.method.moving:
            self.before[name] = self.weights[name].detach().clone()
        self.packed[name], entry = solve(self.method, name, self.weights[name], moments, looked_up)
        told = name in self.unit.unseen or idle or (moments is None and looked_up is None)
        unseen = {"unseen": [*self.unit.unseen.get(name, []), *idle]} if told and self.method.sees_inputs else {}
        self.layers.append(entry | {"block": self.unit.block} | unseen | about)

    @property
    def dtype(self) -> torch.dtype:
        """That the block-wise stage computes in."""
        usual = "bfloat16" if self.here.rest.device.type == "cuda" else "float32"
        return getattr(torch, usual if self.method.block_dtype == "auto" else self.method.block_dtype)

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
        tuning = Tuning(self.block, learned, self.unit.time_last, still_float, self.dtype)
        if not tuning.frozen and not tuning.norms:
            return {}
        with torch.enable_grad(), undisturbed(self.network):
            entry = tuning.run(inputs, targets, self.method, epochs, self.seed)
        for name, own in local.items():
            self.packed[name] = tuning.packed[own]
            self.weights[name].data.copy_(self.packed[name].decode())  # what the layers to come see the output of
        self.norms = {f"{self.unit.block}.{name}": self.block.get_parameter(name).detach() for name in tuning.norms}
        return entry
