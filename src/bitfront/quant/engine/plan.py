"""In which order a network is calibrated: its blocks, and in each of them the layers that are solved together.

Which layers there are, their order and which of them share an input is seen from forwards (``inputs.Watch``), so that
no architecture is known by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bitfront.errors import BitfrontError
from bitfront.quant.forwards.captured import copied
from bitfront.quant.forwards.course import Course, signature
from bitfront.quant.forwards.links import Link, Links
from bitfront.quant.forwards.offload import Offload
from bitfront.quant.forwards.together import gathered, place
from bitfront.quant.forwards.undisturbed import undisturbed
from bitfront.quant.layers.inputs import Reached, Watch, until
from bitfront.quant.layers.uses import Form, Use, inside
from bitfront.ranges import Ranges, refuse


@dataclass
class Calibration:
    """The data that a network is calibrated on, and how.

    Attributes:
        batches: inputs of the network, as ``run`` knows them; a loader or generator is drawn once.
        run: does a forward of the network on a batch; it may write into the batch, which is a copy.
        blocks: names of the modules to work on one after the other; None finds them (``blocks``).
        valid: of a batch, what is not padding: the share of each sample, ``[samples]`` in 0..1, a mask of steps,
            ``[samples, time]``, or None, if nothing is known to be.
        states: folder where each finished block is kept, so that an interrupted run goes on there; or None.
        seed: of the order of the data while tuning.
        device: to work on; None for that of the network, which all of it is on.
        offload: where what is not at work stays (``Offload``): "cpu", "disk", or "" for the device.
        loss: of the network, a batch and a generator: with labels drawn from what the network says; None where that is
            not known, and random signs of its outputs are taken.
    """

    batches: Sequence[Any]
    run: Callable[[nn.Module, Any], Any]
    blocks: list[str] | None = None
    valid: Callable[[Any], Tensor | None] = lambda batch: None
    states: Path | None = None
    seed: int = 0
    device: torch.device | None = None
    offload: str = ""
    loss: Callable[[nn.Module, Any, torch.Generator], Tensor] | None = None
    rest: Offload | None = field(default=None, init=False, repr=False)
    ranges: ClassVar[Ranges] = {"offload": ("", "cpu", "disk")}

    def __post_init__(self) -> None:
        refuse({"offload": self.offload}, self.ranges)
        if not isinstance(self.batches, Sequence):
            self.batches = list(self.batches)

    @property
    def empty(self) -> bool:
        """Whether no process has a batch."""
        return not any(gathered(len(self.batches)))

    def forward(self, network: nn.Module, batch: Any) -> Any:
        """What the network makes of a batch, which stays as it is."""
        with self.rest.reaching() if self.rest else nullcontext():
            return self.run(network, copied(batch))

    def offloaded(self, network: nn.Module) -> Offload:
        """Where the parts of a network are in the meantime."""
        device = self.device or next((p.device for p in network.parameters()), torch.device("cpu"))
        device = torch.empty(0, device=device).device  # with its number
        self.rest = Offload(network, self.modules(network), device, self.offload, self.states)
        return self.rest

    def modules(self, network: nn.Module) -> dict[str, nn.Module]:
        """The blocks of a network by their names.

        Raises:
            BitfrontError: there is none of a name.
        """
        named = dict(network.named_modules())
        names = blocks(network) if self.blocks is None else self.blocks
        for name in names:
            if name not in named:
                known = ", ".join(child for child in named if child)
                raise BitfrontError(f"there is no module '{name}' to take as a block; the network has {known}")
        return {name: named[name] for name in names}


@dataclass
class Unit:
    """A block of the network to be quantized at once.

    Attributes:
        block: name of its module; "" for the network, where a layer is part of no block.
        stages: names of the weights, those with the same inputs together, in the order of use.
        blind: names of weights in the block of whose inputs nothing is known.
        unseen: by weight, its uses of whose inputs nothing is known: functions; none, if it is not used at all.
        calls: how often it is called in a forward, at most.
        forms: by weight whose inputs are known, in which order these are those of its rows.
        looked_up: by weight that is looked up, or added, and of whose inputs nothing else is known, how often each row
            is, ``[rows]``.
        uses: by weight, how often a call of the block that uses it does; 0 where they differ.
        time_last: whether its output is ``[samples, channels, ..., time]``, as a convolution at its end leaves it.
        link: from the block before, if its inputs come of that one's.
    """

    block: str
    stages: list[list[str]]
    blind: list[str]
    unseen: dict[str, list[str]]
    calls: int = 1
    forms: dict[str, Form] = field(default_factory=dict)
    looked_up: dict[str, Tensor] = field(default_factory=dict)
    uses: dict[str, int] = field(default_factory=dict)
    time_last: bool = False
    link: Link | None = None

    @property
    def names(self) -> list[str]:
        """Of all weights."""
        return [*(name for stage in self.stages for name in stage), *self.looked_up, *self.blind]


def blocks(network: nn.Module) -> list[str]:
    """The modules that are natural to quantize at once: the items of the outermost lists of like modules (the layers of
    an encoder), and whatever else is called beside them. A list of plain layers is no such list."""
    found: list[str] = []

    def like(module: nn.Module) -> bool:
        kinds = [type(child) for child in module.children() if next(child.children(), None) is not None]
        alone = len(kinds) == len(module._modules) == 1  # a list of one block
        return isinstance(module, (nn.ModuleList, nn.Sequential)) and (alone or len(kinds) > len(set(kinds)))

    def descend(name: str, module: nn.Module, listed: bool) -> None:
        for child_name, child in module.named_children():
            full = f"{name}.{child_name}" if name else child_name
            if like(child):
                descend(full, child, True)
            elif isinstance(child, (nn.ModuleList, nn.ModuleDict)):  # cannot be called
                descend(full, child, listed)
            elif not listed and any(like(inner) for inner in child.modules()):
                descend(full, child, False)
            elif not isinstance(child, torch.jit.ScriptModule):  # which takes no hooks
                found.append(full)

    descend("", network, False)
    return found


class _Seen:
    """What forwards of all batches show, those of other processes too.

    Attributes:
        calls: of each block, how often a forward calls it at most.
        homes: of each weight, the blocks that it is used in.
        inputs: of each weight and form, what the inputs of its uses are known by.
        functions: of each weight and form, the functions of these; None for those of whose inputs nothing is known.
        looked_up: of each weight that is, how often each row, ``[rows]``.
        uses: of each weight, how many there are by batch, block and call, in this process's forwards.
        time_last: of each block, whether its last use is that of a convolution, whose channels are not moved behind.
        first: by weight or block, a number that rises with time.
        links: of each block whose inputs come of those of the block before it, in this process's forwards.
    """

    def __init__(self, modules: dict[str, nn.Module], weights: dict[str, nn.Parameter]) -> None:
        self.modules, self.weights, self.inside = modules, weights, [""]
        self.channels = 0  # of the last convolution's output
        self.calls: Counter[str] = Counter()
        self.homes: dict[str, set[str]] = {name: set() for name in weights}
        self.inputs: dict[str, dict[Form, set[Any]]] = {name: {} for name in weights}
        self.functions: dict[str, dict[Form | None, list[str]]] = {name: {} for name in weights}
        self.looked_up: dict[str, Tensor] = {}
        self.uses: dict[str, Counter[Any]] = {name: Counter() for name in weights}
        self.time_last: dict[str, bool] = {}
        self.first: dict[str, int] = {}

    def watch(self, network: nn.Module, data: Calibration) -> None:
        """Do the forwards. (A block, or a branch, that not every batch comes to is seen, too; where no values decide on
        what comes to what, one batch of each form is enough.)"""
        hooks = [
            m.register_forward_pre_hook(lambda *_, name=name: self._entered(name)) for name, m in self.modules.items()
        ]
        hooks += [  # also of a block that raises what the network then catches
            m.register_forward_hook(lambda *told: self._left(told[-1]), always_call=True) for m in self.modules.values()
        ]
        links = Links(self.modules)
        hooks += links.hooks()
        known: dict[Any, int] = {}  # by signature of a batch, the uses until the last look-up
        alike: list[tuple[Any, int]] = []
        try:
            for self.batch, batch in enumerate(data.batches):
                if (same := signature(batch)) in known:
                    alike.append((batch, known[same]))
                    continue
                links.begin()
                self.valid = data.valid(batch)
                self.alive: list[list[Any]] = [[]]  # tensors that are known by their address, of each block we are in
                self.called: Counter[str] = Counter()
                self.seen = self.until_looked_up = 0
                self.course = Course()
                with torch.no_grad(), Watch(self.weights, self._see), self.course.watched():
                    data.forward(network, batch)
                self.calls |= self.called
                if same is not None and not self.course.open:
                    known[same] = self.until_looked_up
        finally:
            for hook in hooks:
                hook.remove()
        for batch, uses in alike:
            self.valid = data.valid(batch)
            if uses:
                with torch.no_grad(), suppress(Reached), Watch(self.weights, until(uses, self._see_look_up)):
                    data.forward(network, batch)
        one = lambda: data.forward(network, data.batches[0])  # noqa: E731
        self.links = links.checked(network, one, shared(network)) if data.batches else {}
        self._share()
        called = [name for name in reversed(self.modules) if name in self.first]
        self.owners = {id(p): name for name in called for p in self.modules[name].parameters()}

    def _share(self) -> None:
        """As if the batches of one process came after those of the other."""
        own = self.calls, self.homes, self.inputs, self.functions, self.looked_up, self.time_last, self.first
        everyone = gathered(own)
        self.functions, self.looked_up, self.first = {name: {} for name in self.weights}, {}, {}
        for calls, homes, inputs, functions, looked_up, time_last, first in everyone:
            self.calls |= calls
            self.time_last |= time_last
            for name in self.weights:
                self.homes[name] |= homes[name]
                for form, keys in inputs[name].items():
                    self.inputs[name].setdefault(form, set()).update(keys)
                for kind_of, kinds in functions[name].items():
                    known = self.functions[name].setdefault(kind_of, [])
                    known += [kind for kind in kinds if kind not in known]
            for name, counts in looked_up.items():
                self.looked_up[name] = self.looked_up.get(name, 0) + counts
            for name in first:
                self.first.setdefault(name, len(self.first))

    def home(self, name: str) -> str:
        """The block in which a weight is used, or which holds it if no use is seen; "" if it is used in several."""
        used = self.homes[name] or {self.owners.get(id(self.weights[name]), "")}
        return next(iter(used)) if len(used) == 1 else ""

    def start(self, name: str) -> tuple[int, int]:
        """When first the block, then the weight is needed. An embedding that is also the output: before all blocks."""
        keys = (name, self.owners.get(id(self.weights[name])))
        return min((self.first[key] for key in keys if key in self.first), default=-1), self.first.get(name, -1)

    def form(self, name: str) -> Form | None:
        """The order of a weight in which its inputs are those of its rows, its own if it has that in one of its uses;
        None if nothing is known of any."""
        return min(self.inputs[name], default=None)

    def told(self, name: str) -> tuple[Form | None, set[Any]]:
        """The form of a weight, and what its inputs are known by."""
        form = self.form(name)
        return form, self.inputs[name][form] if form else set()

    def unseen(self, name: str) -> list[str]:
        """The functions of the uses of a weight of whose inputs nothing is known, or that have another form."""
        chosen = self.form(name)
        every = (kinds for form, kinds in self.functions[name].items() if form is None or form != chosen)
        return list(dict.fromkeys(kind for kinds in every for kind in kinds))

    def often(self, name: str, block: str) -> int:
        """How often a call of its block, or a forward if it has none, uses a weight; 0 where that differs."""
        counts: Counter[Any] = Counter()
        for (batch, _, call), n in self.uses[name].items():
            counts[(batch, call) if block else batch] += n
        return next(iter(counts.values())) if len(set(counts.values())) == 1 else 0

    def unit(self, block: str) -> Unit:
        """A block, still empty."""
        time_last, link = self.time_last.get(block, False), self.links.get(block)
        return Unit(block, [], [], {}, self.calls[block], time_last=time_last, link=link)

    def _entered(self, name: str) -> None:
        self.inside.append(name)
        self.alive.append([])
        self.called[name] += 1
        self.first.setdefault(name, len(self.first))

    def _left(self, output: Any) -> None:
        block = self.inside.pop()
        self.alive.pop()
        outputs = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.dim() > 2]
        turned = any(x.shape[-1] == self.channels != x.shape[1] for x in outputs)
        self.time_last[block] = self.time_last.get(block, False) and not turned

    def _see(self, name: str, use: Use) -> None:
        with self.course.aside():
            self._note(name, use)

    def _note(self, name: str, use: Use) -> None:
        self.seen += 1
        self.homes[name].add(self.inside[-1])
        self.uses[name][self.batch, self.inside[-1], self.called[self.inside[-1]]] += 1
        self.first.setdefault(name, len(self.first))
        if use.looked_up is None:
            self.time_last[self.inside[-1]] = convolution = use.function.startswith("conv")
            if convolution:
                self.channels = self.weights[name].shape["transpose" in use.function]
        if self._see_look_up(name, use):
            self.until_looked_up = self.seen
            return
        if use.columns:
            self.alive[-1].append(use.inputs)
            block = self.inside[-1]  # in another call, or process, another tensor may have the address
            key = place(), self.batch, block, self.called[block], use.key
            self.inputs[name].setdefault(use.form, set()).add(key)
        kinds = self.functions[name].setdefault(use.form if use.columns else None, [])
        if use.function not in kinds:
            kinds.append(use.function)

    def _see_look_up(self, name: str, use: Use) -> bool:
        """Whether it is one, of rows of a weight, or of all of them once; then count them."""
        rows = use.looked_up
        if rows is None and not use.added:
            return False
        counts = torch.ones(len(self.weights[name]), dtype=torch.long)
        if rows is not None:
            kept = inside(rows[..., None], self.valid) if self.valid is not None else None
            found = rows if kept is None else rows[kept]
            counts = torch.bincount(found.flatten().cpu(), minlength=len(counts))
        self.looked_up[name] = self.looked_up.get(name, 0) + counts
        return True


def shared(network: nn.Module) -> dict[int, Any]:
    """What passes hand on as it is, by ``id``: the network's modules and parameters."""
    return {id(x): x for parts in (network.modules(), network.parameters()) for x in parts}


def plan(network: nn.Module, weights: dict[str, nn.Parameter], data: Calibration) -> list[Unit]:
    """Which weights are solved together, and in which order, as seen from forwards of the batches."""
    seen = _Seen(data.modules(network), weights)
    with undisturbed(network):
        seen.watch(network, data)
    units: dict[str, Unit] = {}
    for name in sorted(weights, key=seen.start):
        block = seen.home(name)
        unit = units.setdefault(block or (name if seen.homes[name] else ""), seen.unit(block))
        alike = (stage for stage in unit.stages if seen.told(name) == seen.told(stage[0]))
        unit.uses[name] = seen.often(name, block)
        if (unseen := seen.unseen(name)) or not seen.homes[name]:
            unit.unseen[name] = unseen
        if (form := seen.form(name)) is None:
            if name in seen.looked_up:
                unit.looked_up[name] = seen.looked_up[name]
            else:
                unit.blind.append(name)
            continue
        unit.forms[name] = form
        if (stage := next(alike, None)) is not None:
            stage.append(name)
        else:
            unit.stages.append([name])
    return list(units.values())
