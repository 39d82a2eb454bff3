"""How a block's inputs come of those of the block before it, so that a calibration hands on what a block gives instead
of going through the network from its start for each.

That holds where each of them is, in the forwards that a plan sees, an output of the block before, one of its own
arguments, or a plain value; and where that block, called by itself, gives what it gave in the network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, keystr, tree_flatten_with_path, tree_leaves, tree_unflatten

from bitfront.errors import BitfrontError
from bitfront.quant.forwards.captured import Captured, copied
from bitfront.quant.forwards.undisturbed import undisturbed

PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)
CLOSE = 1e-5  # relative: what kernels may differ by from one call to the next


@dataclass(frozen=True)
class Link:
    """From a block to the next one.

    Attributes:
        before: the name of the first one.
        spec: of the arguments of the second, ``(args, kwargs)``.
        sources: of each of their leaves: the number of a leaf of the first one's output, the path of one of its
            arguments, or a value in a tuple.
    """

    before: str
    spec: TreeSpec
    sources: tuple[int | str | tuple[Any], ...]

    def handed(self, captured: Captured, output: Sequence[Any]) -> Captured:
        """A call of the second block, after one of the first that gave these leaves."""
        own, _ = _flat(captured.args, captured.kwargs)

        def value(source: int | str | tuple[Any]) -> Any:
            if isinstance(source, int):
                return output[source]
            return own[source] if isinstance(source, str) else source[0]

        args, kwargs = tree_unflatten([value(source) for source in self.sources], self.spec)
        return replace(captured, args=args, kwargs=kwargs)


class Links:
    """Finds them while forwards of all batches go by.

    Args:
        modules: the blocks by their names.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.batches = self.open = 0
        self.found: dict[str, Link | None] = {}
        self.calls: Counter[str] = Counter()

    def hooks(self) -> list[Any]:
        """Set on the blocks, to be removed."""
        hooks = []
        for name, module in self.modules.items():
            hooks.append(module.register_forward_pre_hook(partial(self._entered, name), with_kwargs=True))
            hooks.append(module.register_forward_hook(partial(self._left, name), always_call=True))
        return hooks

    def begin(self) -> None:
        """The next batch follows."""
        self.batches, self.open = self.batches + 1, 0
        self.last: tuple[str, dict[str, Any], list[Any]] | None = None
        self.called: set[str] = set()

    def _entered(self, name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        link = self._link(args, kwargs) if not self.open and name not in self.called else None
        if self.found.setdefault(name, link) != link:
            self.found[name] = None
        self.calls[name] += 1
        self.called.add(name)
        self.open += 1
        self.arguments = _flat(args, kwargs)[0]

    def _left(self, name: str, _: nn.Module, args: Any, output: Any) -> None:
        self.open -= 1
        self.last = (name, self.arguments, tree_leaves(output)) if not self.open else None

    def _link(self, args: Any, kwargs: Any) -> Link | None:
        if self.last is None:
            return None
        before, own, given = self.last
        leaves, spec = _flat(args, kwargs)
        sources = tuple(_source(path, leaf, own, given) for path, leaf in leaves.items())
        return None if None in sources else Link(before, spec, sources)  # type: ignore[arg-type]

    @torch.no_grad()
    def checked(self, network: nn.Module, forward: Callable[[], Any], shared: dict[int, Any]) -> dict[str, Link]:
        """Those that hold for every batch, by the name of the second block.

        Args:
            network: of the blocks.
            forward: of it, on one of the batches.
            shared: by ``id``, as in ``Captured``.
        """
        always = {name for name, n in self.calls.items() if n == self.batches}
        found = {name: link for name, link in self.found.items() if link and {name, link.before} <= always}
        captured: dict[str, Captured] = {}

        def arrived(name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
            with suppress(BitfrontError):  # of what cannot be copied, which is told if the block is quantized
                args, kwargs = copied((args, kwargs), "cpu", shared)
                captured[name] = Captured(args, kwargs, None, shared=shared)

        wanted = found.keys() | {link.before for link in found.values()}
        hooks = [
            self.modules[name].register_forward_pre_hook(partial(arrived, name), with_kwargs=True) for name in wanted
        ]
        try:
            with undisturbed(network):
                forward()
        finally:
            for hook in hooks:
                hook.remove()
        return {name: link for name, link in found.items() if self._holds(network, name, link, captured)}

    def _holds(self, network: nn.Module, name: str, link: Link, captured: Mapping[str, Captured]) -> bool:
        """Whether the block before, called by itself, leads to what the block was called with."""
        if not {name, link.before} <= captured.keys():
            return False
        before = self.modules[link.before]
        args, kwargs = captured[link.before].on(next((p.device for p in before.parameters()), torch.device("cpu")))
        try:
            with undisturbed(network):
                given = tree_leaves(before(*args, **kwargs))
        except Exception:  # whatever a stranger's forward raises that needs more than its arguments
            return False
        calls = link.handed(captured[link.before], given), captured[name]
        pairs = zip(*(tree_leaves((c.args, c.kwargs)) for c in calls), strict=True)
        try:
            return all(_same(x, y) for x, y in pairs)
        except NotImplementedError:  # of sparse tensors
            return False


def _source(path: str, leaf: Any, own: Mapping[str, Any], given: Sequence[Any]) -> int | str | tuple[Any] | None:
    """Where a leaf of the arguments comes from; None if that cannot be told."""
    plain = isinstance(leaf, PLAIN)
    if not plain and not isinstance(leaf, Tensor):
        return None  # a cache, that a block may have written to
    if path in own and own[path] is leaf:
        return path
    if plain:
        return (leaf,)
    at = next((n for n, x in enumerate(given) if x is leaf), None)
    return at if at is not None else next((other for other, x in own.items() if x is leaf), None)


def _same(x: Any, y: Any) -> bool:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return bool(x == y)
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    x, y = x.cpu(), y.cpu()
    if torch.equal(x, y):
        return True
    largest = float(y.abs().nan_to_num(0.0, 0.0).max())
    return torch.allclose(x, y, CLOSE, CLOSE * largest, equal_nan=True)


def _flat(args: Any, kwargs: Any) -> tuple[dict[str, Any], TreeSpec]:
    """The leaves of arguments by their paths."""
    leaves, spec = tree_flatten_with_path((args, kwargs))
    return {keystr(path): leaf for path, leaf in leaves}, spec
