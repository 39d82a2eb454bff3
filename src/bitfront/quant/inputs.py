"""What a layer sees: its uses in a forward, and the second moments ``H = E[x xᵀ]`` of its inputs.

A ``TorchFunctionMode`` knows the weights by identity, wherever they are used: stock attention, tied weights and
functional calls need no special module, and no architecture is known by name.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bitfront.errors import BitfrontError
from bitfront.quant.solver import Curvature
from bitfront.quant.together import gathered, summed

CHUNK = 1 << 24  # values of an unfolded input at once
ROUNDING = 1e-3  # of a step: what a float32 share of up to 10,000 steps is off by


@dataclass
class Moments:
    """Second moments of the inputs of layers.

    Attributes:
        H: mean of ``x xᵀ``, float64 ``[batch, columns, columns]``; ``batch`` are the groups of a grouped convolution,
            or the different inputs of a stacked projection.
        count: how many ``x`` were seen.
    """

    H: Tensor
    count: int
    _curvatures: dict[tuple[float, bool, int], Curvature] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        return self.H.shape[0]

    @property
    def columns(self) -> int:
        return self.H.shape[1]

    def curvature(self, damping: float, act_order: bool, padding: int = 0) -> Curvature:
        """With its factorizations, shared by the layers that share the inputs."""
        key = damping, act_order, padding
        if key not in self._curvatures:
            self._curvatures[key] = Curvature(self.H, *key)
        return self._curvatures[key]

    def relative_loss(self, w: Tensor, quantized: Tensor) -> float:
        """Power of the error of the layer's output relative to that of the output, both ``tr(W H Wᵀ)``."""
        H = (self.H / (self.H.diagonal(dim1=1, dim2=2).mean() or 1.0)).float()
        both = (x.float().reshape(self.batch, -1, self.columns) for x in (w, quantized - w))
        power, error = (((rows @ H) * rows).sum(dtype=torch.float64).item() for rows in both)
        return error / power if power else 0.0

    def with_lookup(self, w: Tensor) -> Moments:
        """For a weight that is also an embedding: its rows themselves are then an output too, of the inputs I.

        The relative loss becomes the mean of that of both uses, as if every row were looked up equally often.
        """
        rows = w.double().reshape(self.batch, -1, self.columns)
        size = rows.square().sum().item()
        scale = ((rows @ self.H.to(rows)) * rows).sum().item() / size if size else 0.0
        return Moments(self.H + scale * torch.eye(self.columns).to(self.H), self.count)


@dataclass(frozen=True)
class Use:
    """One use of a weight in a forward: what identifies its inputs, and how they become the columns of ``x``.

    Attributes:
        key: the input tensors' identity, and the geometry.
        geometry: of a convolution: kernel, stride, padding, dilation, groups; None for a matrix product.
        batch_axis: where the samples are, if that is known.
        unseen: of a use that tells nothing of the weight's inputs, the function's name, as "conv_transpose1d".
    """

    key: tuple[Any, ...]
    inputs: tuple[Tensor, ...]
    geometry: tuple[Any, ...] | None = None
    batch_axis: int | None = None
    unseen: str = ""

    @property
    def lookup(self) -> bool:
        """Whether it is an embedding's, whose inputs are the numbers of rows."""
        return self.unseen == LOOKUP


class Watch(TorchFunctionMode):
    """Tells of every use of the given weights: with the inputs in ``F.linear``, a 1d or 2d convolution or an attention
    layer, by the name of the function in anything else that makes tensors of them.

    Args:
        weights: to look out for.
        see: called with the name and the use, before the use.
    """

    def __init__(self, weights: dict[str, nn.Parameter], see: Callable[[str, Use], None]) -> None:
        super().__init__()
        self.names, self.see = {id(w): name for name, w in weights.items()}, see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__deepcopy__:  # of an input, whose memo may name weights
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward and any(id(w) in self.names for w in _tensors((args, kwargs))):
            return self._attention(args, kwargs)
        known = None
        if func in SIGNATURES:
            bound = SIGNATURES[func].bind(*args, **kwargs)
            bound.apply_defaults()
            x, weight, _, *geometry = bound.arguments.values()
            known = weight if weight.dim() > 1 else None  # a product with a vector has no rows
            shape = (tuple(weight.shape[2:]), *geometry) if geometry else None
            self._seen(known, (x,), shape)
        others = [w for w in _tensors((args, kwargs)) if id(w) in self.names and w is not known]
        result = func(*args, **kwargs)
        made = list(_tensors(result)) if others else []  # nothing, if it only asked for the shape or the like
        for w in others:
            if any(x is not w for x in made):
                self.see(self.names[id(w)], Use((), (), unseen=name_of(func)))
        return result

    def _seen(self, weight: Any, inputs: tuple[Tensor, ...], geometry: Any = None, **how: Any) -> None:
        if id(weight) in self.names:
            inputs = inputs[:1] if all(x is inputs[0] for x in inputs) else inputs
            identity = tuple((x.data_ptr(), x.shape, x.stride(), 0 if x.is_inference() else x._version) for x in inputs)
            self.see(self.names[id(weight)], Use((identity, str(geometry)), inputs, geometry, **how))

    def _attention(self, args: Any, kwargs: Any) -> Any:
        """Stock attention, whose projections are no calls of their own: stop it before the last one."""
        bound = ATTENTION.bind(*args, **kwargs)
        bound.apply_defaults()
        at = bound.arguments
        query, key, value = at["query"], at["key"], at["value"]
        if at["use_separate_proj_weight"]:
            for name, x in (("q_proj_weight", query), ("k_proj_weight", key), ("v_proj_weight", value)):
                self._seen(at[name], (x,), batch_axis=1)
        else:
            self._seen(at["in_proj_weight"], (query, key, value), batch_axis=1)
        weight, bias = at["out_proj_weight"], at["out_proj_bias"]
        at["out_proj_weight"], at["out_proj_bias"] = torch.eye(len(weight), device=weight.device).to(weight), None
        heads, attention = F.multi_head_attention_forward(*bound.args, **bound.kwargs)
        self._seen(weight, (heads,), batch_axis=1)
        return F.linear(heads, weight, bias), attention


def _linear(input: Any, weight: Any, bias: Any = None) -> None: ...
def _conv(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1
) -> None: ...


SIGNATURES = {
    F.linear: inspect.signature(_linear),
    torch.conv1d: inspect.signature(_conv),
    torch.conv2d: inspect.signature(_conv),
}
ATTENTION = inspect.signature(F.multi_head_attention_forward)
LOOKUP = F.embedding.__name__


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in arguments or results of a function, which may come in lists."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            yield from _tensors(part)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


def name_of(func: Any) -> str:
    """Of a function of torch; ``w.T`` is the getter of a descriptor of that name."""
    owner = func.__self__ if func.__name__ == "__get__" else func
    return str(owner.__name__).strip("_")


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Without stock attention's fast path, which packs padded batches into nested tensors."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def columns(use: Use, valid: Tensor | None) -> Iterator[tuple[Tensor, list[int], bool]]:
    """The inputs as the columns that a weight's rows are multiplied with, in parts: ``[batch, columns, n]``, how many
    of the n count in each entry of the batch, and whether padding was left out, if there is some. What does not count
    is zero.

    Args:
        use: of a weight.
        valid: what is not padding: the share of each sample, ``[samples]``, behind which all is; or a mask of steps,
            ``[samples, time]``, which says it of inputs of as many steps alone. Time is the axis between samples and
            features of a matrix product, and the last axis of a convolution's input.
    """
    if use.geometry is not None:
        yield from _unfolded(use.inputs[0].detach().float(), use.geometry, valid)
        return
    rows, known = [x.detach().float() for x in use.inputs], True
    if valid is not None:
        kept = [inside(x, valid, use.batch_axis) for x in rows]
        known = all(mask is not None for mask in kept)
        rows = [x if mask is None else x[mask] for x, mask in zip(rows, kept, strict=True)]
    rows = [x.reshape(-1, x.shape[-1]) for x in rows]
    yield nn.utils.rnn.pad_sequence(rows, batch_first=True).transpose(1, 2), [len(x) for x in rows], known


def _unfolded(x: Tensor, geometry: Any, valid: Tensor | None) -> Iterator[tuple[Tensor, list[int], bool]]:
    """Of a convolution's input."""
    kernel, stride, padding, dilation, groups = geometry
    n = len(kernel)
    x = x[None] if x.dim() == n + 1 else x  # a sample without a batch
    stride, dilation = (_each(v, n) for v in (stride, dilation))
    time = x.shape[-1]
    if padding == "same":
        sides = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        x = F.pad(x, [side for total in reversed(sides) for side in (total // 2, total - total // 2)])
    padding = (0,) * n if isinstance(padding, str) else _each(padding, n)
    if n == 1:
        x, kernel = x[:, :, None], (1, *kernel)
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    width = (x.shape[-1] + 2 * padding[1] - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    told = valid is not None and len(valid) == len(x) and (n == 1 or valid.dim() == 1)  # an image has no steps
    kept = steps(valid, time, width, x.device) if valid is not None and told else None
    size = max(1, CHUNK // (x[0].numel() * math.prod(kernel)))
    for start in range(0, len(x), size):
        part = x[start : start + size]
        images = part.flatten(0, 1).unflatten(0, (-1, x.shape[1] // groups))
        unfolded = F.unfold(images, kernel, dilation, padding, stride)
        unfolded = unfolded.unflatten(0, (len(part), groups)).transpose(0, 1)  # [groups, samples, columns, positions]
        if kept is None:
            found = unfolded.transpose(1, 2).flatten(2)
        else:
            here = kept[start : start + size].repeat(1, unfolded.shape[-1] // width)  # [samples, positions]
            found = unfolded.transpose(2, 3)[:, here].transpose(1, 2)
        yield found, [found.shape[2]] * groups, valid is None or kept is not None


def _each(value: Any, n: int) -> tuple[int, ...]:
    """An option of a convolution, of each of its n axes."""
    return tuple(value) * (n // len(value)) if isinstance(value, (tuple, list)) else (value,) * n


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


class Accumulator:
    """Sums up ``x xᵀ`` of the uses that a ``Watch`` shows it.

    Args:
        name: of the layer, for messages.
        device: that is worked on.

    Attributes:
        valid: what is not padding, for the uses to come.
        lookup: whether one of the uses was an embedding's.
        padded: whether padding may have been counted, as an input is not of the steps that are known.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.total = name, torch.zeros((), device=device)
        self.counts = torch.zeros((), dtype=torch.long)
        self.valid: Tensor | None = None
        self.lookup = self.padded = False

    def add(self, _: str, use: Use) -> None:
        """One use of the weight."""
        self.lookup |= use.lookup
        if use.unseen:
            return
        for x, counts, known in columns(use, self.valid):
            self.padded |= not known
            shape = (max([len(x), *self.total.shape[:1]]), x.shape[1], x.shape[1])
            if self.total.shape != shape:
                self.total = self.total.to(x.device, torch.float64).expand(shape).clone()
            with torch.autocast(x.device.type, enabled=False):
                for part in x.split(1 << 14, dim=2):  # float32 within a part, float64 between them
                    self.total += part @ part.transpose(1, 2)
            self.counts = self.counts + torch.tensor(counts)

    def moments(self) -> Moments:
        """Their mean, over all processes; ``lookup`` and ``padded`` then count them all, too.

        Raises:
            BitfrontError: an input was not finite, or there was none.
        """
        self._share()
        if not self.counts.any():
            raise BitfrontError(f"no calibration sample reaches '{self.name}'; exclude it or calibrate on more samples")
        if not torch.isfinite(self.total).all():
            raise BitfrontError(
                f"the calibration inputs of '{self.name}' hold NaN or infinity; check the data and the float network"
            )
        self.total /= self.counts.clamp_min(1).to(self.total)[:, None, None]  # of wide layers, large
        return Moments(self.total, int(self.counts.max()))

    def _share(self) -> None:
        known = gathered((self.total.shape, self.counts.shape, self.lookup, self.padded))
        totals, counts, lookups, paddeds = zip(*known, strict=True)
        self.lookup, self.padded = any(lookups), any(paddeds)
        # Where the layer was not come to, the shape is not known.
        self.total = summed(self.total.double().expand(max(totals, key=lambda shape: (len(shape), shape))))
        self.counts = summed(self.counts.expand(max(counts, key=lambda shape: (len(shape), shape))))
