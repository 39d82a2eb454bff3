"""Forwards that leave a network as it was: many write into it, counters, hidden states, running statistics."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

OURS = vars(nn.Module()).keys()  # what every module has


@contextmanager
def undisturbed(network: nn.Module) -> Iterator[None]:
    """Afterwards each module is in the mode that it was in, and has the buffers and attributes that it had, with what
    was in them: numbers, tensors, and lists, dictionaries, sets and queues of such. Parameters keep what was written to
    them; hooks of the user's run, and objects of other classes keep what was done to them.
    """
    modules = [module for module in network.modules() if not isinstance(module, torch.jit.ScriptModule)]
    parts = [part for module in modules for part in (vars(module), module._buffers, module._non_persistent_buffers_set)]
    kept = [(part, part.copy()) for part in parts]
    undo: list[Callable[[], None]] = []
    seen: set[int] = set()
    for module in modules:
        for x in (*module._buffers.values(), *(x for name, x in vars(module).items() if name not in OURS)):
            _remember(x, undo, seen)
    try:
        yield
    finally:
        for part, before in kept:
            _refill(part, before)
        for restore in undo:
            restore()


def _remember(x: Any, undo: list[Callable[[], None]], seen: set[int]) -> None:
    """Append what puts the content of an attribute back in its place."""
    if id(x) in seen:
        return
    seen.add(id(x))
    if isinstance(x, Tensor) and not isinstance(x, nn.Parameter):
        content = x.detach().clone()
        undo.append(lambda: _restore(x, content))
    elif type(x) in (list, dict, set, deque):
        before = x.copy()
        for part in x.values() if isinstance(x, dict) else x:
            _remember(part, undo, seen)
        undo.append(lambda: _refill(x, before))
    elif type(x) is tuple:
        for part in x:
            _remember(part, undo, seen)


def _refill(x: Any, before: Any) -> None:
    """The same container, with what it held."""
    x.clear()
    (x.extend if isinstance(x, (list, deque)) else x.update)(before)


@torch.no_grad()
def _restore(x: Tensor, content: Tensor) -> None:
    """In its place, as others may be views of it."""
    if x.shape != content.shape or x.dtype != content.dtype or x.device != content.device:
        x.data = content
    elif x.layout != torch.strided or not torch.equal(x, content):
        x.copy_(content)
