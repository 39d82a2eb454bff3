"""Finished blocks of a calibration on disk, so that an interrupted one goes on. A state belongs to method, settings,
network and data: the folder is named by a fingerprint of all four.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitfront.errors import BitfrontError
from bitfront.quant.artifact import write_atomically
from bitfront.quant.core import Method
from bitfront.quant.plan import Calibration


class States:
    """The states of one calibration.

    Args:
        folder: of all calibrations that keep their states there.
        network: before any of its blocks is quantized.
        method, data: of the calibration.
    """

    def __init__(self, folder: Path, network: nn.Module, method: Method, data: Calibration) -> None:
        self.folder = folder / fingerprint(network.state_dict(), method, data.batches, data.blocks, data.seed)

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
    """16 digits that differ where tensors (by type, shape and bits), containers or settings do."""
    digest = hashlib.blake2b(digest_size=8)
    entered: set[int] = set()  # objects, which may refer to each other

    def enter(x: Any) -> None:
        digest.update(type(x).__qualname__.encode())
        if isinstance(x, Tensor):
            digest.update(f"{x.dtype} {list(x.shape)}".encode())
            content: Any = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest.update(content)
        elif isinstance(x, dict):
            digest.update(str(len(x)).encode())
            for key, value in x.items():
                enter(key)
                enter(value)
        elif isinstance(x, (list, tuple)):
            digest.update(str(len(x)).encode())
            for value in x:
                enter(value)
        elif hasattr(x, "__dict__") and not callable(x):
            if id(x) not in entered:
                entered.add(id(x))
                enter(vars(x))
        elif callable(x):
            digest.update(getattr(x, "__qualname__", "").encode())
        else:
            digest.update(repr(x).encode())

    enter(parts)
    return digest.hexdigest()
