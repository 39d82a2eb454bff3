"""A quantized model is a function ``y = f(x; Q(w))``: the float network ``f`` stays untouched, one small ``Quantizer``
per weight tensor turns the float weight into what the network sees.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import is_parametrized

from bitfront.errors import BitfrontError
from bitfront.quant.artifact import Artifact
from bitfront.quant.packed import Packed

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
