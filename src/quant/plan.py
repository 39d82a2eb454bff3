"""In which order a network is calibrated: its blocks, and in each of them the layers that are solved together.

Which layers there are, their order and which of them share an input is seen from one forward (``inputs.Watch``), so
that no architecture is known by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.quant.inputs import Use, Watch


@dataclass
class Calibration:
    """The data that a network is calibrated on, and how.

    Attributes:
        batches: inputs of the network, as the task knows them.
        run: does a forward of the network on a batch.
        blocks: names of the modules to work on one after the other; None finds them (``blocks``).
        valid: of a batch, the share of each sample that is not padding, ``[samples]`` in 0..1, or None.
        states: folder where each finished block is kept, so that an interrupted run goes on there; or None.
        seed: of the order of the data while tuning.
    """

    batches: Sequence[Any]
    run: Callable[[nn.Module, Any], Any]
    blocks: list[str] | None = None
    valid: Callable[[Any], Tensor | None] = lambda batch: None
    states: Path | None = None
    seed: int = 0


@dataclass
class Unit:
    """A block of the network to be quantized at once.

    Attributes:
        block: name of its module; "" for the network, where a layer is part of no block.
        stages: names of the weights, those with the same inputs together, in the order of use.
        blind: names of weights in the block of whose inputs nothing is known.
        calls: how often it is called in a forward.
        time_last: whether its output is ``[samples, channels, ..., time]``, as a convolution at its end leaves it.
    """

    block: str
    stages: list[list[str]]
    blind: list[str]
    calls: int = 1
    time_last: bool = False


def blocks(network: nn.Module) -> list[str]:
    """The modules that are natural to quantize at once: the items of the outermost lists of like modules (the layers of
    an encoder), and whatever else is called beside them. A list of plain layers is no such list."""
    found: list[str] = []

    def like(module: nn.Module) -> bool:
        kinds = [type(child) for child in module.children() if next(child.children(), None) is not None]
        return isinstance(module, (nn.ModuleList, nn.Sequential)) and len(kinds) > len(set(kinds))

    def descend(name: str, module: nn.Module, listed: bool) -> None:
        for child_name, child in module.named_children():
            full = f"{name}.{child_name}" if name else child_name
            if like(child):
                descend(full, child, True)
            elif isinstance(child, (nn.ModuleList, nn.ModuleDict)):  # cannot be called
                descend(full, child, listed)
            elif not listed and any(like(inner) for inner in child.modules()):
                descend(full, child, False)
            else:
                found.append(full)

    descend("", network, False)
    return found


def plan(network: nn.Module, weights: dict[str, nn.Parameter], data: Calibration) -> list[Unit]:
    """Which weights are solved together, and in which order, as seen from one forward of the first batch."""
    names = blocks(network) if data.blocks is None else data.blocks
    modules = {name: network.get_submodule(name) for name in names}
    inside: list[str] = []  # of which blocks the forward is at the time
    calls: list[str] = []
    uses: dict[str, list[tuple[str, Use]]] = {}
    last: dict[str, Use] = {}
    first: dict[str, int] = {}  # by weight or block, a number that rises with time

    def entered(name: str) -> None:
        inside.append(name)
        calls.append(name)
        first.setdefault(name, len(first))

    def see(name: str, use: Use) -> None:
        block = inside[-1] if inside else ""
        uses.setdefault(name, []).append((block, use))  # keeps the inputs, and so their identity
        if not use.lookup:
            last[block] = use
        first.setdefault(name, len(first))

    hooks = [m.register_forward_pre_hook(lambda *_, name=name: entered(name)) for name, m in modules.items()]
    hooks += [m.register_forward_hook(lambda *_: inside.pop() and None) for m in modules.values()]
    try:
        with torch.no_grad(), Watch(weights, see):
            data.run(network, data.batches[0])
    finally:
        for hook in hooks:
            hook.remove()

    owners = {id(p): block for block in reversed(names) if block in first for p in modules[block].parameters()}

    def home(name: str) -> str:
        """The block in which a weight is used, or which holds it if no use is seen; "" if it is used in several."""
        used = {block for block, _ in uses.get(name, [])} or {owners.get(id(weights[name]), "")}
        return used.pop() if len(used) == 1 else ""

    def start(name: str) -> tuple[int, int]:
        """When first the block, then the weight is needed. An embedding that is also the output: before all blocks."""
        keys = (name, owners.get(id(weights[name])))
        return min((first[key] for key in keys if key in first), default=-1), first.get(name, -1)

    units: dict[str, Unit] = {}
    for name in sorted(weights, key=start):
        block = home(name)
        new = Unit(block, [], [], calls.count(block), block in last and last[block].geometry is not None)
        unit = units.setdefault(block or (name if name in uses else ""), new)
        keys = {use.key for _, use in uses.get(name, [])}
        known = any(not use.lookup for _, use in uses.get(name, []))
        alike = (stage for stage in unit.stages if keys == {use.key for _, use in uses[stage[0]]})
        if not known:
            unit.blind.append(name)
        elif (stage := next(alike, None)) is not None:
            stage.append(name)
        else:
            unit.stages.append([name])
    return list(units.values())
