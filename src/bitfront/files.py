"""Files that are there whole, or not at all."""

from __future__ import annotations

import errno
import glob
import os
import time
from contextlib import suppress
from pathlib import Path

from bitfront.errors import BitfrontError

STALE = 600.0  # seconds


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file so that readers and crashes see all of it or none of it; what was there stays until then.

    Raises:
        BitfrontError: the disk is full or the place is not writable.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    for left in path.parent.glob(f".{glob.escape(path.name)}.[0-9]*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE:  # of a process that died: none writes for so long
                left.unlink()
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room and run the same command" if full else "give a file in a folder that can be written to"
        raise BitfrontError(f"could not write '{path}' ({error.strerror}); {remedy}") from None


def clear(folder: Path) -> None:
    """Remove what processes have left that died while they wrote there."""
    for left in folder.glob(".*.[0-9]*"):
        with suppress(OSError):
            left.unlink()
