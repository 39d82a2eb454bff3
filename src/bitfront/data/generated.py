"""What is made once and kept: folders below ``data_root/generated``, whole or not there, checked on every use."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from bitfront.errors import BitfrontError

SUMS = "SHA256SUMS"


def kept(root: Path, name: str, write: Callable[[Path], None]) -> Path:
    """A folder of files that ``write`` makes, if it is not there.

    Args:
        root: of the data sets.
        name: of the folder; another one for another content.
        write: puts files into an empty folder; killed, it leaves nothing behind that passes as whole.

    Raises:
        BitfrontError: a file was changed or is missing, or the folder cannot be written.
    """
    folder = root / "generated" / name
    try:
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as temporary:
                made = Path(temporary) / name
                made.mkdir()
                write(made)
                (made / SUMS).write_text("".join(f"{digest}  {path}\n" for path, digest in checksums(made).items()))
                try:
                    os.replace(made, folder)
                except OSError:
                    if not folder.is_dir():  # else another process was faster
                        raise
        lines = (folder / SUMS).read_text(errors="replace").splitlines()
        recorded = {path: digest for digest, _, path in (line.partition("  ") for line in lines)}
        changed = recorded.items() ^ checksums(folder).items()
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk has a name of its own in each library
        raise BitfrontError(
            f"could not write or read '{folder}' ({error}); delete it, make room, or give another place with "
            "data_root=<folder>"
        ) from None
    if changed:
        raise BitfrontError(f"'{folder / min(changed)[0]}' is not as it was made; delete '{folder}' and run again")
    return folder


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by its path in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
