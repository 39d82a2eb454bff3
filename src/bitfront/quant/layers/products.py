"""What a weight sees that is an operand of a product: of a linear layer, matmul or einsum, as it is or as a view that
has all of it (a transpose) or one entry of a stack (an expert's).

Whatever the function, axes have labels, as in einsum. Of a weight's axes, those that the other operand and the output
have too are a batch, those that the other one alone has are columns, and those that the output alone has are rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bitfront.quant.layers.uses import Form, Parts, Use, dense, flat, identity

ROWS_LAST = (F.linear.__name__, torch.addmm.__name__)  # whose output has the second operand's rows as its last axis

Labels = list[Hashable]
Product = tuple[Tensor, Labels, Tensor, Labels, set[Hashable]]


def uses(func: Any, args: Any, kwargs: Any, weight: Callable[[Tensor], Tensor | None]) -> Iterator[tuple[Tensor, Use]]:
    """The uses of weights, or of views of them, as operands of a function of ``PRODUCTS``.

    Args:
        func, args, kwargs: the call.
        weight: that a tensor is, or is a view of; None if it is of none that matters.

    Yields:
        The weight and its use.
    """
    try:
        products = list(PRODUCTS[func](*args, **kwargs))
    except (AttributeError, TypeError, ValueError):  # operands of another kind, or none that fit
        return
    for a, of_a, b, of_b, out in products:
        own = weight(a), weight(b)
        for view, labels, w, x, others in ((a, of_a, own[0], b, of_b), (b, of_b, own[1], a, of_a)):
            if w is not None and own[0] is not own[1]:  # of which the output is no linear function
                rows_last = view is b and func.__name__ in ROWS_LAST
                use = _use(func.__name__, w, view, labels, x, others, out, rows_last)
                if use is not None:
                    yield w, use


def _use(
    function: str,
    w: Tensor,
    view: Tensor,
    own: Labels,
    x: Tensor,
    others: Labels,
    out: set[Hashable],
    rows_last: bool,
) -> Use | None:
    """Of a weight by its view; None where it is no matrix product."""
    found = axes_of(view, w)
    unique = len(set(own)) == len(own) and len(set(others)) == len(others)
    if found is None or not unique or w.dim() < 2:
        return None
    axes, fixed = found
    there = {label for label, size in zip(others, x.shape, strict=True) if size > 1 or label not in out}
    kinds: dict[str, dict[int, Hashable]] = {"batch": {}, "rows": {}, "columns": {}}
    for axis, label, size in zip(axes, own, view.shape, strict=True):
        if size == 1 and label in there and label in out:
            continue  # along which it is repeated
        if axis is not None and (label in there or label in out):
            kinds["rows" if label not in there else "batch" if label in out else "columns"][axis] = label
        elif axis is not None or (label not in out and size > 1):
            return None  # a sum over its values
    batch, columns = (dict(sorted(kinds[kind].items())) for kind in ("batch", "columns"))
    placed = [others.index(label) for label in (*batch.values(), *columns.values())]
    samples = [axis for axis in range(x.dim()) if axis not in placed]
    summed = any(others[axis] not in out and x.shape[axis] > 1 for axis in samples)
    if not columns or not kinds["rows"] or summed or (batch and fixed):
        return None
    rows = [axis for axis in range(w.dim()) if axis not in {*batch, *fixed, *columns}]
    form = Form.of(w.shape, w.shape, [*sorted({*batch, *fixed}), *rows, *columns])
    entry = _entry(w, fixed) if fixed else None
    about: dict[str, Any] = {"form": form, "entry": entry, "common": bool(batch or fixed)}
    order = [*placed[: len(batch)], *samples, *placed[len(batch) :]]
    if not batch and len(columns) == 1 and order == [*range(x.dim())]:
        return dense(function, (x,), rows_last=rows_last, **about)

    def parts(valid: Tensor | None) -> Parts:
        ordered = x.permute(order).flatten(len(order) - len(columns))
        each = list(ordered.flatten(0, len(batch) - 1)) if batch else [ordered]
        return flat(each, valid)

    return Use(function, (identity(x), str((order, len(batch), len(columns))), form, entry), (x,), parts, **about)


def axes_of(view: Tensor, w: Tensor) -> tuple[list[int | None], dict[int, int]] | None:
    """The axes of a weight that those of its view are, None for those of one value, or repeated; and the place of the
    view along the axes that it does not have. None where it has a part of an axis."""
    if view is w:
        return list(range(w.dim())), {}
    strides = {stride: axis for axis, (stride, size) in enumerate(zip(w.stride(), w.shape, strict=True)) if size > 1}
    axes: list[int | None] = []
    for size, stride in zip(view.shape, view.stride(), strict=True):
        axis = strides.get(stride) if size > 1 and stride else None
        if size > 1 and stride and (axis is None or axis in axes or w.shape[axis] != size):
            return None
        axes.append(axis)
    left, fixed = int(view.storage_offset() - w.storage_offset()), dict[int, int]()
    for stride, axis in sorted(strides.items(), reverse=True):
        if axis not in axes:
            fixed[axis], left = divmod(left, stride)
    inside = left == 0 and all(0 <= at < w.shape[axis] for axis, at in fixed.items())
    return (axes, fixed) if inside and view.dtype == w.dtype else None


def _entry(w: Tensor, fixed: dict[int, int]) -> tuple[int, int]:
    """Number of one entry among those of the axes that it is fixed in."""
    number = 0
    for axis in sorted(fixed):
        number = number * w.shape[axis] + fixed[axis]
    return number, math.prod(w.shape[axis] for axis in fixed)


def _linear(input: Tensor, weight: Tensor, bias: Any = None) -> Iterator[Product]:
    samples: Labels = list(range(input.dim() - 1))
    if weight.dim() == 2:
        yield input, [*samples, "in"], weight, ["out", "in"], {*samples, "out"}


def _matmul(input: Tensor, other: Tensor, *, out: Any = None) -> Iterator[Product]:
    a, b = (list(range(x.dim() - 2, 0, -1)) for x in (input, other))
    of_a: Labels = [*a, "n", "in"][-input.dim() :] if input.dim() > 1 else ["in"]
    of_b: Labels = [*b, "in", "m"][-other.dim() :] if other.dim() > 1 else ["in"]
    yield input, of_a, other, of_b, {*of_a, *of_b} - {"in"}


def _mm(input: Tensor, mat2: Tensor, *, out: Any = None) -> Iterator[Product]:
    return _matmul(input, mat2)


def _addmm(input: Any, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1, out: Any = None) -> Any:
    return _matmul(mat1, mat2)


def _baddbmm(input: Any, batch1: Tensor, batch2: Tensor, *, beta: Any = 1, alpha: Any = 1, out: Any = None) -> Any:
    return _matmul(batch1, batch2)


def _einsum(equation: Any, *operands: Any) -> Iterator[Product]:
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return
    terms, arrow, result = equation.replace(" ", "").partition("->")
    labels = []
    for term, x in zip(terms.split(","), operands, strict=True):
        found: Labels = list(re.findall(r"\.\.\.|\w", term))
        if "..." in found:
            at, more = found.index("..."), x.dim() - len(found) + 1
            found[at : at + 1] = range(more, 0, -1)
        labels.append(found)
    every = [*labels[0], *labels[1]]
    out: set[Hashable] = {*result} - {"."} if arrow else {label for label in every if every.count(label) == 1}
    out |= {label for label in every if isinstance(label, int)} if "..." in result or not arrow else set()
    yield operands[0], labels[0], operands[1], labels[1], out


def _grouped(input: Tensor, mat2: Tensor, *, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """Rows of the input, sorted by the entry of a stack that each goes into."""
    if offs is None or input.dim() != 2 or mat2.dim() != 3:
        return
    start = 0
    for n, stop in enumerate(offs.tolist()):
        yield from _matmul(input[start:stop], mat2[n])
        start = stop


PRODUCTS: dict[Any, Callable[..., Iterator[Product]]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _matmul),
    **dict.fromkeys((torch.mm, torch.bmm, Tensor.mm, Tensor.bmm), _mm),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _addmm),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm), _baddbmm),
    torch.einsum: _einsum,
    **{getattr(of, name): _grouped for of, name in ((F, "grouped_mm"), (torch, "_grouped_mm")) if hasattr(of, name)},
}
