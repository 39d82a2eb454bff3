"""Finished blocks of a calibration on disk, so that an interrupted one goes on. A state belongs to method, settings,
network and data: the folder is named by a fingerprint of all four.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bitfront.errors import BitfrontError, first_line
from bitfront.quant.artifact import write_atomically
from bitfront.quant.core import Method
from bitfront.quant.plan import Calibration

PLAIN = (str, int, float, complex, torch.dtype, torch.device, torch.layout, torch.memory_format)
NAMED = (type, FunctionType, BuiltinFunctionType)


class States:
    """The states of one calibration.

    Args:
        folder: of all calibrations that keep their states there.
        network: before any of its blocks is quantized, in evaluation mode.
        method, data: of the calibration.

    Raises:
        BitfrontError: the data hold what cannot be told from other data.
    """

    @torch.no_grad()
    def __init__(self, folder: Path, network: nn.Module, method: Method, data: Calibration) -> None:
        valid = [data.valid(batch) for batch in data.batches]
        # What a forward does is code, in which no fingerprint sees a change; its result tells.
        result = [t for t in tree_leaves(data.forward(network, data.batches[0])) if isinstance(t, Tensor)]
        self.folder = folder / fingerprint(
            network.state_dict(), result, method, data.batches, valid, data.blocks, data.seed
        )

    def save(self, n: int, state: dict[str, Any]) -> None:
        """Keep the n-th block's.

        Raises:
            BitfrontError: the disk is full or the place is not writable.
        """
        content = io.BytesIO()
        torch.save(state, content)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BitfrontError(
                f"cannot make '{self.folder}' ({error.strerror}); make room and run the same command"
            ) from None
        write_atomically(self._path(n), content.getvalue())

    def load(self, n: int) -> dict[str, Any] | None:
        """The n-th block's, if there is one.

        Raises:
            BitfrontError: it is damaged.
        """
        path = self._path(n)
        if not path.is_file():
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if {"packed", "norms", "layers", "block"} <= state.keys():
                return state
            error: Any = "something is missing"
        except (OSError, RuntimeError, EOFError, LookupError, AttributeError, ValueError, pickle.UnpicklingError) as e:
            error = e
        raise BitfrontError(f"'{path}' is damaged ({error}); delete it and run again")

    def _path(self, n: int) -> Path:
        return self.folder / f"{n:04}.pt"


def fingerprint(*parts: Any) -> str:
    """16 digits that differ where tensors (by type, shape and bits), containers, settings or other objects do.

    Raises:
        BitfrontError: an object keeps to itself what it is made of.
    """
    digest = hashlib.blake2b(digest_size=8)
    entered: dict[int, Any] = {}  # objects, which may refer to each other

    def enter(x: Any) -> None:
        digest.update(type(x).__qualname__.encode())
        if isinstance(x, Tensor) and x.layout is torch.strided:
            digest.update(f"{x.dtype} {list(x.shape)}".encode())
            content: Any = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest.update(content)
        elif isinstance(x, (bytes, bytearray)):
            digest.update(x)
        elif isinstance(x, dict):
            enter([part for item in x.items() for part in item])
        elif isinstance(x, (list, tuple)):
            digest.update(str(len(x)).encode())
            for value in x:
                enter(value)
        elif x is None or isinstance(x, PLAIN):
            digest.update(repr(x).encode())
        elif isinstance(x, NAMED):
            digest.update(f"{x.__module__}.{x.__qualname__}".encode())
        elif id(x) not in entered:
            entered[id(x)] = x
            enter(_made_of(x))

    enter(parts)
    return digest.hexdigest()


def _made_of(x: Any) -> list[Any]:
    """What an object would be rebuilt of by pickle: a class and its arguments, a state, items."""
    try:
        made = x.__reduce_ex__(4)  # of 5, arrays give buffers out of band
    except Exception as error:  # whatever a stranger's class raises
        raise BitfrontError(
            f"states are kept by what the data are, and {type(x).__name__} does not tell ({first_line(error)}); give "
            "batches of tensors, or leave states out"
        ) from None
    if isinstance(made, str):  # the name of a global object
        return [made]
    return [list(part) if isinstance(part, Iterator) else part for part in made]
