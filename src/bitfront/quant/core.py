"""What every quantization method is: a dataclass of hyper-parameters that wraps a network into a ``QuantizedModel``.

A training-time method writes a ``Quantizer`` and a ``Trained`` dataclass that makes one per tensor; a post-training
method a ``PostTraining`` dataclass (``calibration.py``) whose ``solve`` returns the packed tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from bitfront.errors import BitfrontError
from bitfront.quant.model import QuantizedModel, Quantizer, eligible
from bitfront.quant.steered import Steering
from bitfront.quant.storage.packed import Packed
from bitfront.ranges import Ranges, of, refuse

WIDTHS = range(1, 9)  # among which max_size chooses


@dataclass(kw_only=True)
class Method:
    """A quantization method with its hyper-parameters. Every method quantizes the same tensors (``eligible``).

    Attributes:
        min_size, exclude, include: as in ``eligible``.
        layers: other settings for the tensors whose name matches a pattern, ``{"head.*": {"bits": 8}}``; where several
            match, what comes later overrides.
        max_size: MiB that the file may have, 0 for any; widths are chosen for it.
        raw_dtype: in which float32 tensors that are not quantized are stored: "float32", "float16" or "bfloat16".
        reestimate_bn: measure the statistics of batch norms anew in the end, with the quantized weights.
        penalty: what a MB costs in units of the loss; only methods that learn their size can set it.
        per_layer: what ``layers`` can set.
    """

    min_size: float = 0.01
    exclude: list[str] = field(default_factory=list)
    include: list[str] = field(default_factory=list)
    layers: dict[str, dict[str, Any]] | None = None
    max_size: float = 0.0
    raw_dtype: str = "float32"
    reestimate_bn: bool = False
    penalty: float = field(default=0.0, init=False)
    per_layer: ClassVar[tuple[str, ...]] = ()
    ranges: ClassVar[Ranges] = {
        "min_size": "[0, 1e6]",
        "max_size": "[0, inf)",
        "raw_dtype": ("float32", "float16", "bfloat16"),
        "penalty": "[0, 1e6]",
    }  # subclasses have those that they add

    def __post_init__(self) -> None:
        refuse(vars(self), of(type(self)))
        for pattern, settings in (self.layers or {}).items():
            for key, value in settings.items():
                known = ", ".join(self.per_layer) or "nothing"
                check(key in self.per_layer, f"layers sets {known} for this method, not '{key}' ('{pattern}')")
                usual = type(getattr(self, key))
                fits = type(value) is usual or (usual is float and type(value) is int)
                check(fits, f"layers: {key} is of type {usual.__name__}, got '{value}' ('{pattern}')")
            replace(self, layers=None, **settings)  # refuses what is out of range

    def settings(self, name: str) -> dict[str, Any]:
        """What ``layers`` gives for a tensor."""
        settings: dict[str, Any] = {}
        for pattern, some in (self.layers or {}).items():
            settings |= some if fnmatchcase(name, pattern) else {}
        return settings

    def of(self, name: str) -> Self:
        """This method with the settings of a tensor."""
        settings = self.settings(name)
        return replace(self, layers=None, **settings) if settings else self

    def fitting(self, network: nn.Module) -> Self:
        """This method without settings for tensors that the network, made small for a smoke run, does not have."""
        names = eligible(network, self.min_size, self.exclude, self.include)
        layers = self.layers or {}
        kept = {pattern: some for pattern, some in layers.items() if any(fnmatchcase(name, pattern) for name in names)}
        return replace(self, layers=kept)

    def attach(self, network: nn.Module) -> QuantizedModel:
        """Wrap a network whose weights are the starting point."""
        return QuantizedModel(network, self.quantizers(network), self)

    def quantizers(self, network: nn.Module) -> dict[str, Quantizer]:
        """One quantizer per eligible tensor; none means a float model."""
        return {}

    def eligible(self, network: nn.Module) -> dict[str, nn.Parameter]:
        """The tensors to quantize.

        Raises:
            BitfrontError: a pattern of ``layers`` matches none of them.
        """
        weights = eligible(network, self.min_size, self.exclude, self.include)
        for pattern in self.layers or ():
            check(
                any(fnmatchcase(name, pattern) for name in weights),
                f"layers: no quantized tensor matches '{pattern}'; there are {', '.join(weights)}",
            )
        return weights

    @property
    def steered(self) -> bool:
        """Whether training needs ``steering``."""
        return self.max_size > 0

    def steering(self, model: QuantizedModel, about: Mapping[str, Any]) -> Steering | None:
        """What brings a model that trains to ``max_size``, where widths are learned, and says when these are whole."""
        return None

    def remarks(self, packed: Mapping[str, Packed]) -> list[str]:
        """What a user should know of the stored tensors, a line each."""
        return []

    def optimizer(self, parameters: list[nn.Parameter], steps: int = 0) -> torch.optim.Optimizer | None:
        """The quantizers' own optimizer, stepped beside the network's with a constant learning rate.

        None trains the quantizers' parameters in the network's optimizer.

        Args:
            parameters: of the quantizers.
            steps: of the whole training, where there is ``steering``.
        """
        return None


@dataclass(kw_only=True)
class Float(Method):
    """No quantization: the baseline, in the same file format."""


@dataclass(kw_only=True)
class Distilled(Method):
    """A method whose training can follow the float network.

    Attributes:
        distill: share of the float network's answers in what is trained on; the rest are labels.
    """

    distill: float = 0.0
    ranges: ClassVar[Ranges] = {"distill": "[0, 1]"}


@dataclass(kw_only=True)
class Trained(Distilled):
    """A method that trains through its quantizers."""

    def quantizer(self, w: Tensor) -> Quantizer:
        """The quantizer of one tensor; may take its initial state from ``w``."""
        raise NotImplementedError

    def quantizers(self, network: nn.Module) -> dict[str, Quantizer]:
        quantizers: dict[str, Quantizer] = {}
        for name, w in self.eligible(network).items():
            method = self.of(name)
            quantizers[name] = method.quantizer(w)
            quantizers[name].settings |= {key: getattr(method, key) for key in self.per_layer}
        return quantizers


@dataclass(kw_only=True)
class Sampled(Method):
    """A method that looks at data, beside those that it may be trained on.

    Attributes:
        samples: of the training data.
        batch_size: in which they come.
    """

    samples: int = 1024
    batch_size: int = 32
    ranges: ClassVar[Ranges] = {"samples": "1..", "batch_size": "1.."}

    def computed_in(self, device: torch.device) -> torch.dtype:
        """That products are computed in on a device where gradients say what counts."""
        return torch.float32


@dataclass(kw_only=True)
class FixedBits(Sampled):
    """What methods with one width for a tensor share. The samples are what widths for ``max_size`` are tried on.

    Attributes:
        bits: 1..15.
        group_size: weights that share a range or step: n consecutive ones, -1 a row, 0 the whole tensor.
        scale_dtype: in which these are stored: "float32", "float16" or "bfloat16"; float32 for a tensor whose values
            that would move.
    """

    bits: int = 4
    group_size: int = 0
    scale_dtype: str = "float32"
    per_layer: ClassVar[tuple[str, ...]] = ("bits", "group_size", "scale_dtype")
    ranges: ClassVar[Ranges] = {
        "bits": "1..15",
        "group_size": "-1..",
        "scale_dtype": ("float32", "float16", "bfloat16"),
    }

    @property
    def steered(self) -> bool:
        return False  # widths are there before training

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored scales."""
        return getattr(torch, self.scale_dtype)

    def forms(self, w: Tensor) -> list[dict[str, Any]]:
        """Settings besides ``bits`` among which ``max_size`` chooses for a tensor; those that it has come first."""
        return [{}]

    def remarks(self, packed: Mapping[str, Packed]) -> list[str]:
        wider = [name for name, p in packed.items() if not p.table and p.lo.dtype != self.of(name).dtype]
        told = [f"{self.scale_dtype} would move the values of {', '.join(wider)}: float32 scales"] if wider else []
        if self.max_size and min((int(p.bits.min()) for p in packed.values()), default=0) >= WIDTHS[-1]:
            told.append(f"max_size={self.max_size:g} leaves room: all tensors have {WIDTHS[-1]} bits, its widest")
        return told


def check(holds: bool, message: str) -> None:
    """Refuse a hyper-parameter.

    Raises:
        BitfrontError: with the message.
    """
    if not holds:
        raise BitfrontError(message)
