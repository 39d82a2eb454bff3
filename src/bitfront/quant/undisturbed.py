"""Forwards that leave a network as it was: many write into it, counters, hidden states, running statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def undisturbed(network: nn.Module) -> Iterator[None]:
    """Afterwards each module is in the mode that it was in, and its buffers and attributes hold what they did, lists
    and dictionaries included. Parameters keep what was written to them; hooks of the user's run, and keep what they do.
    """
    attributes = [(vars(module), dict(vars(module))) for module in network.modules()]
    contents = [(x, x.copy()) for _, own in attributes for name, x in own.items() if _container(name, x)]
    buffers = [
        (module._buffers, name, b, b.clone())
        for module in network.modules()
        for name, b in module._buffers.items()
        if b is not None
    ]
    try:
        yield
    finally:
        for now, before in attributes:
            for name in now.keys() - before.keys():
                del now[name]
            now.update(before)
        for x, content in contents:
            x.clear()
            (x.extend if isinstance(x, list) else x.update)(content)
        for place, name, buffer, content in buffers:
            place[name] = buffer
            _restore(buffer, content)


def _container(name: str, x: Any) -> bool:
    return type(x) in (list, dict) and not name.startswith("_")  # torch's own


@torch.no_grad()
def _restore(buffer: Tensor, content: Tensor) -> None:
    """In its place, as others may be views of it."""
    if buffer.shape != content.shape or buffer.dtype != content.dtype or buffer.device != content.device:
        buffer.data = content
    elif not torch.equal(buffer, content):
        buffer.copy_(content)
