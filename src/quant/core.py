"""A quantized model is a function ``y = f(x; Q(w))``: the float network ``f`` stays untouched, one small
``Quantizer`` per weight tensor turns the float weight into what the network sees.

A training-time method writes a ``Quantizer`` and a ``Trained`` dataclass that makes one per tensor; a
post-training method a ``PostTraining`` dataclass (``calibration.py``) whose ``solve`` returns the packed tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import is_parametrized

from src.artifact import Artifact
from src.errors import BitfrontError
from src.packed import MAX_BITS, Packed, middle_code

MB = 2**20  # bytes; the papers' penalties are per MB of this size


class Quantizer(nn.Module):
    """How one weight tensor is quantized: ``surrogate`` is what training sees, ``encode`` what the disk sees."""

    def surrogate(self, w: Tensor) -> Tensor:
        """The weight that the network sees in training, float32 of ``w``'s shape, differentiable."""
        raise NotImplementedError

    def encode(self, w: Tensor) -> Packed:
        """The tensor as it is stored."""
        raise NotImplementedError

    def bits(self) -> Tensor:
        """Stored bits by the papers' size rule; differentiable in training mode, exact in evaluation mode."""
        raise NotImplementedError

    def forward(self, w: Tensor) -> Tensor:
        """The weight that the network sees: ``surrogate`` in training mode, else exactly what is stored."""
        if self.training:
            return self.surrogate(w.float()).to(w.dtype)
        with torch.no_grad():
            return self.encode(w).decode().to(w.dtype)


class Frozen(Quantizer):
    """The result of a post-training method: the codes stay as they were solved, and are part of the state.

    Args:
        packed: with one width for all codes if trainable.
        trainable: learn the values that the codes stand for, as decoupleQ's block-wise and fine-tuning stages do. The
            parameters are ``gain`` (the distance of neighbours) and ``shift`` (the middle value).
        relative: both in units of the distance at the start, so that one learning rate fits every tensor; else they are
            the paper's s and z.
        symmetric: the values stay where they are relative to each other and to 0: no ``shift``.
    """

    def __init__(self, packed: Packed, trainable: bool = False, symmetric: bool = False, relative: bool = True) -> None:
        super().__init__()
        self.shape = packed.shape
        for name in ("codes", "bits", "lo", "span"):
            self.register_buffer(f"packed_{name}", getattr(packed, name))
        self.levels, self.middle = (1 << int(packed.bits.max())) - 1, middle_code(int(packed.bits.max()))
        self.gain = self.shift = None
        if trainable:
            distance = packed.span.float() / self.levels
            self.register_buffer("unit", torch.where((distance == 0) | (not relative), 1.0, distance))
            self.gain = nn.Parameter(distance / self.get_buffer("unit"))
            middle = packed.lo.float() / self.get_buffer("unit") + self.gain.detach() * self.middle
            self.shift = nn.Parameter(middle, requires_grad=not symmetric)

    @property
    def packed(self) -> Packed:
        codes, bits, lo, span = (self.get_buffer(f"packed_{name}") for name in ("codes", "bits", "lo", "span"))
        if self.gain is not None:
            learned, dtype = self._learned(), lo.dtype
            lo, span = learned[0].detach().to(dtype), learned[1].detach().to(dtype)
        return Packed(codes, bits, lo, span, self.shape)

    def _learned(self) -> tuple[Tensor, Tensor]:
        assert self.gain is not None and self.shift is not None
        unit = self.get_buffer("unit")
        return unit * (self.shift - self.gain * self.middle), unit * self.gain * self.levels

    def values(self) -> Tensor:
        """The weight, float32, differentiable in what is learned."""
        if self.gain is None:
            return self.packed.decode()
        codes, bits = self.get_buffer("packed_codes"), self.get_buffer("packed_bits")
        return Packed(codes, bits, *self._learned(), self.shape).decode()

    def surrogate(self, w: Tensor) -> Tensor:
        return self.values()

    def encode(self, w: Tensor) -> Packed:
        return self.packed

    def bits(self) -> Tensor:
        return torch.tensor(float(self.packed.rule_bits()))


class QuantizedModel(nn.Module):
    """A float network seen through the quantizers of its weights.

    Args:
        network: any module; its parameters keep their names, tied weights stay tied.
        quantizers: by the first name of each quantized parameter, as ``eligible`` gives them.

    Raises:
        BitfrontError: activation checkpointing is on, which recomputes the forward with the float weights and would
            give wrong gradients without a word; or a weight is computed from others (weight norm), so that not the
            weight itself would be quantized.
    """

    def __init__(self, network: nn.Module, quantizers: Mapping[str, Quantizer]) -> None:
        super().__init__()
        check_quantizable(network, quantizers)
        self.network = network
        self.names = list(quantizers)
        self.quantizers = nn.ModuleList(quantizers.values())
        self.log: dict[str, Any] = {}  # how a post-training method fared, for the record
        self._cached: dict[str, Tensor] | None = None
        self._cached_at: list[int] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.network, self.weights(), args, kwargs)

    def items(self) -> Iterator[tuple[str, Quantizer, nn.Parameter]]:
        """Name, quantizer and float weight of every quantized tensor."""
        for name, quantizer in zip(self.names, self.quantizers, strict=True):
            assert isinstance(quantizer, Quantizer)
            yield name, quantizer, self.network.get_parameter(name)

    def weights(self) -> dict[str, Tensor]:
        """What the network sees, by name. In evaluation mode computed once, until the weights may have changed."""
        if self.training:
            return {name: quantizer(w) for name, quantizer, w in self.items()}
        versions = [t._version for t in (*self.parameters(), *self.quantizers.buffers())]
        if self._cached is None or self._cached_at != versions:
            check_finite(self.network)
            self._cached = {name: quantizer(w) for name, quantizer, w in self.items()}
            self._cached_at = versions
        return self._cached

    def megabytes(self) -> Tensor:
        """Model size in MB by the papers' rule: small parameters in their own type, no buffers, tied tensors once.

        Differentiable in training mode; in evaluation mode with the whole widths that are on disk.
        """
        quantized = set(self.names)
        parameters = self.network.named_parameters()
        small = sum(8 * p.numel() * p.itemsize for name, p in parameters if name not in quantized)
        return (sum(quantizer.bits() for _, quantizer, _ in self.items()) + torch.tensor(float(small))) / (8 * MB)

    @torch.no_grad()
    def encode(self) -> dict[str, Packed]:
        """Every quantized tensor as it is stored.

        Raises:
            BitfrontError: a weight is not finite.
        """
        check_finite(self.network)
        return {name: quantizer.encode(w) for name, quantizer, w in self.items()}

    def widths(self) -> dict[str, list[int]]:
        """By quantized tensor, how many of its stored weights have 0, 1, 2, ... bits."""
        return {name: packed.width_counts() for name, packed in self.encode().items()}

    def artifact(self, about: Mapping[str, Any]) -> Artifact:
        """The whole network as it is stored, with its provenance."""
        return Artifact.of(self.network, self.encode(), about)

    def save(self, path: Path, about: Mapping[str, Any]) -> int:
        """Write the artifact; return its size in bytes."""
        return self.artifact(about).save(path)

    def train(self, mode: bool = True) -> QuantizedModel:
        _refuse_checkpointing(self.network)
        self._cached = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> QuantizedModel:
        self._cached = None
        return super()._apply(*args, **kwargs)


def check_quantizable(network: nn.Module, names: Iterable[str]) -> None:
    """Refuse activation checkpointing, and weights that are computed from others, as ``QuantizedModel`` says."""
    _refuse_checkpointing(network)
    for name in names:
        module = network.get_submodule(name.rpartition(".")[0])
        if is_parametrized(module) or name.endswith(("_g", "_v", "_orig")):
            raise BitfrontError(
                f"{type(module).__name__} computes its weight from '{name}' (weight norm or the like); remove the "
                "parametrization first, so that the weight itself is quantized"
            )


def check_finite(network: nn.Module) -> None:
    """Refuse weights that are not finite."""
    for name, p in network.named_parameters():
        if p.numel() and not torch.isfinite(torch.stack(torch.aminmax(p.detach()))).all():
            raise BitfrontError(f"'{name}' holds NaN or infinity; lower train.lr and train again")


def _refuse_checkpointing(network: nn.Module) -> None:
    for module in network.modules():
        if getattr(module, "grad_checkpointing", False) or getattr(module, "gradient_checkpointing", False):
            raise BitfrontError(
                f"{type(module).__name__} has activation checkpointing switched on, which recomputes with unquantized "
                "weights and gives wrong gradients; switch it off"
            )


def eligible(network: nn.Module, min_size: float = 0.01, exclude: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """The parameters that are quantized, by their first name and in the network's order.

    Args:
        network: any module.
        min_size: in MB of float32; only larger tensors are quantized, whatever their layer.
        exclude: patterns (``*``, ``?``) of full or last names. A tied tensor is left out if any of its names matches.
    """
    names: dict[int, list[str]] = {}
    for name, p in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    excluded = {
        key
        for key, known in names.items()
        for name in known
        if any(fnmatchcase(name, e) or fnmatchcase(name.rpartition(".")[2], e) for e in exclude)
    }
    return {
        name: p
        for name, p in network.named_parameters()
        if p.is_floating_point() and p.numel() > int(min_size * MB) // 4 and id(p) not in excluded
    }


@dataclass(kw_only=True)
class Method:
    """A quantization method with its hyper-parameters. Every method quantizes the same tensors (``eligible``).

    Attributes:
        min_size, exclude: as in ``eligible``.
        layers: other settings for the tensors whose name matches a pattern, ``{"head.*": {"bits": 8}}``; where several
            match, what comes later overrides.
        reestimate_bn: measure the statistics of batch norms anew in the end, with the quantized weights.
        penalty: what a MB costs in units of the loss; only methods that learn their size can set it.
        trains: whether there is a training stage.
        after_training: whether it needs trained weights and calibration data.
        per_layer: what ``layers`` can set.
    """

    min_size: float = 0.01
    exclude: list[str] = field(default_factory=list)
    layers: dict[str, dict[str, Any]] | None = None
    reestimate_bn: bool | None = None
    penalty: float = field(default=0.0, init=False)
    trains: ClassVar[bool] = True
    after_training: ClassVar[bool] = False
    per_layer: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check(self.min_size >= 0, f"min_size is in MB and not negative, got {self.min_size}")
        check(self.penalty >= 0, f"penalty is loss per MB and not negative, got {self.penalty}")
        for pattern, settings in (self.layers or {}).items():
            for key, value in settings.items():
                known = ", ".join(self.per_layer) or "nothing"
                check(key in self.per_layer, f"layers sets {known} for this method, not '{key}' ('{pattern}')")
                usual = type(getattr(self, key))
                fits = type(value) is usual or (usual is float and type(value) is int)
                check(fits, f"layers: {key} is of type {usual.__name__}, got '{value}' ('{pattern}')")
            replace(self, layers=None, **settings)  # refuses what is out of range

    def of(self, name: str) -> Self:
        """This method with the settings that ``layers`` gives for a tensor."""
        settings: dict[str, Any] = {}
        for pattern, some in (self.layers or {}).items():
            settings |= some if fnmatchcase(name, pattern) else {}
        return replace(self, layers=None, **settings) if settings else self

    def fitting(self, network: nn.Module) -> Self:
        """This method without settings for tensors that the network, made small for a smoke run, does not have."""
        names = eligible(network, self.min_size, self.exclude)
        layers = self.layers or {}
        kept = {pattern: some for pattern, some in layers.items() if any(fnmatchcase(name, pattern) for name in names)}
        return replace(self, layers=kept)

    def attach(self, network: nn.Module) -> QuantizedModel:
        """Wrap a network whose weights are the starting point."""
        return QuantizedModel(network, self.quantizers(network))

    def quantizers(self, network: nn.Module) -> dict[str, Quantizer]:
        """One quantizer per eligible tensor; none means a float model."""
        return {}

    def eligible(self, network: nn.Module) -> dict[str, nn.Parameter]:
        """The tensors to quantize.

        Raises:
            BitfrontError: a pattern of ``layers`` matches none of them.
        """
        weights = eligible(network, self.min_size, self.exclude)
        for pattern in self.layers or ():
            check(
                any(fnmatchcase(name, pattern) for name in weights),
                f"layers: no quantized tensor matches '{pattern}'; there are {', '.join(weights)}",
            )
        return weights

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer | None:
        """The quantizers' own optimizer, stepped beside the network's with a constant learning rate.

        None trains the quantizers' parameters in the network's optimizer.
        """
        return None


@dataclass(kw_only=True)
class Float(Method):
    """No quantization: the baseline, in the same file format."""


@dataclass(kw_only=True)
class Trained(Method):
    """A method that trains through its quantizers."""

    def quantizer(self, w: Tensor) -> Quantizer:
        """The quantizer of one tensor; may take its initial state from ``w``."""
        raise NotImplementedError

    def quantizers(self, network: nn.Module) -> dict[str, Quantizer]:
        return {name: self.of(name).quantizer(w) for name, w in self.eligible(network).items()}


@dataclass(kw_only=True)
class FixedBits(Method):
    """What methods with one width for all weights share.

    Attributes:
        bits: 1..15.
        group_size: weights that share a range or step: n consecutive ones, -1 a row, 0 the whole tensor.
    """

    bits: int = 4
    group_size: int = 0
    per_layer: ClassVar[tuple[str, ...]] = ("bits", "group_size")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(isinstance(self.bits, int), f"bits is a whole number, got {self.bits}")
        check(1 <= self.bits <= MAX_BITS, f"bits is 1..{MAX_BITS}, got {self.bits}")
        check_group_size(self.group_size)


def check(holds: bool, message: str) -> None:
    """Refuse a hyper-parameter.

    Raises:
        BitfrontError: with the message.
    """
    if not holds:
        raise BitfrontError(message)


def check_group_size(group_size: int) -> None:
    """Refuse group sizes that cannot be stored."""
    check(isinstance(group_size, int) and group_size >= -1, f"group_size is n, 0 or -1, got {group_size}")
