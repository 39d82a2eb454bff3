"""What identifies data wherever they lie, and what has been found out about their files. Starts without torch."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from bitfront.data.folders import files, named, recall, remember
from bitfront.errors import BitfrontError

YOUNG = 2e9  # nanoseconds: a file this young may change again without another time, so it is read again
LOOKED_AT, BEGINNING = 100, 1 << 16  # files of a data set, and bytes of each, that tell it from another


def fingerprint(path: Path, data_root: str) -> str:
    """What identifies data wherever they lie: a hash of the names, sizes and contents of all files not hidden, of a
    single file of its content.

    Args:
        path: a folder or a file.
        data_root: folder of the data sets, where the contents' hashes are kept, so that the next call is quick, if it
            can be written.

    Raises:
        BitfrontError: there is no file, or one cannot be read.
    """
    path = path.absolute()
    found = [path] if path.is_file() else files(path)
    if not found:
        raise BitfrontError(f"there is no file in '{path}'")
    seen = Seen(path, Path(data_root) / ".fingerprints" / f"{named(path)}.json")
    total = hashlib.blake2b(digest_size=8)
    for file in found:
        try:
            digest = seen.of(file)
            if digest is None:
                digest = seen.add(file, _content(file))
            total.update(json.dumps([seen.name(file).replace(os.sep, "/"), file.stat().st_size, digest]).encode())
        except OSError as error:
            raise BitfrontError(f"could not read '{file}' ({error.strerror})") from None
    seen.keep()
    return total.hexdigest()


class Seen:
    """What has been found out about the contents of files, which counts while their sizes and times stay.

    Args:
        folder: that the files are in; or the one file.
        memory: where it is kept, if that can be written.
    """

    def __init__(self, folder: Path, memory: Path) -> None:
        self._start, self._memory = len(str(folder.absolute())) + 1, memory
        try:
            self._known = recall(memory)
        except BitfrontError:
            self._known = {}
        self._states: dict[str, list[int]] = {}
        self._kept: dict[str, list[Any]] = {}

    def name(self, file: Path) -> str:
        """Of a file, in the folder."""
        return str(file.absolute())[self._start :]

    def of(self, file: Path) -> Any:
        """What is known of a file; None for nothing.

        Raises:
            OSError: the file is not there.
        """
        name, stat = self.name(file), file.stat()
        state, entry = [stat.st_size, stat.st_mtime_ns], self._known.get(name)
        self._states[name] = state
        if not isinstance(entry, list) or len(entry) != 3 or entry[:2] != state:
            return None
        return self.add(file, entry[2])

    def add(self, file: Path, found: Any) -> Any:
        """Keep what was found out about a file since it was asked for."""
        name = self.name(file)
        if time.time_ns() - self._states[name][1] > YOUNG:
            self._kept[name] = [*self._states[name], found]
        return found

    def keep(self) -> None:
        """Write it down."""
        if self._kept != self._known:
            with suppress(OSError, BitfrontError):
                remember(self._memory, self._kept)


def outline(path: Path) -> str:
    """What tells a data set from another of its name without reading all of it: a hash of its files' names, and of the
    sizes and beginnings of some.

    Args:
        path: of the folder.

    Raises:
        BitfrontError: a file cannot be read.
    """
    found, total = files(path), hashlib.blake2b(digest_size=8)
    total.update(json.dumps([file.relative_to(path).as_posix() for file in found]).encode(errors="surrogateescape"))
    for file in found[:: -(-len(found) // LOOKED_AT) or 1]:
        try:
            with open(file, "rb") as content:
                total.update(json.dumps(file.stat().st_size).encode() + content.read(BEGINNING))
        except OSError as error:
            raise BitfrontError(f"could not read '{file}' ({error.strerror})") from None
    return total.hexdigest()


def _content(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
