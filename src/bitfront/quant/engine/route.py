"""The way through a network, block by block: what each is called with, on every batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bitfront.quant.engine.blockwise import norm_parameters
from bitfront.quant.engine.plan import Calibration, Unit, shared
from bitfront.quant.forwards.captured import Captured, copied
from bitfront.quant.forwards.offload import Offload
from bitfront.quant.forwards.undisturbed import undisturbed
from bitfront.quant.layers.inputs import Reached


def forward(network: nn.Module, unit: Unit, data: Calibration, rest: Offload, captured: Captured) -> Any:
    """What a block makes of its inputs."""
    args, kwargs = captured.on(rest.device)
    if unit.block:
        return network.get_submodule(unit.block)(*args, **kwargs)
    with rest.reaching():
        return data.run(network, *args)


class Route:
    """Through a network, whose weights may change behind.

    Args:
        network: of the blocks.
        data: that go through it.
        rest: where its parts, and what is between them, are in the meantime.

    Attributes:
        calls: of the block come to.
        given: what it makes of them, on the CPU, if that is known.
    """

    def __init__(self, network: nn.Module, data: Calibration, rest: Offload) -> None:
        self.network, self.data, self.rest = network, data, rest
        self.unit: Unit | None = None
        self.calls: list[Captured] = []
        self.given: list[list[Any]] | None = None

    def to(self, unit: Unit) -> list[Captured]:
        """What a block is called with: handed on by the block before, which is as it will stay, where there is a link
        to it; else by a forward of the network up to it."""
        if unit.link and self.unit and self.unit.block == unit.link.before:
            given = self.given or self.run()
            self.calls = [unit.link.handed(*pair) for pair in zip(self.calls, given, strict=True)]
        else:
            self.calls = capture(self.network, unit, self.data, self.rest)
        self.unit, self.given = unit, None
        return self.calls

    @torch.no_grad()
    def run(self) -> list[list[Any]]:
        """The leaves of what the block now makes of each call."""
        assert self.unit is not None
        with undisturbed(self.network), self.rest.at_work(of_unit(self.network, self.unit)):
            outputs = (forward(self.network, self.unit, self.data, self.rest, c) for c in self.calls)
            self.given = [self.rest.all_stay([_kept(x) for x in tree_leaves(output)]) for output in outputs]
        return self.given


class Exact(Route):
    """Through the float network: ``run`` comes before the block is quantized, and what blocks before were is kept,
    where a way through them is still to come."""

    def __init__(self, network: nn.Module, data: Calibration, rest: Offload) -> None:
        super().__init__(network, data, rest)
        self.kept: dict[str, Tensor] = {}

    def keep(self, unit: Unit) -> None:
        """Note the weights and norms of a block that is about to change."""
        for name, copy in self.copies(unit).items():
            away = self.network.get_parameter(name) in self.rest.away
            self.kept[name] = self.rest.stays(copy) if away else copy

    def copies(self, unit: Unit) -> dict[str, Tensor]:
        """Of the weights and norms of a block, by name, where they now are."""
        block = self.network.get_submodule(unit.block)
        norms = [f"{unit.block}.{name}" if unit.block else name for name, _ in norm_parameters(block)]
        return {name: self.network.get_parameter(name).detach().clone() for name in (*unit.names, *norms)}

    def to(self, unit: Unit) -> list[Captured]:
        with parameters_as(self.network, self.kept):
            return super().to(unit)


@contextmanager
def parameters_as(network: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """With other values of some parameters, by name."""
    parameters = {name: network.get_parameter(name) for name in values}
    now = {name: p.data for name, p in parameters.items()}
    for name, p in parameters.items():
        p.data = values[name]
    try:
        yield
    finally:
        for name, p in parameters.items():
            p.data = now[name]


def of_unit(network: nn.Module, unit: Unit) -> set[nn.Parameter]:
    """The parameters that are at work with it."""
    inside = network.get_submodule(unit.block).parameters() if unit.block else ()
    return {*inside, *(network.get_parameter(name) for name in unit.names)}


def capture(network: nn.Module, unit: Unit, data: Calibration, rest: Offload) -> list[Captured]:
    """What a block is called with, on every batch, by the network so far; a forward that calls it once stops there."""
    same = shared(network)
    if not unit.block:
        return [Captured((batch,), {}, data.valid(batch), (n, 0), same) for n, batch in enumerate(data.batches)]
    captured: list[Captured] = []

    def arrived(module: nn.Module, args: Any, kwargs: Any) -> None:
        args, kwargs = rest.all_stay(copied((args, kwargs), "cpu", same))
        call = captured[-1].of[1] + 1 if captured and captured[-1].of[0] == n else 0
        captured.append(Captured(args, kwargs, data.valid(data.batches[n]), (n, call), same))
        if unit.calls == 1:
            raise Reached

    hook = network.get_submodule(unit.block).register_forward_pre_hook(arrived, with_kwargs=True)
    try:
        with undisturbed(network):
            for n in range(len(data.batches)):
                with suppress(Reached):
                    data.forward(network, data.batches[n])
    finally:
        hook.remove()
    return captured


def _kept(x: Any) -> Any:
    return copied(x, "cpu") if isinstance(x, Tensor) else x
