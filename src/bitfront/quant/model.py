"""A quantized model is a function ``y = f(x; Q(w))``: the float network ``f`` stays untouched, one small ``Quantizer``
per weight tensor turns the float weight into what the network sees.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from bitfront.errors import BitfrontError
from bitfront.quant.forwards.functional import call, places
from bitfront.quant.forwards.parametrized import parametrized
from bitfront.quant.forwards.refused import Uses, no_recomputation, refuse_recomputation, refuse_switch, unwritten
from bitfront.quant.forwards.sharded import check_come_together, check_whole, full, in_parts, parameter, whole
from bitfront.quant.optimizer import Joint
from bitfront.quant.steered import Steering
from bitfront.quant.storage.artifact import Artifact, narrowable, narrowed
from bitfront.quant.storage.packed import Packed
from bitfront.quant.summary import summary

BEFORE = {"scale_dtype": "float32", "scale_bits": 0}  # what settings were before there was a choice
MB = 2**20  # bytes; the papers' penalties are per MB of this size


class Quantizer(nn.Module):
    """How one weight tensor is quantized: ``surrogate`` is what training sees, ``encode`` what the disk sees.

    Attributes:
        settings: what the meaning of its state depends on, plain JSON; a state dict of other settings is refused.
        fixed: whether the result is there already, and the float weight has no say.
    """

    def __init__(self) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {}
        self.fixed = False

    def surrogate(self, w: Tensor) -> Tensor:
        """The weight that the network sees in training, float32 of ``w``'s shape, differentiable."""
        raise NotImplementedError

    def encode(self, w: Tensor) -> Packed:
        """The tensor as it is stored."""
        raise NotImplementedError

    def bits(self) -> Tensor:
        """Stored bits by the papers' size rule; differentiable in training mode, exact in evaluation mode."""
        raise NotImplementedError

    def get_extra_state(self) -> Tensor:
        """The settings, as bytes."""
        return torch.frombuffer(bytearray(json.dumps(self.settings).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse a state of other settings.

        Raises:
            BitfrontError: with what differs.
        """
        theirs, ours = (json.loads(bytes(x.tolist())) for x in (state, self.get_extra_state()))
        theirs = {key: value for key, value in BEFORE.items() if key in ours} | theirs
        if theirs != ours:
            differing = [
                f"{key}={theirs.get(key)} there, {ours.get(key)} here"
                for key in {**theirs, **ours}
                if theirs.get(key) != ours.get(key)
            ]
            raise BitfrontError(f"the state is of a quantizer of other settings: {', '.join(differing)}")

    def sources(self, w: Tensor) -> Iterator[Tensor]:
        """What the stored tensor depends on; what else does must be a buffer, or evaluation does not see a change."""
        yield w.new_empty(0) if self.fixed else w  # of a fixed one's, type and place
        yield from self.parameters()
        yield from self.buffers()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        """Its numbers, as scales, go to other devices with the network, but keep their types: the file's."""

        def moved(t: Tensor) -> Tensor:
            new = fn(t)
            return new if new.dtype == t.dtype else t.to(new.device)

        return super()._apply(moved, recurse)

    def forward(self, w: Tensor) -> Tensor:
        """The weight that the network sees: ``surrogate`` in training mode, else exactly what is stored."""
        if self.training:
            return self.surrogate(w.float()).to(w.dtype)
        with torch.no_grad():
            return self.encode(w).decode().to(w.dtype)


class Objective(Protocol):
    """Of a method: its say in the training."""

    min_size: float
    include: list[str]
    max_size: float
    raw_dtype: str
    penalty: float

    def optimizer(self, parameters: list[nn.Parameter], steps: int = 0) -> torch.optim.Optimizer | None:
        """The quantizers' own, or None."""

    def steering(self, model: Any, about: Mapping[str, Any]) -> Steering | None:
        """What brings learned widths to ``max_size``."""

    def remarks(self, packed: Mapping[str, Packed]) -> list[str]:
        """What a user should know of the stored tensors."""


class QuantizedModel(nn.Module):
    """A float network seen through the quantizers of its weights.

    Args:
        network: any module; its parameters keep their names, tied weights stay tied.
        quantizers: by the first name of each quantized parameter, as ``eligible`` gives them.
        method: that made them; ``penalty`` and ``optimizer`` are its.

    Raises:
        BitfrontError: a weight is computed from others (weight norm), so that not the weight itself would be quantized,
            used by a TorchScript, or sharded (``sharded`` says what may be); the network is quantized already; and,
            here or in the first forward that trains, what ``refused`` says: activation checkpointing, and weights
            that are used past their modules.
    """

    def __init__(
        self, network: nn.Module, quantizers: Mapping[str, Quantizer], method: Objective | None = None
    ) -> None:
        super().__init__()
        if any(isinstance(module, QuantizedModel) for module in network.modules()):
            raise BitfrontError("the network is quantized already; give the float network, model.network")
        check_quantizable(network, quantizers)
        self.network, self.method = network, method
        self.names = list(quantizers)
        for name, quantizer in quantizers.items():
            quantizer.settings = {"name": name, **quantizer.settings}
        self.quantizers = nn.ModuleList(quantizers.values())
        self.log: dict[str, Any] = {}  # how a post-training method fared, for the record
        self._cached: dict[str, Tensor] = {}
        self._cached_of: list[Tensor] = []
        self._watched, self._places = False, places(network)
        self.steering: Steering | None = None  # of a size that its learned widths are to come to

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        weights = self.weights()
        if not self.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return call(self.network, weights, self._places, args, kwargs)
        apart = {} if self._watched else self._apart(weights)
        with no_recomputation(), Uses(apart) if apart else nullcontext(), unwritten(weights if apart else {}):
            output = call(self.network, weights, self._places, args, kwargs)
        if apart:
            refuse_recomputation(output)
        self._watched = True
        return output

    def _apart(self, weights: Mapping[str, Tensor]) -> dict[int, str]:
        """Names of the float weights, by ``id``, that are others than the network is to see."""
        return {id(w): name for name, quantizer, w in self.items() if not quantizer.fixed and weights[name] is not w}

    def items(self) -> Iterator[tuple[str, Quantizer, nn.Parameter]]:
        """Name, quantizer and float weight of every quantized tensor."""
        for name, quantizer in zip(self.names, self.quantizers, strict=True):
            assert isinstance(quantizer, Quantizer)
            yield name, quantizer, parameter(self.network, name)

    def weights(self) -> dict[str, Tensor]:
        """What the network sees, by name. In evaluation mode computed once, as long as the float weights and the
        quantizers hold the same numbers, whoever writes to them; with it what else is stored in another type."""
        if self.training:
            return {name: quantizer(w) for name, quantizer, w in self.items()}
        return self._evaluated()

    @torch.compiler.disable
    @torch.inference_mode(False)  # else a later forward with gradients could not use what is kept
    @torch.no_grad()
    def _evaluated(self) -> dict[str, Tensor]:
        small = self._narrowed()
        now = [source for _, quantizer, w in self.items() for source in quantizer.sources(w)] + list(small.values())
        before = self._cached_of
        if len(before) != len(now) or not all(_same(a, b) for a, b in zip(now, before, strict=True)):
            check_finite(self.network)
            self._cached = {name: quantizer(w) for name, quantizer, w in self.items()}
            self._cached |= {name: narrowed(t, self.raw_dtype).to(t.dtype) for name, t in small.items()}
            self._cached_of = [t.detach().clone() for t in now]
        return self._cached

    @property
    def raw_dtype(self) -> torch.dtype:
        """In which float32 tensors that are not quantized are stored."""
        return getattr(torch, self.method.raw_dtype) if self.method else torch.float32

    def _narrowed(self) -> dict[str, Tensor]:
        """The tensors that are stored in a narrower type than the network has them in."""
        if self.raw_dtype == torch.float32:
            return {}
        quantized = set(self.names)
        found = {name: t for name, t in narrowable(self.network).items() if name not in quantized}
        if not found.keys() <= self._places.keys():  # a module came later
            self._places = places(self.network)
        return found

    def steer(self, steps: int = 0, about: Mapping[str, Any] | None = None) -> None:
        """Have learned widths come to the method's ``max_size``, and stay where the method then goes on with them.

        Args:
            steps: of the optimizer in the whole training.
            about: what the file will be told, which counts.

        Raises:
            BitfrontError: the method learns no widths.
        """
        steering = self.method.steering(self, about or {}) if self.method else None
        if steering is None:
            raise BitfrontError(f"{type(self.method).__name__} has no widths that max_size= could choose")
        steering.steps = steps
        steering.measure()
        self.steering = steering

    def penalty(self) -> Tensor:
        """What the method adds to the loss for the model's size (DiffQ's penalty times MB): a differentiable scalar."""
        return (self.method.penalty if self.method and self.penalized else 0.0) * self.megabytes()

    @property
    def penalized(self) -> bool:
        """Whether a penalty decides the size."""
        return bool(self.method and self.method.penalty) and not (self.steering and self.steering.limit)

    def optimizer(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None) -> Joint:
        """An optimizer of the weights, joined with the method's own of the quantizers, as ``Joint`` says. Where it has
        none of its own, what its quantizers learn becomes a group of the optimizer given.

        Args:
            optimizer: of the network's parameters; schedules are made of what is returned.
            scaler: of float16 training.

        Raises:
            BitfrontError: the optimizer has parameters of something else.
        """
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        strangers = stepped - {id(p) for p in self.parameters()}
        if strangers:
            raise BitfrontError(
                f"the optimizer has {len(strangers)} parameters that are not the network's; make it of "
                "network.parameters() after bitfront.prepare"
            )
        if self.steering and any(map(in_parts, self.parameters())):
            raise BitfrontError(
                "widths that learn for a part of the training, or for max_size=, cannot be sharded; use "
                "DistributedDataParallel"
            )
        left = [p for p in self.quantizers.parameters() if id(p) not in stepped]
        known = {"steps": self.steering.steps} if self.steering else {}
        own = self.method.optimizer(left, **known) if self.method and left else None
        if left and own is None:
            optimizer.add_param_group({"params": left, "weight_decay": 0.0})
        if self.steering:
            return Joint(optimizer, own, self._prepared, scaler, self.steering.step)
        return Joint(optimizer, own, self._spare_unused, scaler)

    def _prepared(self) -> None:
        assert self.steering
        self.steering.project()
        self._spare_unused()

    def _spare_unused(self) -> None:
        """A layer that a step left out (layer drop) has no say, and the penalty alone would narrow it."""
        if not self.penalized:
            return
        named = zip(self.quantizers, map(self.network.get_parameter, self.names), strict=True)
        parts = [(quantizer, w.grad) for quantizer, w in named if w.requires_grad]
        if not parts:
            return
        used = [torch.zeros((), dtype=torch.bool) if g is None else full(g.any()) for _, g in parts]
        # All at once: a GPU is waited for once, not for each tensor.
        device = next((g.device for _, g in parts if g is not None), torch.device("cpu"))
        for (quantizer, _), moved in zip(parts, torch.stack([u.to(device) for u in used]).tolist(), strict=True):
            if not moved:
                for p in quantizer.parameters():
                    p.grad = None

    def megabytes(self) -> Tensor:
        """Model size in MB by the papers' rule: small parameters in their own type, no buffers, tied tensors once.

        Differentiable in training mode, under ``fully_shard`` after a forward; in evaluation mode with the whole widths
        that are on disk.
        """
        if torch.is_grad_enabled() and self.training:
            check_come_together(self.quantizers.parameters())
            return self._megabytes()
        with whole(self):
            return self._megabytes()

    def _megabytes(self) -> Tensor:
        quantized, quantizers = set(self.names), cast(Iterable[Quantizer], self.quantizers)
        parameters = self.network.named_parameters()
        small = sum(8 * p.numel() * p.itemsize for name, p in parameters if name not in quantized)
        return (sum(quantizer.bits() for quantizer in quantizers) + torch.tensor(float(small))) / (8 * MB)

    @torch.no_grad()
    def encode(self) -> dict[str, Packed]:
        """Every quantized tensor as it is stored; learned widths on their way to a size as whole ones that keep it.

        Raises:
            BitfrontError: a weight is not finite.
        """
        if self.steering and self.training:  # as evaluation mode does
            self.steering.fit()
        with whole(self):
            check_finite(self.network)
            return {name: quantizer.encode(w) for name, quantizer, w in self.items()}

    def widths(self) -> dict[str, list[int]]:
        """By quantized tensor, how many of its stored weights have 0, 1, 2, ... bits."""
        return {name: packed.width_counts() for name, packed in self.encode().items()}

    def artifact(self, about: Mapping[str, Any] | None = None) -> Artifact:
        """The whole network as it is stored, with its provenance, plain JSON."""
        with whole(self):
            return Artifact.of(self.network, self.encode(), about or {}, self.raw_dtype)

    def save(self, path: Path | str, about: Mapping[str, Any] | None = None) -> int:
        """Write the artifact; return its size in bytes.

        Raises:
            BitfrontError: a weight is not finite, the file would be larger than the method's ``max_size``, the disk is
                full or the place is not writable.
        """
        limit = int((self.method.max_size if self.method else 0.0) * MB)
        return self.artifact(about).save(Path(path), limit)

    def summary(self, about: Mapping[str, Any] | None = None) -> str:
        """A table of the tensors: bits, bytes, share of the file and relative loss of the layer's output; below, what
        stays float and why, and what was rounded blind.

        Args:
            about: as the file is saved with, which counts.
        """
        artifact, parameters = self.artifact(about), dict(self.network.named_parameters())
        limit = int((self.method.min_size if self.method else 0.0) * MB) // 4
        included = matching(self.network, self.method.include if self.method else ())

        def reason(name: str) -> str:
            if name not in parameters:
                return "buffers"
            if not parameters[name].is_floating_point():
                return "complex numbers" if parameters[name].is_complex() else "whole numbers"
            if parameters[name].dim() < 2 and id(parameters[name]) not in included:
                return "vectors"
            small = f"at most {limit:,} values, min_size={self.method.min_size if self.method else 0.0:g} MB"
            return "excluded" if parameters[name].numel() > limit else small

        table = summary(artifact, self.log, {name: reason(name) for name in artifact.raw})
        return "\n".join([table, *(self.method.remarks(artifact.packed) if self.method else ())])

    def train(self, mode: bool = True) -> QuantizedModel:
        refuse_switch(self.network)
        super().train(mode)
        if self.steering and not mode:
            self.steering.fit()
        return self


def check_quantizable(network: nn.Module, names: Iterable[str]) -> None:
    """Refuse activation checkpointing, and weights that are computed from others, by a script or in parts, as
    ``QuantizedModel`` says."""
    refuse_switch(network)
    check_whole(network)
    computed = parametrized(network)
    for name in names:
        owner = f".{name}".rpartition(".")[0].partition(".parametrizations")[0].removeprefix(".")
        if isinstance(network.get_submodule(owner), torch.jit.ScriptModule):
            raise BitfrontError(
                f"'{owner}' is a TorchScript, whose use of '{name}' cannot be seen or changed; give the module that it "
                "was made of, or exclude it"
            )
        if owner in computed:
            kind = type(network.get_submodule(owner)).__name__
            raise BitfrontError(
                f"{kind} '{owner}' computes its weight from '{name}' (weight norm or the like); call "
                "bitfront.resolve(network) first, so that the weight itself is quantized"
            )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def check_finite(network: nn.Module) -> None:
    """Refuse weights that are not finite."""
    for name, p in network.named_parameters():
        values = torch.view_as_real(p.detach()) if p.is_complex() else p.detach()
        if p.numel() and not torch.isfinite(torch.stack(torch.aminmax(values))).all():
            raise BitfrontError(f"'{name}' holds NaN or infinity; train again with a lower learning rate (train.lr)")


def eligible(
    network: nn.Module, min_size: float = 0.01, exclude: Sequence[str] = (), include: Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """The parameters that are quantized, by their first name and in the network's order: matrices and what has more
    dimensions. Vectors, the scales and biases of layers and norms, cost little and bear little rounding.

    Args:
        network: any module.
        min_size: in MB of float32; only larger tensors are quantized, whatever their layer.
        exclude: patterns (``*``, ``?``) of full or last names. A tied tensor is left out if any of its names matches.
        include: likewise, of the vectors that are quantized, too.
    """
    excluded, included = matching(network, exclude), matching(network, include)
    return {
        name: p
        for name, p in network.named_parameters()
        if p.is_floating_point()
        and p.numel() > int(min_size * MB) // 4
        and (p.dim() > 1 or id(p) in included)
        and id(p) not in excluded
    }


def matching(network: nn.Module, patterns: Sequence[str]) -> set[int]:
    """The ``id`` of the parameters of which any full or last name matches a pattern."""
    return {
        id(p)
        for name, p in network.named_parameters(remove_duplicate=False)
        if any(fnmatchcase(name, e) or fnmatchcase(name.rpartition(".")[2], e) for e in patterns)
    }
