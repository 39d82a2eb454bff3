"""What a layer sees: its uses in a forward, and the second moments ``H = E[x xᵀ]`` of its inputs.

A ``TorchFunctionMode`` knows the weights by identity, wherever they are used: stock attention, tied weights and
functional calls need no special module, and no architecture is known by name.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bitfront.errors import BitfrontError
from bitfront.quant.forwards.refused import name_of
from bitfront.quant.forwards.together import gathered, summed
from bitfront.quant.layers import convolutions, products, recurrent
from bitfront.quant.layers.solver import Curvature
from bitfront.quant.layers.uses import NATURAL, Form, Use, dense, told
from bitfront.quant.storage.packed import ordered, restored

UNSEEN = 1e-6  # inputs of an entry of a batch that sees nothing, relative to those of the others
LEAST = 1e-6  # damping with which errors before a layer are made up for


@dataclass
class Moments:
    """Second moments of the inputs of layers.

    Attributes:
        H: mean of ``x xᵀ``, float64 ``[batch, columns, columns]``; ``batch`` are the groups of a grouped convolution,
            the phases of a transposed one, the different inputs of a stacked projection, or the experts of a stack.
        count: how many ``x`` were seen, of the batch by the entry that saw most.
        form: how the weight is ``[batch, rows, columns]``.
        drift: mean of ``(x' - x) xᵀ``, float64 as ``H``, where ``x'`` is what the layer sees in the float network; None
            where that is not known.
        apart: mean of ``|x' - x|²`` relative to that of ``|x|²``.
    """

    H: Tensor
    count: int
    form: Form = NATURAL
    drift: Tensor | None = None
    apart: float = 0.0
    _making_up: dict[float, Tensor] = field(default_factory=dict)
    _curvatures: dict[tuple[float, bool, int], Curvature] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        return self.H.shape[0]

    @property
    def columns(self) -> int:
        return self.H.shape[1]

    def rows(self, w: Tensor) -> Tensor:
        """A weight as ``[batch, rows, columns]``."""
        return self.form.rows(w, self.batch, self.columns)

    def wanted(self, w: Tensor, share: float, damping: float) -> Tensor:
        """The weight that is to be quantized in place of one, so that the layer makes up for a share of the errors
        before it (QEP, arXiv 2504.09629, whose share is α): on the inputs that it gets, all of it comes closest to the
        outputs in the float network.

            W + share · W drift (H + damping · mean diag H)⁻¹

        Args:
            w: of the layer.
            share: 0..1.
            damping: as of a ``Curvature``.

        Returns:
            Float32 of its shape; itself where nothing is known of the float network.
        """
        if self.drift is None or not share:
            return w.float()
        if damping not in self._making_up:
            diagonal = self.H.diagonal(dim1=1, dim2=2)
            ridge = (max(damping, LEAST) * diagonal.mean(1, keepdim=True)).expand_as(diagonal)
            damped = self.H + torch.diag_embed(torch.where(ridge > 0, ridge, 1.0))  # without inputs, without drift
            lower = torch.linalg.cholesky(damped)
            self._making_up[damping] = torch.cholesky_solve(self.drift.transpose(1, 2), lower).transpose(1, 2)
        rows = self.rows(w.double())
        rows = rows + share * (rows @ self._making_up[damping].to(rows))
        return restored(rows.float(), w.shape, self.form.view, self.form.axes)

    def curvature(self, damping: float, act_order: bool, padding: int = 0) -> Curvature:
        """With its factorizations, shared by the layers that share the inputs."""
        key = damping, act_order, padding
        if key not in self._curvatures:
            self._curvatures[key] = Curvature(self.H, *key)
        return self._curvatures[key]

    def relative_loss(self, w: Tensor, quantized: Tensor) -> float:
        """Power of the error of the layer's output relative to that of the output, both ``tr(W H Wᵀ)``."""
        H = (self.H / (self.H.diagonal(dim1=1, dim2=2).mean() or 1.0)).float()
        both = (self.rows(x.float()) for x in (w, quantized - w))
        power, error = (((rows @ H) * rows).sum(dtype=torch.float64).item() for rows in both)
        return error / power if power else 0.0

    @classmethod
    def of_nothing(cls, w: Tensor, form: Form) -> Moments | None:
        """For a weight of a form that saw no input: of inputs that are alike, so that it is stored as if it had seen
        some; None where the form does not tell its columns."""
        rows = ordered(w, form.view, form.axes)
        if rows.dim() < 2 or (rows.dim() > 2 and form != NATURAL):
            return None
        eye = torch.eye(rows[0].numel(), dtype=torch.float64, device=w.device)
        return cls(eye[None], 0, form)

    def with_lookup(self, w: Tensor) -> Moments:
        """For a weight that is also looked up, or added: its rows themselves are then an output too, of the inputs I,
        and errors before it are not made up for.

        The relative loss becomes the mean of that of both uses, as if every row were looked up equally often.
        """
        rows = self.rows(w.double())
        size = rows.square().sum().item()
        scale = ((rows @ self.H.to(rows)) * rows).sum().item() / size if size else 0.0
        return Moments(self.H + scale * torch.eye(self.columns).to(self.H), self.count, self.form)


def of_weight(w: Tensor, form: Form, moments: Moments | None, lookup: bool) -> Moments | None:
    """What a weight of a form is solved with: ``moments`` of its inputs, if it had any, and its rows where they are
    outputs too."""
    if moments is None:
        return Moments.of_nothing(w, form)
    return moments.with_lookup(w) if lookup else moments


class Watch(TorchFunctionMode):
    """Tells of every use of the given weights: with the inputs in a product, a convolution, a recurrent or an attention
    layer, by the name of the function in anything else that makes tensors of them. Views of a weight are no use of it;
    what is made of them is.

    Args:
        weights: to look out for.
        see: called with the name and the use; before the use, where its inputs are the function's.
        after: called with the name, a use that has ``felt`` and the function's output; gives what takes its place.
    """

    def __init__(
        self,
        weights: dict[str, nn.Parameter],
        see: Callable[[str, Use], None],
        after: Callable[[str, Use, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.names, self.see, self.after = {id(w): name for name, w in weights.items()}, see, after

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__deepcopy__:  # of an input, whose memo may name weights
            return func(*args, **kwargs)
        given = list(_tensors((args, kwargs)))
        used = {id(w): w for x in given if (w := self._weight(x)) is not None}
        if not used:
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._attention(args, kwargs)
        understood = all(map(told, given))
        uses = list(self._uses(func, args, kwargs)) if understood else []
        known = self._told(uses)
        result = self._replaced(uses, func(*args, **kwargs))
        if func in RECURRENT and understood:
            known |= self._told(recurrent.uses(func, args, kwargs, result))
        made = list(_tensors(result))  # nothing, if it only asked for the shape or the like
        for w in used.values():
            if id(w) not in known and any(self._weight(x) is not w for x in made):
                self.see(self.names[id(w)], Use(name_of(func)))
        return result

    def _weight(self, x: Tensor) -> Tensor | None:
        """The weight that a tensor is, or is a view of."""
        if id(x) in self.names:
            return x
        return base if (base := x._base) is not None and id(base) in self.names else None

    def _uses(self, func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Tensor, Use]]:
        if func in products.PRODUCTS:
            yield from products.uses(func, args, kwargs, self._weight)
        elif func in convolutions.SIGNATURES:
            yield from convolutions.uses(func, args, kwargs)
        elif func is F.embedding:
            bound = LOOK_UP.bind(*args, **kwargs).arguments
            yield bound["weight"], Use(func.__name__, looked_up=bound["input"])
        for x in _tensors(list(_added(func, args, kwargs))):
            if (w := self._weight(x)) is not None:
                yield w, Use(func.__name__, added=True)

    def _replaced(self, uses: Iterable[tuple[Tensor, Use]], result: Any) -> Any:
        for w, use in uses:
            if self.after and use.felt and id(w) in self.names:
                result = self.after(self.names[id(w)], use, result)
        return result

    def _told(self, uses: Iterable[tuple[Tensor, Use]]) -> set[int]:
        """Tell of uses; of which weights, by ``id``."""
        known = set()
        for w, use in uses:
            if id(w) in self.names:
                known.add(id(w))
                self.see(self.names[id(w)], use)
        return known

    def _attention(self, args: Any, kwargs: Any) -> Any:
        """Stock attention, whose projections are no calls of their own: stop it before the last one."""
        bound = ATTENTION.bind(*args, **kwargs)
        bound.apply_defaults()
        at = bound.arguments
        query, key, value, biases = at["query"], at["key"], at["value"], at["in_proj_bias"]
        if at["use_separate_proj_weight"]:
            for name, x in (("q_proj_weight", query), ("k_proj_weight", key), ("v_proj_weight", value)):
                self._projects(at[name], x)
        else:
            uses = self._projects(at["in_proj_weight"], query, key, value)
            if self.after and query is key is value:
                at |= self._projected(at["in_proj_weight"], at["in_proj_bias"], query, uses)
        weight, bias = at["out_proj_weight"], at["out_proj_bias"]
        self._told((b, Use(F.linear.__name__, added=True)) for b in (biases, bias) if b is not None)
        at["out_proj_weight"], at["out_proj_bias"] = torch.eye(len(weight), device=weight.device).to(weight), None
        heads, attention = F.multi_head_attention_forward(*bound.args, **bound.kwargs)
        uses = self._projects(weight, heads)
        return self._replaced(uses, F.linear(heads, weight, bias)), attention

    def _projects(self, weight: Tensor, *inputs: Tensor) -> list[tuple[Tensor, Use]]:
        uses = [(weight, dense(F.linear.__name__, inputs, 1, rows_last=True))]
        self._told(uses)
        return uses

    def _projected(self, weight: Tensor, bias: Tensor | None, x: Tensor, uses: Any) -> dict[str, Any]:
        """Arguments of stock attention with the projection of its input done before."""
        parts = self._replaced(uses, F.linear(x, weight, bias)).chunk(3, -1)
        eye = torch.eye(x.shape[-1], device=x.device).to(x)
        weights = {"in_proj_weight": None, **dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight"), eye)}
        inputs = dict(zip(("query", "key", "value"), parts, strict=True))
        return inputs | weights | {"use_separate_proj_weight": True, "in_proj_bias": None}


class Reached(Exception):  # noqa: N818 no error
    """The forward has come as far as it needs to."""


def until(n: int, see: Callable[[str, Use], object]) -> Callable[[str, Use], None]:
    """For a ``Watch``: hands on n uses, with which what a forward can tell is known, and ends it; 0 for all of it."""
    left = n or math.inf

    def seen(name: str, use: Use) -> None:
        nonlocal left
        if left > 0:  # else someone has caught it
            see(name, use)
            left -= 1
        if left <= 0:
            raise Reached

    return seen


ATTENTION, LOOK_UP = inspect.signature(F.multi_head_attention_forward), inspect.signature(F.embedding)
RECURRENT = {*recurrent.LAYERS, *recurrent.CELLS}
ADD = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
ADDED = {  # place and name of what is added to a product
    **dict.fromkeys((F.linear, *convolutions.SIGNATURES), (2, "bias")),
    **dict.fromkeys((torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm), (0, "input")),
}


def _added(func: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    """The operands of a function that it adds to something: of a sum, one that is repeated along the other, as along
    samples. (One of as many values may be a part of a weight.)"""
    if func in ADD:
        operands = list(_tensors((args, kwargs)))
        yield from (x for x in operands if any(other.numel() > x.numel() for other in operands))
    elif func in ADDED:
        place, name = ADDED[func]
        yield args[place] if len(args) > place else kwargs.get(name)
    elif func in RECURRENT:
        yield from (x for x in _tensors(args) if x.dim() == 1)


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in arguments or results of a function, which may come in lists."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            yield from _tensors(part)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Without stock attention's fast path, which packs padded batches into nested tensors."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class Accumulator:
    """Sums up ``x xᵀ`` of the uses that a ``Watch`` shows it.

    Args:
        name: of the layer, for messages.
        device: that is worked on.
        form: of the weight, in which uses count; None for that of the first one.

    Attributes:
        valid: what is not padding, for the uses to come.
        lookup: whether it is also looked up, or added.
        padded: whether padding may have been counted, as an input is not of the steps that are known.
        drift: sum of ``(x' - x) xᵀ``; None as soon as a use has no counterpart in the float network, or may have
            another one than it seems, as samples may go to other experts there.
        apart: sum of ``|x' - x|²``.
        idle: entries of the batch that see nothing, as experts that no sample is sent to.
    """

    def __init__(self, name: str, device: torch.device, form: Form | None = None) -> None:
        self.name, self.total, self.form = name, torch.zeros((), device=device), form
        self.drift: Tensor | None = torch.zeros((), device=device)
        self.apart = 0.0
        self.counts = torch.zeros((), dtype=torch.long)
        self.valid: Tensor | None = None
        self.lookup = self.padded = self.common = False
        self.idle = 0

    def add(self, _: str, use: Use, there: list[Tensor] | None = None) -> None:
        """One use of the weight.

        Args:
            use: of it.
            there: its columns in the float network, in their parts, if they are known.
        """
        self.lookup |= use.looked_up is not None or use.added
        self.form = use.form if self.form is None and use.columns else self.form
        if use.columns is None or use.form != self.form:
            return
        self.common |= use.common
        counterparts = [] if use.entry or there is None else there
        for n, (x, counts, known) in enumerate(use.columns(self.valid)):
            self.padded |= not known
            other = counterparts[n] if n < len(counterparts) and counterparts[n].shape == x.shape else None
            first, entries = use.entry or (0, len(x))
            shape = (max([entries, *self.total.shape[:1]]), x.shape[1], x.shape[1])
            if self.total.shape != shape:
                self.total = self.total.to(x.device, torch.float64).expand(shape).clone()
            total = self.total[first : first + 1] if use.entry else self.total
            if other is None:
                self.drift = None
            elif self.drift is not None and self.drift.shape != shape:
                self.drift = torch.zeros_like(self.total)
            with torch.autocast(x.device.type, enabled=False):
                for part in x.split(1 << 14, dim=2):  # float32 within a part, float64 between them
                    total += part @ part.transpose(1, 2)
                if self.drift is not None and other is not None:
                    away = other - x
                    self.apart += away.square().sum(dtype=torch.float64).item()
                    for part, off in zip(x.split(1 << 14, dim=2), away.split(1 << 14, dim=2), strict=True):
                        self.drift += off @ part.transpose(1, 2)
            after = entries - first - len(counts) if use.entry else 0
            self.counts = self.counts + torch.tensor([*[0] * first, *counts, *[0] * after])

    def moments(self) -> Moments | None:
        """Their mean, over all processes; ``lookup`` and ``padded`` then count them all, too. None if there was no
        input, as an expert has that is called with none of the tokens.

        Raises:
            BitfrontError: an input was not finite.
        """
        self._share()
        if not self.counts.any():
            return None
        apart = self.apart / (self.total.diagonal(dim1=1, dim2=2).sum().item() or 1.0)
        if apart > 1:
            self.drift = None  # these are other samples, or nothing is left of them
        if not all(torch.isfinite(x).all() for x in (self.total, self.drift) if x is not None):
            raise BitfrontError(
                f"the calibration inputs of '{self.name}' hold NaN or infinity, or numbers whose squares overflow "
                "(1e19 and above); check the data and the float network"
            )
        counts = self.counts.max().expand(len(self.counts)) if self.common else self.counts.clamp_min(1)
        self.total /= counts.to(self.total)[:, None, None]  # of wide layers, large
        idle = (self.counts == 0).to(self.total.device)
        if self.common and idle.any():  # for which any error is as good as another
            self.idle, diagonal = int(idle.sum()), self.total.diagonal(dim1=1, dim2=2)
            diagonal += idle[:, None] * (UNSEEN * diagonal.mean() or 1.0)
        drift = None if self.drift is None else self.drift / counts.to(self.drift)[:, None, None]
        return Moments(self.total, int(self.counts.max()), self.form or NATURAL, drift, apart)

    def _share(self) -> None:
        told = (self.lookup, self.padded, self.common, self.drift is not None, self.apart)
        known = gathered((self.total.shape, self.counts.shape, *told))
        totals, counts, lookups, paddeds, commons, paired, aparts = zip(*known, strict=True)
        self.apart = sum(aparts)
        self.lookup, self.padded, self.common = any(lookups), any(paddeds), any(commons)
        # Where the layer was not come to, the shape is not known.
        self.total = summed(self.total.double().expand(max(totals, key=lambda shape: (len(shape), shape))))
        self.counts = summed(self.counts.expand(max(counts, key=lambda shape: (len(shape), shape))))
        if self.drift is not None:
            self.drift = summed(self.drift.double().expand_as(self.total)) if all(paired) else None
