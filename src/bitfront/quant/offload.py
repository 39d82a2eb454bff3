"""Networks that are larger than the device: their blocks stay in memory, or in files, and come to the device one at a
time, each for as long as it is at work; so do the activations between them.

A block's parameters keep their identity and change their ``data``. What is in no block, and buffers, stay on the
device.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunction
from torch.utils._pytree import tree_map

from bitfront.errors import BitfrontError


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
        self.away = {p for block in self.blocks.values() for p in block.parameters()}
        self.kept: dict[nn.Parameter, Tensor] = {}
        self.wanted: Counter[nn.Parameter] = Counter()

    def stays(self, x: Any) -> Any:
        """What is not at work: a tensor in its place; all else as it is."""
        if not isinstance(x, Tensor) or not self.place:
            return x
        there = self.place == "cpu" or x.untyped_storage().filename is not None
        return x.cpu() if there else mapped(x, self.folder)

    def all_stay(self, tree: Any) -> Any:
        """Likewise of the tensors in containers."""
        return tree_map(self.stays, tree) if self.place == "disk" else tree

    @contextmanager
    def at_work(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Have parameters on the device; what is written to them there is lost."""
        brought = [p for p in parameters if p in self.away]
        for p in brought:
            self._bring(p)
        try:
            yield
        finally:
            for p in brought:
                self._back(p)

    @contextmanager
    def streamed(self) -> Iterator[None]:
        """Have forwards bring each block, and its inputs, when they come to it."""
        if not self.place:
            yield
            return
        for p in self.away:
            p.data = self.stays(p.data)
        hooks: list[Any] = []
        for block in self.blocks.values():
            hooks.append(block.register_forward_pre_hook(self._entered, prepend=True, with_kwargs=True))
            hooks.append(block.register_forward_hook(self._left, always_call=True))
        self._all_others(self.device)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._all_others(torch.device("cpu"))

    def _all_others(self, device: torch.device) -> None:
        for p in self.network.parameters():
            if p not in self.away:
                p.data = p.data.to(device)
        for module in self.network.modules():
            for name, b in module._buffers.items():
                module._buffers[name] = None if b is None else b.to(device)

    def _entered(self, block: nn.Module, args: Any, kwargs: Any) -> Any:
        with DisableTorchFunction():  # to a ``Watch``, a move is no use of a weight
            for p in block.parameters():
                self._bring(p)
        return tree_map(lambda x: x.to(self.device) if isinstance(x, Tensor) else x, (args, kwargs))

    def _left(self, block: nn.Module, *_: Any) -> None:
        with DisableTorchFunction():
            for p in block.parameters():
                self._back(p)

    def _bring(self, p: nn.Parameter) -> None:
        if not self.wanted[p]:
            self.kept[p], p.data = p.data, p.data.to(self.device, non_blocking=True)
        self.wanted[p] += 1

    def _back(self, p: nn.Parameter) -> None:
        self.wanted[p] -= 1
        if not self.wanted[p]:
            p.data = self.kept.pop(p)


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
    try:
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        file, name = tempfile.mkstemp(prefix=".bitfront", dir=folder)
        try:
            os.posix_fallocate(file, 0, x.numel() * x.element_size())  # a page that has no room would kill the process
            memory: Any = torch.UntypedStorage.from_file(name, shared=True, nbytes=x.numel() * x.element_size())
        finally:
            os.close(file)
            os.unlink(name)
    except OSError as error:
        where = folder or tempfile.gettempdir()
        raise BitfrontError(
            f"offload=disk cannot write to '{where}' ({error.strerror}); make room there, or set TMPDIR"
        ) from None
    return torch.empty(0, dtype=x.dtype).set_(memory).view(x.shape).copy_(x.detach())
