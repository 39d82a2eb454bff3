"""Networks that are larger than the device: their blocks stay in memory, or in files, and come to the device one at a
time, each for as long as it is at work; so do the activations between them.

A block's parameters keep their identity and change their ``data``. What is in no block, and buffers, stay on the
device.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunction
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bitfront.errors import BitfrontError, first_line


class Offload:
    """Of a network; without a place, all of it stays where it is.

    Args:
        network: on the CPU, if there is a place.
        blocks: its modules by name.
        device: to work on.
        place: where what is not at work stays: "cpu", in memory; "disk", in files; "", on the device.
        folder: where files lie; None for the system's place of temporary files. They are gone with the process,
            however it ends.
    """

    def __init__(
        self,
        network: nn.Module,
        blocks: Mapping[str, nn.Module],
        device: torch.device,
        place: str,
        folder: Path | None = None,
    ) -> None:
        self.network, self.blocks = network, blocks if place else {}
        self.device, self.place, self.folder = device, place, folder
        self.away: set[Tensor] = {p for block in self.blocks.values() for p in block.parameters()}
        self.kept: dict[Tensor, Tensor] = {}
        self.wanted: Counter[Tensor] = Counter()

    def stays(self, x: Any) -> Any:
        """What is not at work: a tensor in its place; all else as it is."""
        if not isinstance(x, Tensor) or not self.place:
            return x
        plain = x.layout is torch.strided and not x.is_nested
        there = self.place == "cpu" or not plain or x.untyped_storage().filename is not None
        return x.cpu() if there else mapped(x, self.folder)

    def all_stay(self, tree: Any) -> Any:
        """Likewise of the tensors in containers, as ``replaced`` has it."""
        return replaced(tree, self.stays) if self.place == "disk" else tree

    @contextmanager
    def at_work(self, parameters: Iterable[Tensor]) -> Iterator[None]:
        """Have parameters on the device. What is written to them there is lost, if that is another place."""
        brought: list[Tensor] = []
        try:
            for p in parameters:
                self._bring(p)
                brought.append(p)
            yield
        finally:
            for p in brought:
                self._back(p)

    @contextmanager
    def streamed(self) -> Iterator[None]:
        """Have forwards bring each block, and its inputs, when they come to it. Afterwards the network is on the
        CPU."""
        if not self.place:
            yield
            return
        hooks: list[Any] = []
        try:
            for p in self.away:
                p.data = self.stays(p.data)
            for block in self.blocks.values():
                hooks.append(block.register_forward_pre_hook(self._entered, prepend=True, with_kwargs=True))
                hooks.append(block.register_forward_hook(self._left, always_call=True))
            self._all_others(self.device)
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for p, home in self.kept.items():  # of what an interruption left
                p.data = home
            self.kept.clear()
            self.wanted.clear()
            self._all_others(torch.device("cpu"))

    def reaching(self) -> AbstractContextManager[Any]:
        """Within it, what is used of blocks outside of these, as an embedding that is also the output, is brought for
        as long as that takes. (Not for what reads or writes the parameters themselves.)"""
        return _Reaching(self) if self.place else nullcontext()

    def _all_others(self, device: torch.device) -> None:
        for p in self.network.parameters():
            if p not in self.away:
                p.data = p.data.to(device)
        moved: dict[int, Tensor] = {}  # by the buffer, which modules may share
        for module in self.network.modules():
            for name, b in module._buffers.items():
                module._buffers[name] = None if b is None else moved.setdefault(id(b), b.to(device))

    def _entered(self, block: nn.Module, args: Any, kwargs: Any) -> Any:
        for p in block.parameters():
            self._bring(p)
        with DisableTorchFunction():
            return replaced((args, kwargs), self._moved)

    def _moved(self, x: Tensor) -> Tensor:
        """An input on the device; of a block's own, what uses it brings it."""
        return x if x in self.away else x.to(self.device)

    def _left(self, block: nn.Module, *_: Any) -> None:
        for p in block.parameters():
            self._back(p)

    def _bring(self, p: Tensor) -> None:
        """(While a block is tuned, what stands in the place of its parameters is none of the network's.)"""
        if p in self.away:
            if p not in self.kept:
                with DisableTorchFunction():  # to a ``Watch``, a move is no use of a weight
                    there = p.data.to(self.device, non_blocking=True)
                    self.kept[p], p.data = p.data, there
            self.wanted[p] += 1

    def _back(self, p: Tensor) -> None:
        if p in self.kept:
            self.wanted[p] -= 1
            if not self.wanted[p]:
                with DisableTorchFunction():
                    p.data = self.kept.pop(p)
                del self.wanted[p]


class _Reaching(TorchFunctionMode):
    """Of ``Offload.reaching``."""

    def __init__(self, rest: Offload) -> None:
        super().__init__()
        self.rest = rest

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__deepcopy__:  # whose memo may name all of them
            return func(*args, **kwargs)
        used = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x in self.rest.away]
        with self.rest.at_work(x for x in used if x not in self.rest.kept):
            return func(*args, **kwargs)


def replaced(x: Any, new: Callable[[Tensor], Tensor], seen: dict[int, Any] | None = None) -> Any:
    """What is given with its tensors replaced, in lists and dictionaries in their place, so that whoever has these sees
    what is written to them; what is there twice is replaced by the same."""
    seen = {} if seen is None else seen
    if id(x) in seen:
        return seen[id(x)][1]
    found = x
    seen[id(x)] = x, found
    if isinstance(x, Tensor):
        found = new(x)
    elif type(x) is list:
        x[:] = [replaced(part, new, seen) for part in x]
    elif type(x) is dict:
        for key in x:
            x[key] = replaced(x[key], new, seen)
    elif isinstance(x, tuple):
        parts = [replaced(part, new, seen) for part in x]
        if any(part is not before for part, before in zip(parts, x, strict=True)):
            found = type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    seen[id(x)] = x, found  # with what had the id, which is so no other's
    return found


def mapped(x: Tensor, folder: Path | None = None) -> Tensor:
    """A copy in a file, which the system reads and writes as it is used; the file has no name and lasts as the tensor.

    Args:
        x: strided, any device.
        folder: of the file.

    Raises:
        BitfrontError: the disk is full or the place is not writable.
    """
    if not x.numel():
        return x.cpu()
    nbytes = x.numel() * x.element_size()
    try:
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        file, name = tempfile.mkstemp(prefix=".bitfront", dir=folder)
        try:
            allocate(file, nbytes)
            memory: Any = torch.UntypedStorage.from_file(name, shared=True, nbytes=nbytes)
        finally:
            os.close(file)
            os.unlink(name)
    except (OSError, RuntimeError) as error:
        raise BitfrontError(
            f"offload=disk cannot write to '{folder or tempfile.gettempdir()}' ({first_line(error)}); make room there, "
            + ("or give another folder" if folder else "or set TMPDIR to another folder")
        ) from None
    return torch.empty(0, dtype=x.dtype).set_(memory).view(x.shape).copy_(x.detach())


def allocate(file: int, nbytes: int) -> None:
    """Give a file its room now, where the system can: a page that later finds none would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, nbytes)
    else:
        os.ftruncate(file, nbytes)
