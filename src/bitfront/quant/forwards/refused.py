"""What a forward that trains must not do, as the weights that the network sees are in their places only while it lasts:
compute a part again in the backward (activation checkpointing), which would see the float weights, use these past
their modules, or write to them. All that would go wrong without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bitfront.errors import BitfrontError

REMEDY = "which would see unquantized weights and give wrong gradients; switch it off"
PRODUCTS = {
    *("linear", "bilinear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *(
        "matmul",
        "mm",
        "bmm",
        "addmm",
        "baddbmm",
        "einsum",
        "embedding",
        "embedding_bag",
        "multi_head_attention_forward",
    ),
}


def refuse_switch(network: nn.Module) -> None:
    """Refuse the switches by which timm and transformers have it.

    Raises:
        BitfrontError: with the module.
    """
    for module in network.modules():
        if getattr(module, "grad_checkpointing", False) or getattr(module, "gradient_checkpointing", False):
            raise BitfrontError(f"{type(module).__name__} has activation checkpointing switched on, {REMEDY}")


@contextmanager
def no_recomputation() -> Iterator[None]:
    """Refuse torch's, where a forward begins it.

    Raises:
        BitfrontError: it does.
    """
    told = f"activation checkpointing, {REMEDY}"
    before = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    torch._C._autograd._saved_tensors_hooks_disable(told, False)  # around the whole model, it is right
    try:
        yield
    except RuntimeError as error:
        if told not in str(error):
            raise
        raise BitfrontError(f"the network has {told}") from None
    finally:
        if before is None:
            torch._C._autograd._saved_tensors_hooks_enable()
        else:
            torch._C._autograd._saved_tensors_hooks_disable(before, False)


@contextmanager
def unwritten(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Refuse a forward that writes to its weights, as of a momentum encoder: what it sees is thrown away after it.

    Raises:
        BitfrontError: it has.
    """
    before = {name: _place(w) for name, w in weights.items()}
    yield
    for name, w in weights.items():
        if _place(w) != before[name]:
            raise BitfrontError(
                f"the network writes to '{name}' in its forward, which would be lost; write between steps or exclude it"
            )


def _place(w: Tensor) -> tuple[int, int] | None:
    try:
        return w.data_ptr(), w._version
    except RuntimeError:  # within a transform of torch.func, which has no memory of its own
        return None


def refuse_recomputation(output: Any) -> None:
    """Refuse that of functions of their own (torch's reentrant one, other libraries'), which the graph shows.

    Raises:
        BitfrontError: there is one.
    """
    todo: list[Node] = [t.grad_fn for t in tree_leaves(output) if isinstance(t, Tensor) and t.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if "Checkpoint" in node.name():
            raise BitfrontError(f"the network has activation checkpointing ({node.name()}), {REMEDY}")
        for other, _ in node.next_functions:
            if other is not None and other not in seen:
                seen.add(other)
                todo.append(other)


class Uses(TorchFunctionMode):
    """Refuses a layer's product with one of some weights; a look at them, or a penalty, is none.

    Args:
        weights: their names by ``id``.
    """

    def __init__(self, weights: dict[int, str]) -> None:
        super().__init__()
        self.weights = weights

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if name_of(func) in PRODUCTS:
            for x in tree_leaves((args, kwargs)):
                if id(x) in self.weights:
                    raise BitfrontError(
                        f"the network uses '{self.weights[id(x)]}' from a list or another reference than its module's, "
                        "where it would stay float; let the forward take it from the module"
                    )
        return func(*args, **kwargs)


def name_of(func: Any) -> str:
    """Of a function of torch; ``w.T`` is the getter of a descriptor of that name."""
    owner = func.__self__ if func.__name__ == "__get__" else func
    return str(owner.__name__).strip("_")
