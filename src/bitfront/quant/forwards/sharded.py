"""Parameters of which each process has a part (torch's FSDP, tensor parallelism).

A quantizer needs the whole weight: its range, its groups. ``fully_shard`` of a quantized model as one gives it that:
the weights are whole from the forward to the end of the backward; in between they, their gradients and the optimizer's
state are in parts. Where modules within are sharded by themselves, theirs come together after the quantizers have
looked, and in the place of what these gave: refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bitfront.errors import BitfrontError

REMEDY = (
    "shard the prepared model as one, torch.distributed.fsdp.fully_shard(model), none of its modules by itself, or use "
    "DistributedDataParallel"
)
FSDP1 = "_fsdp_wrapped_module"  # the name of what it wraps


def in_parts(t: Tensor) -> bool:
    """Whether this process has only a part: it is a ``DTensor``, whose module few programs load."""
    return hasattr(t, "full_tensor")


def full(t: Tensor) -> Tensor:
    """The tensor that this process has a part of; all must come to it."""
    whole: Tensor = t.full_tensor() if in_parts(t) else t  # type: ignore[attr-defined]
    return whole


def check_whole(network: nn.Module) -> None:
    """Refuse a network that is sharded before it is quantized.

    Raises:
        BitfrontError: with the remedy.
    """
    for name, p in network.named_parameters():
        if in_parts(p) or FSDP1 in name:
            raise BitfrontError(
                f"'{name}' is sharded, and quantizers need whole weights; quantize or prepare the network before that; "
                f"to train, {REMEDY}"
            )


def parameter(network: nn.Module, name: str) -> nn.Parameter:
    """A weight as a whole.

    Raises:
        BitfrontError: there is only a part of it.
    """
    try:
        p = network.get_parameter(name)
    except AttributeError:  # FSDP's first version takes them out of their modules
        p = None
    if p is None or in_parts(p):
        raise BitfrontError(f"'{name}' is not there as a whole, as its quantizer needs it; {REMEDY}")
    return p


def check_come_together(parameters: Iterable[Tensor]) -> None:
    """Refuse to compute with parts.

    Raises:
        BitfrontError: with when they are whole.
    """
    if any(map(in_parts, parameters)):
        raise BitfrontError("fully_shard has the widths in parts before a forward; call penalty() after the model")


@contextmanager
def whole(network: nn.Module) -> Iterator[None]:
    """Within it, parameters are whole, as copies to be read; all processes must come to it."""
    modules = list(network.modules())
    parts = [(m, key, p) for m in modules for key, p in m._parameters.items() if p is not None and in_parts(p)]
    with torch.no_grad():
        copies = {id(p): nn.Parameter(full(p), p.requires_grad) for _, _, p in parts}
    for module, key, p in parts:
        module._parameters[key] = copies[id(p)]
    try:
        yield
    finally:
        for module, key, p in parts:
            module._parameters[key] = p
