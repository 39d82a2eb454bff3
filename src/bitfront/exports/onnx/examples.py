"""What a network is called with, as its export is traced and compared."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from bitfront.errors import BitfrontError
from bitfront.quant.forwards.undisturbed import undisturbed

SAMPLES = 4  # of an example


@dataclass
class Example:
    """What a network is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, network: nn.Module, run: Callable[[], Any]) -> Example:
        """The first call of a network in a run, on the CPU."""
        calls: list[Example] = []
        hook = network.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append(cls(args, kwargs)), with_kwargs=True
        )
        try:
            with torch.no_grad():
                run()
        finally:
            hook.remove()
        if not calls:
            raise BitfrontError("the network itself is not called; let forward call it, not its parts")
        return Example(*tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, (calls[0].args, calls[0].kwargs)))

    @classmethod
    def some(cls, network: nn.Module, run: Callable[[nn.Module, Any], Any], batches: Iterable[Any]) -> list[Example]:
        """What ``run`` calls a network with on batches, a few samples of each."""
        with undisturbed(network):
            found = [cls.of(network.eval(), partial(run, network, batch)) for batch in batches]
        return [example.first(min(SAMPLES, example.samples)) for example in found]

    def float(self) -> Example:
        """In float32: ONNX Runtime's own optimizations end the process with networks of less."""

        def widened(x: Any) -> Any:
            return x.float() if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16) else x

        return Example(*tree_map(widened, (self.args, self.kwargs)))

    @property
    def tensors(self) -> list[Tensor]:
        """In the order in which they are an ONNX file's inputs."""
        return [x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor)]

    @property
    def samples(self) -> int:
        """How many there are: the length of the first tensor."""
        return next((len(x) for x in self.tensors if x.dim()), 1)

    def first(self, samples: int) -> Example:
        """Its first samples, over and over if there are fewer; what is not of all samples stays."""
        index = torch.arange(samples) % self.samples

        def taken(x: Any) -> Any:
            return x[index] if isinstance(x, Tensor) and x.dim() and len(x) == self.samples else x

        return Example(*tree_map(taken, (self.args, self.kwargs)))

    def dynamic(self, network: nn.Module, others: Sequence[Example]) -> dict[str, Any]:
        """By argument, the dimensions whose size may change: the first; where other examples differ; the length of
        tokens, ``[samples, length]`` of whole numbers."""
        varied = {id(x): [*zip(*(y.shape for y in same), strict=False)] for x, *same in self._beside(others)}

        def free(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return None
            tokens = x.dim() == 2 and not x.is_floating_point()
            differ = [n for n, sizes in enumerate(varied[id(x)]) if {*sizes} != {x.shape[n]}]
            return dict.fromkeys({*range(min(x.dim(), 1 + tokens)), *differ}, torch.export.Dim.AUTO)

        bound = inspect.signature(network.forward).bind(*self.args, **self.kwargs).arguments
        return tree_map(free, bound)

    def _beside(self, others: Sequence[Example]) -> Iterator[tuple[Tensor, ...]]:
        return zip(self.tensors, *(other.tensors for other in others), strict=True)
