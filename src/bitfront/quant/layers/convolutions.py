"""What the weight of a convolution sees, or of a transposed one.

    y[o, p] = sum over i, k of  w[o, i, k] x[i, stride p + dilation k - padding]
    y[o, p] = sum over i, k of  w[i, o, k] x[i, j],     p + padding = stride j + dilation k       (transposed)

So at the outputs of one phase, ``(p + padding) mod stride``, a transposed one uses every ``stride``-th tap alone. Where
the stride divides the kernel, and taps are not dilated, these are problems of their own, with a part of the columns.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bitfront.quant.layers.uses import Form, Parts, Use, identity, steps

CHUNK = 1 << 24  # values of an unfolded input at once


def _conv(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1
) -> None: ...
def _transposed(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: Any = 1,
    dilation: Any = 1,
) -> None: ...


PLAIN, TRANSPOSED = inspect.signature(_conv), inspect.signature(_transposed)
SIGNATURES: dict[Any, inspect.Signature] = {
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), PLAIN),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), TRANSPOSED),
}


def uses(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Tensor, Use]]:
    """The use of its weight by a function of ``SIGNATURES``."""
    bound = SIGNATURES[func].bind(*args, **kwargs)
    bound.apply_defaults()
    x, weight, _, *geometry = bound.arguments.values()
    key = (identity(x), str((func.__name__, tuple(weight.shape), geometry)))
    if SIGNATURES[func] is PLAIN:
        shape = (tuple(weight.shape[2:]), *geometry)
        key = (identity(x), str(shape))  # which layers of other channels share
        columns = lambda valid: unfolded(x.detach().float(), shape, valid)  # noqa: E731
        felt = lambda power, valid: _felt(power, shape, x.shape[-1], valid)  # noqa: E731
        yield weight, Use(func.__name__, key, (x,), columns, felt=felt)
        return
    problem = Transposed(weight.shape, *geometry)
    yield (
        weight,
        Use(
            func.__name__,
            key,
            (x,),
            lambda valid: problem.columns(x.detach().float(), valid),
            problem.form,
            common=problem.phases != (1,) * problem.n,
        ),
    )


def unfolded(x: Tensor, geometry: Any, valid: Tensor | None) -> Parts:
    """``Use.columns`` of a convolution's input. Time is its last axis."""
    kernel, stride, padding, dilation, groups = geometry
    n = len(kernel)
    x = x[None] if x.dim() == n + 1 else x  # a sample without a batch
    if not x.numel():
        return
    stride, dilation = (_each(v, n) for v in (stride, dilation))
    time = x.shape[-1]
    if padding == "same":
        sides = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        x = F.pad(x, [side for total in reversed(sides) for side in (total // 2, total - total // 2)])
    padding = (0,) * n if isinstance(padding, str) else _each(padding, n)
    width = (x.shape[-1] + 2 * padding[-1] - dilation[-1] * (kernel[-1] - 1) - 1) // stride[-1] + 1
    kept = _kept(x, valid, n, time, width)
    size = max(1, CHUNK // (x[0].numel() * math.prod(kernel)))
    for start in range(0, len(x), size):
        part = x[start : start + size]
        found = windows(part, kernel, stride, padding, dilation, groups)
        if kept is None:
            found = found.transpose(1, 2).flatten(2)
        else:
            here = kept[start : start + size].repeat(1, found.shape[-1] // width)  # [samples, positions]
            found = found.transpose(2, 3)[:, here].transpose(1, 2)
        yield found, [found.shape[2]] * groups, valid is None or kept is not None


def _felt(power: Tensor, geometry: Any, time: int, valid: Tensor | None) -> Tensor:
    """``Use.felt`` of the output of a convolution whose input has so many steps."""
    kernel, *_, groups = geometry
    n = len(kernel)
    power = power[None] if power.dim() == n + 1 else power
    if valid is not None and valid.dim() == 2:
        valid = steps(valid, time, power.shape[-1], power.device)
    alone = ((1,) * n, 1, 0, 1, groups)
    if not power.numel():
        return power.new_zeros(groups, 0)
    return torch.cat([p for p, _, _ in unfolded(power.unflatten(1, (groups, -1)).mean(2), alone, valid)], 2)[:, 0]


def _kept(x: Tensor, valid: Tensor | None, n: int, time: int, width: int) -> Tensor | None:
    """Which of the last axis' outputs are no padding, ``[samples, width]``; None where that cannot be told."""
    told = valid is not None and len(valid) == len(x) and (n == 1 or valid.dim() == 1)  # an image has no steps
    return steps(valid, time, width, x.device) if valid is not None and told else None


def windows(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """The values that a kernel lies on, ``[groups, samples, channels of a group x taps, positions]``.

    Args:
        x: ``[samples, channels, *sizes]``.
        kernel, stride, padding, dilation: of each of 1 to 3 axes.
        groups: of channels.
    """
    samples, n = len(x), len(kernel)
    if n == 1:
        x, kernel = x[:, :, None], (1, *kernel)
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    if n == 3:  # a slice at a time, whose channels are those of all slices that the kernel lies on
        x = F.pad(x, (0, 0, 0, 0, padding[0], padding[0]))
        depth = (x.shape[2] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
        starts = torch.arange(depth, device=x.device)[:, None] * stride[0]
        x = x[:, :, starts + torch.arange(kernel[0], device=x.device) * dilation[0]]  # [samples, channels, depth, taps]
        x = x.transpose(1, 2).flatten(2, 3).flatten(0, 1)
        stride, padding, dilation, kernel = stride[1:], padding[1:], dilation[1:], kernel[1:]
    images = x.flatten(0, 1).unflatten(0, (-1, x.shape[1] // groups))
    found = F.unfold(images, kernel, dilation, padding, stride)
    if n == 3:
        found = found.unflatten(0, (samples, -1, groups)).permute(2, 0, 3, 1, 4).flatten(3)
        return found
    return found.unflatten(0, (samples, groups)).transpose(0, 1)


class Transposed:
    """The problem of a transposed convolution's weight ``[channels, outputs of a group, *kernel]``.

    Args:
        shape: of the weight.
        stride, padding, output_padding, groups, dilation: as torch has them.

    Attributes:
        n: of how many axes it is.
        phases: along each; 1 where they have no taps of their own.
        form: of the weight; its batch are the phases of all groups.
    """

    def __init__(
        self, shape: Sequence[int], stride: Any, padding: Any, output_padding: Any, groups: int, dilation: Any
    ) -> None:
        self.kernel, self.groups, self.n = tuple(shape[2:]), groups, len(shape) - 2
        each = (_each(v, self.n) for v in (stride, padding, output_padding, dilation))
        self.stride, self.padding, self.output_padding, self.dilation = each
        axes = zip(self.kernel, self.stride, self.dilation, strict=True)
        self.phases = tuple(s if d == 1 and k % s == 0 else 1 for k, s, d in axes)
        self.taps = tuple(k // phases for k, phases in zip(self.kernel, self.phases, strict=True))
        cut = [size for pair in zip(self.taps, self.phases, strict=True) for size in pair]  # tap = phases m + phase
        view = (groups, shape[0] // groups, shape[1], *cut)
        self.form = Form.of(shape, view, (0, *range(4, len(view), 2), 2, 1, *range(3, len(view), 2)))

    def columns(self, x: Tensor, valid: Tensor | None) -> Parts:
        """``Use.columns`` of the input. Time is its last axis."""
        x = x[None] if x.dim() == self.n + 1 else x
        if not x.numel():
            return
        sizes, time = x.shape[2:], x.shape[-1]
        rest = [s // phases for s, phases in zip(self.stride, self.phases, strict=True)]
        if max(rest) > 1:  # zeros between the values make it one of a smaller stride
            apart = x.new_zeros(*x.shape[:2], *((size - 1) * s + 1 for size, s in zip(sizes, rest, strict=True)))
            apart[(slice(None), slice(None), *(slice(None, None, s) for s in rest))] = x
            x = apart
        sides = tuple(d * (k - 1) for d, k in zip(self.dilation, self.taps, strict=True))
        places = [self._places(axis, sizes[axis], x.shape[2 + axis] + sides[axis]) for axis in range(self.n)]
        kept = _kept(x, valid, self.n, time, self._outputs(self.n - 1, time))
        counted = self._counted(places, kept, x).expand(len(x), -1, -1)
        size = max(1, CHUNK // (x[0].numel() * math.prod(self.kernel)))
        for start in range(0, len(x), size):
            part = x[start : start + size]
            found = windows(part, self.taps, (1,) * self.n, sides, self.dilation, self.groups)
            found = found.unflatten(2, (-1, math.prod(self.taps))).flip(3).flatten(2, 3)  # the last tap comes first
            here = counted[start : start + size]
            found = found[:, None] * here.transpose(0, 1)[None, :, :, None].to(found)
            counts = here.sum((0, 2)).repeat(self.groups).tolist()
            yield found.flatten(0, 1).transpose(1, 2).flatten(2), counts, valid is None or kept is not None

    def _outputs(self, axis: int, size: int) -> int:
        taps = self.dilation[axis] * (self.kernel[axis] - 1)
        return (size - 1) * self.stride[axis] - 2 * self.padding[axis] + taps + self.output_padding[axis] + 1

    def _places(self, axis: int, size: int, positions: int) -> Tensor:
        """The output of each phase at each position of the taps, ``[phases, positions]``; -1 for none."""
        phases = self.phases[axis]
        place = torch.arange(positions) * phases + torch.arange(phases)[:, None] - self.padding[axis]
        return torch.where((place >= 0) & (place < self._outputs(axis, size)), place, -1)

    def _counted(self, places: Sequence[Tensor], kept: Tensor | None, x: Tensor) -> Tensor:
        """Which positions of the taps are outputs that count, of all axes: ``[samples or 1, phases, positions]``."""
        found = torch.ones(1, 1, 1, dtype=torch.bool, device=x.device)
        for axis, place in enumerate(places):
            place = place.to(x.device)
            here = (place >= 0)[None]
            if kept is not None and axis == self.n - 1:
                here = here & kept[:, place.clamp_min(0)]
            found = (found[:, :, None, :, None] & here[:, None, :, None, :]).flatten(3).flatten(1, 2)
        return found


def _each(value: Any, n: int) -> tuple[int, ...]:
    """An option of a convolution, of each of its n axes."""
    return tuple(value) * (n // len(value)) if isinstance(value, (tuple, list)) else (value,) * n
