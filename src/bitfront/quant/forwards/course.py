"""What decides the course of a forward: where no value of a tensor does, batches of the same form go the same way, and
one of them tells of all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from bitfront.quant.forwards.links import PLAIN

# What they hand to Python goes by no dispatcher.
READ = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__}
RANDOM = torch.Tag.nondeterministic_seeded
BY_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXED = {"aten::index", "aten::_unsafe_index"}  # whose results have a shape by values only if an index is a mask
UNFILLED = ("aten::empty", "aten::new_empty")  # what will be in it may come from anywhere


class Course:
    """Watches what is done with values.

    Attributes:
        open: whether Python, or the shape of a tensor, has come to depend on the values of tensors, or may have. Those
            that are made of nothing but numbers, a range or a mask of a shape, are the same for every batch.
    """

    def __init__(self) -> None:
        self.open = False
        self.noting = True
        self.same = WeakTensorKeyDictionary()

    @contextmanager
    def watched(self) -> Iterator[None]:
        with _Reads(self), _Operators(self):
            yield

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done meanwhile is no part of the forward."""
        self.noting = False
        try:
            yield
        finally:
            self.noting = True

    def note(self, decides: bool, args: Any) -> bool:
        """Whether all tensors of a call are the same for every batch; if not, it may leave the course open."""
        same = all(x in self.same for x in _tensors(args))
        self.open |= self.noting and decides and not same
        return same

    def made(self, func: Any, args: Any, result: Any, same: bool) -> None:
        """By an operator, of tensors that are the same for every batch, or not."""
        same &= isinstance(func, OpOverload) and RANDOM not in func.tags
        if not same and (not isinstance(func, OpOverload) or func._schema.is_mutable):
            self.same.clear()  # what is written to may have been seen through any of them
        elif same and not func._schema.name.startswith(UNFILLED):
            self.same.update((x, None) for x in _tensors(result))


class _Reads(TorchFunctionMode):
    def __init__(self, course: Course) -> None:
        super().__init__()
        self.course = course

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READ:
            self.course.note(True, args)
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    supports_higher_order_operators = True  # of which nothing is known

    def __init__(self, course: Course) -> None:
        super().__init__()
        self.course = course

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = args, kwargs or {}
        same = self.course.note(_decides(func, args), given)
        result = func(*args, **(kwargs or {}))
        self.course.made(func, given, result, same)
        return result


def _tensors(x: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor))


def _decides(func: Any, args: Any) -> bool:
    """Whether it makes numbers, or shapes, of values."""
    if not isinstance(func, OpOverload):
        return True
    name = func._schema.name
    if name in INDEXED:
        return any(x.dtype in (torch.bool, torch.uint8) for x in _tensors(args[1]))
    return bool(BY_VALUES & set(func.tags)) or not name.startswith(("aten::", "prim::"))  # others have no tags to go by


def signature(batch: Any) -> Any:
    """Of a batch, all but the values of its tensors; None where it holds what cannot be told."""
    leaves, spec = tree_flatten(batch)
    if not all(isinstance(x, PLAIN) or (isinstance(x, Tensor) and not x.is_nested) for x in leaves):
        return None
    told = ((x.shape, x.dtype, x.device, x.layout) if isinstance(x, Tensor) else (type(x), repr(x)) for x in leaves)
    return str(spec), *told
