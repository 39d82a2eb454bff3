"""A forward that sees other tensors than the network has. Of a module that the network has under two names, torch's own
(2.11) sets each tensor twice, and what it then puts back is the other tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bitfront.errors import BitfrontError, first_line

Places = Mapping[str, list[str]]


def places(network: nn.Module) -> Places:
    """By the first name of each parameter and buffer, the names of all places that hold it; of a module only one."""
    first: dict[int, str] = {}
    found: dict[str, list[str]] = {}
    for prefix, module in network.named_modules():
        own = (module.named_parameters, module.named_buffers)
        for key, tensor in (pair for named in own for pair in named(recurse=False, remove_duplicate=False)):
            name = f"{prefix}.{key}" if prefix else key
            found.setdefault(first.setdefault(id(tensor), name), []).append(name)
    return found


def call(network: nn.Module, values: Mapping[str, Tensor], at: Places, args: Any, kwargs: Any) -> Any:
    """What the network gives where it sees ``values``, by the first names of its tensors, ``at`` being its places."""
    everywhere = {place: value for name, value in values.items() for place in at[name]}
    return functional_call(network, everywhere, args, kwargs, tie_weights=False)


@contextmanager
def needing_gradients(who: str, without: str) -> Iterator[None]:
    """Backward passes, of which a forward that writes over what its gradient needs has none.

    Args:
        who: of whom the error is to speak.
        without: the settings that do without.

    Raises:
        BitfrontError: there are no gradients.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise BitfrontError(f"{who} has no gradients ({first_line(error)}); give {without}") from None


@contextmanager
def differentiable(network: nn.Module) -> Iterator[None]:
    """Forwards in evaluation mode that have gradients, also of recurrent layers, of which cuDNN has none."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in network.modules())
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled and not recurrent):
        yield
