"""One use of a weight in a forward, and what it tells of the weight's problem: the inputs of its rows, one output each,
as columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from bitfront.quant.storage.packed import ordered

ROUNDING = 1e-3  # of a step: what a float32 share of up to 10,000 steps is off by

Parts = Iterator[tuple[Tensor, list[int], bool]]
Columns = Callable[[Tensor | None], Parts]


@dataclass(frozen=True, order=True)
class Form:
    """The order in which a weight is ``[batch, rows, columns]``: as in ``packed.ordered``; its own by default."""

    view: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()

    @classmethod
    def of(cls, shape: Sequence[int], view: Sequence[int], axes: Sequence[int]) -> Form:
        """The plainest one with this order, of a weight of a shape."""
        kept = [axis for axis in axes if view[axis] > 1]
        if kept == sorted(kept):
            return cls()
        if tuple(view) == tuple(shape):
            return cls((), tuple(axes))
        place = {axis: n for n, axis in enumerate(sorted(kept))}
        return cls(tuple(view[axis] for axis in sorted(kept)), tuple(place[axis] for axis in kept))

    def rows(self, w: Tensor, batch: int, columns: int) -> Tensor:
        """``[batch, rows, columns]``."""
        return ordered(w, self.view, self.axes).reshape(batch, -1, columns)


NATURAL = Form()


@dataclass(frozen=True)
class Use:
    """One use of a weight.

    Attributes:
        function: its name, as "linear".
        key: identifies the inputs, and how they become columns.
        inputs: that the key is of, as long as they live.
        columns: the columns that the weight's rows are multiplied with, in parts: ``[batch, columns, n]``, how many of
            the n count in each entry of the batch, and whether padding was left out, if there is some; what does not
            count is zero. It takes what is not padding: the share of each sample, ``[samples]``, behind which all is;
            or a mask of steps, ``[samples, time]``, which says it of inputs of as many steps alone; or None. Itself
            None where the use tells nothing of the inputs.
        form: of the weight.
        entry: of the batch, where the use is of one alone, and how many there are.
        common: whether the entries of a batch count by how much they see; else each for itself.
        looked_up: of an embedding, the numbers of rows: each of them is an output.
        added: whether it is added to something, so that its values are an output themselves, as a bias is.
        felt: of the squared gradient of the function's output, the mean over the rows for each of the columns,
            ``[batch, n]``, all parts of ``columns`` together; it takes what is not padding, too. None where rows are
            not the output's last axis, or a convolution's channels.
    """

    function: str
    key: Any = None
    inputs: tuple[Tensor, ...] = ()
    columns: Columns | None = None
    form: Form = NATURAL
    entry: tuple[int, int] | None = None
    common: bool = False
    looked_up: Tensor | None = None
    added: bool = False
    felt: Callable[[Tensor, Tensor | None], Tensor] | None = None


def told(x: Tensor) -> bool:
    """Whether a tensor is known by its memory; one that is sparse, nested or inside ``vmap`` is not."""
    try:
        return x.data_ptr() >= 0 and not x.is_nested
    except RuntimeError:
        return False


def identity(*inputs: Tensor) -> Any:
    """What tells living tensors, as they are now, from others."""
    return tuple((x.data_ptr(), x.shape, x.stride(), 0 if x.is_inference() else x._version) for x in inputs)


def dense(
    function: str,
    inputs: tuple[Tensor, ...],
    batch_axis: int | None = None,
    whole: bool = False,
    rows_last: bool = False,
    **about: Any,
) -> Use:
    """Of inputs ``[..., columns]``: of one, or of one for each entry of the batch.

    Args:
        function: its name.
        inputs: the tensors.
        batch_axis: where the samples are, if that is known.
        whole: whether they are known to have no padding.
        rows_last: whether the output's last axis are the weight's rows.
        about: what else is known of the use.
    """
    inputs = inputs[:1] if all(x is inputs[0] for x in inputs) else inputs

    def columns(valid: Tensor | None) -> Parts:
        return flat(inputs, None if whole else valid, batch_axis)

    def felt(power: Tensor, valid: Tensor | None) -> Tensor:
        parts = flat((power.mean(-1, keepdim=True),), None if whole else valid, batch_axis)
        return torch.cat([part for part, _, _ in parts], 2)[:, 0]

    key = identity(*inputs), about.get("form", NATURAL), about.get("entry")
    known = len(inputs) == 1 and about.get("entry") is None and rows_last
    return Use(function, key, inputs, columns, felt=felt if known else None, **about)


def flat(inputs: Sequence[Tensor], valid: Tensor | None, batch_axis: int | None = None) -> Parts:
    """``Use.columns`` of inputs ``[..., columns]``, of one for each entry of the batch. Time is the axis between
    samples and columns."""
    rows, known = [x.detach().float() for x in inputs], True
    if valid is not None:
        kept = [inside(x, valid, batch_axis) for x in rows]
        known = all(mask is not None for mask in kept)
        rows = [x if mask is None else x[mask] for x, mask in zip(rows, kept, strict=True)]
    rows = [x.reshape(-1, x.shape[-1]) for x in rows]
    yield nn.utils.rnn.pad_sequence(rows, batch_first=True).transpose(1, 2), [len(x) for x in rows], known


def inside(x: Tensor, valid: Tensor, batch_axis: int | None = None) -> Tensor | None:
    """Which positions of ``x`` ``[..., features]`` are no padding, of its shape without the last axis; None where that
    cannot be told.

    Args:
        x: ``[samples, time, ..., features]`` or time first; ``[samples, features]``, all of which count; where
            ``valid`` is a mask, also ``[samples * time, features]``, and time is the axis of that length, if it is one.
        valid: as in ``columns``.
        batch_axis: where the samples are, if that is known.
    """
    samples, shape = len(valid), x.shape[:-1]
    if shape == (samples,):
        return torch.ones(samples, dtype=torch.bool, device=x.device)
    if len(shape) == 1 and valid.dim() == 2 and len(x) == valid.numel():
        return valid.bool().to(x.device).flatten()
    axes = (0, 1) if batch_axis is None else (batch_axis,)
    batch_axis = next((axis for axis in axes if len(shape) > 1 and shape[axis] == samples), None)
    if batch_axis is None:
        return None
    others = [axis for axis in range(len(shape)) if axis != batch_axis]
    if valid.dim() == 2:
        others = [axis for axis in others if shape[axis] == valid.shape[1]]
        if len(others) != 1:
            return None
    axis = others[0]
    kept = steps(valid, shape[axis], shape[axis], x.device)
    assert kept is not None
    sizes = [n if i in (batch_axis, axis) else 1 for i, n in enumerate(shape)]
    return (kept if batch_axis < axis else kept.T).reshape(sizes).expand(shape)


def steps(valid: Tensor, time: int, width: int, device: torch.device) -> Tensor | None:
    """Which steps are no padding, ``[samples, width]``; one that is only partly padding counts.

    Args:
        valid: as in ``columns``.
        time: steps of a layer's input.
        width: steps that it makes of them.
        device: of the result.

    Returns:
        None for a mask of other steps.
    """
    if valid.dim() == 1:
        ends = (valid.double() * width - ROUNDING).ceil().to(device)
        return torch.arange(width, device=device) < ends[:, None]
    if valid.shape[1] != time:
        return None
    kept = valid.to(device, torch.float32)
    return (kept if width == time else F.adaptive_max_pool1d(kept[None], width)[0]) > 0
