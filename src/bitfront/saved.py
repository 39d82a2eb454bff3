"""Files that ``torch.save`` has written. Their bytes are verified before they are read: torch does not notice rotten
ones, and would go on with other numbers."""

from __future__ import annotations

import errno
import os
import pickle
import sys
import zipfile
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch

from bitfront.errors import BitfrontError, first_line
from bitfront.processes import rank


class DamagedError(BitfrontError):
    """A file is not as it was written, or holds more than tensors and plain values."""


def load_saved(path: Path) -> Any:
    """The content of a file, on the CPU.

    Raises:
        DamagedError: with the reason.
        BitfrontError: the machine cannot read it now, whatever is in it.
    """
    try:
        if zipfile.is_zipfile(path):
            _verify(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise DamagedError(f"'{path}' is damaged, or holds more than tensors, which could run any code") from None
    except Exception as error:  # a file may come from anyone, and readers raise whatever it makes them stumble over
        seeks = isinstance(error, OSError) and error.errno == errno.EINVAL  # where a damaged file sends them
        if isinstance(error, (MemoryError, OSError)) and not seeks:
            raise BitfrontError(
                f"'{path}' cannot be read ({first_line(error)}); free memory, or see to the disk"
            ) from None
        raise DamagedError(f"'{path}' cannot be read ({first_line(error)})") from None


def resume(path: Path, keys: Set[str]) -> dict[str, Any] | None:
    """What an interrupted run goes on from, if there is anything; what is damaged is set aside, which is said, so that
    the run goes on from the state before it.

    Args:
        path: of the state.
        keys: that it must have.

    Raises:
        BitfrontError: the machine cannot read it now; it stays.
    """
    if not path.is_file():
        return None
    try:
        state = load_saved(path)
        if isinstance(state, dict) and keys <= state.keys():
            return state
        raise DamagedError(f"'{path}' is of something else")
    except DamagedError as error:
        if rank() == 0:
            aside = path.with_name(f"{path.name}.damaged")
            os.replace(path, aside)
            sys.stderr.write(f"{error}; it is '{aside.name}' now, and the run goes on from the state before it\n")
        return None


def _verify(path: Path) -> None:
    """Refuse a zip file whose entries are not those that their checksums are of, or are compressed, which torch's are
    not, so that they can hold more than the file is long."""
    with zipfile.ZipFile(path) as file:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()):
            raise ValueError("its entries are compressed")
        if rotten := file.testzip():
            raise ValueError(f"the checksum of its entry '{rotten}' differs")
