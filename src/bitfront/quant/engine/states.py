"""Finished blocks of a calibration on disk, so that an interrupted one goes on. A state belongs to method, settings,
network and data: the folder is named by a fingerprint of all four.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from bitfront.errors import BitfrontError, first_line
from bitfront.files import write_atomically
from bitfront.quant.core import Method
from bitfront.quant.engine.blockwise import floats
from bitfront.quant.engine.plan import Calibration
from bitfront.quant.forwards.captured import copied
from bitfront.quant.forwards.together import gathered, of_first, place
from bitfront.quant.forwards.undisturbed import undisturbed
from bitfront.saved import resume

PLAIN = (str, int, float, complex, torch.dtype, torch.device, torch.layout, torch.memory_format)
NAMED = (type, FunctionType, BuiltinFunctionType)


def _told(x: Tensor) -> tuple[Any, ...]:
    """What an output is, but for its last digits, which depend on the number of threads: power, and a projection."""
    x = x.detach().double().cpu().flatten()
    signs = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    norm = x.norm().item()
    return f"{norm:.4g}", f"{(x @ signs.double()).item() / (norm or 1.0):.3f}"


class States:
    """The states of one calibration, of which only process 0 reads and writes files.

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
        with undisturbed(network), torch.random.fork_rng():
            torch.manual_seed(0)
            result = [_told(t) for batch in data.batches[:1] for t in floats(data.forward(network, batch))]
            if data.loss and getattr(method, "feels_the_end", False):
                seeded = torch.Generator().manual_seed(0)
                result += [_told(data.loss(network, copied(batch), seeded)) for batch in data.batches[:1]]
        own = fingerprint(network.state_dict(), result, method, data.batches, valid, data.blocks, data.seed)
        everyone = gathered(own)
        self.folder = folder / (own if len(everyone) == 1 else fingerprint(*everyone))

    def save(self, n: int, state: dict[str, Any]) -> None:
        """Keep the n-th block's.

        Raises:
            BitfrontError: the disk is full or the place is not writable.
        """
        if place()[0] > 0:
            return
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
        """The n-th block's, if there is one, as ``resume``."""
        return of_first(lambda: resume(self._path(n), {"packed", "norms", "layers", "block"}))

    def _path(self, n: int) -> Path:
        return self.folder / f"{n:04}.pt"


def fingerprint(*parts: Any) -> str:
    """16 digits that differ where tensors (by type, shape and bits), containers, settings or other objects do.

    Raises:
        BitfrontError: an object keeps to itself what it is made of.
    """
    digest = hashlib.blake2b(digest_size=8)
    entered: dict[int, tuple[int, Any]] = {}  # number and object, as they may refer to each other

    def enter(x: Any) -> None:
        digest.update(type(x).__qualname__.encode())
        if isinstance(x, Tensor) and x.layout is torch.strided and not x.is_nested:
            digest.update(f"{x.dtype} {list(x.shape)}".encode())
            content: Any = x.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
            digest.update(content.view(torch.uint8).numpy())
        elif isinstance(x, (bytes, bytearray)):
            digest.update(str(len(x)).encode() + b" " + x)
        elif isinstance(x, tuple):  # equal ones may be one, or not
            digest.update(str(len(x)).encode())
            for part in x:
                enter(part)
        elif x is None or isinstance(x, PLAIN):
            digest.update(repr(x).encode())
        elif isinstance(x, NAMED):
            digest.update(f"{x.__module__}.{x.__qualname__}".encode())
        elif id(x) in entered:
            digest.update(str(entered[id(x)][0]).encode())
        else:
            entered[id(x)] = len(entered), x
            parts = _made_of(x)
            digest.update(str(len(parts)).encode())
            for part in parts:
                enter(part)

    enter(parts)
    return digest.hexdigest()


def _made_of(x: Any) -> list[Any]:
    """What is in a container; of others, what pickle would rebuild them of: a class, arguments, a state, items."""
    if isinstance(x, list):
        return list(x)
    if isinstance(x, Tensor) and x.is_nested:
        return list(x.unbind())
    if isinstance(x, dict):
        return [part for item in x.items() for part in item]
    if isinstance(x, (set, frozenset)):  # in whose order no two processes agree
        return sorted(fingerprint(part) for part in x)
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
