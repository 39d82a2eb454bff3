"""Files of the user's that are read whole once, before anything is trained on them: what is cut off, broken or not
finite shows in time nowhere else. Starts without torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bitfront.data.identified import Seen
from bitfront.progress import Bar


def faults(paths: Sequence[Path], fault: Callable[[Path], str], folder: Path, memory: Path) -> dict[Path, str]:
    """Of the files that are not as they should be, their names and why, for a message.

    Args:
        paths: of the files.
        fault: what is wrong with one, "" for nothing; called in several threads.
        folder: that they are in.
        memory: of its splits, see ``folders.memory``; beside it is kept what has been read, and need not be again.
    """
    seen = Seen(folder, memory.with_name(f"read-{memory.name}"))
    found = {path: seen.of(path) for path in paths}
    new = [path for path, known in found.items() if known is None]
    try:
        with ThreadPoolExecutor() as threads:
            told = Bar(threads.map(fault, new), total=len(new), desc="reading the data once", unit="file")
            found |= {path: seen.add(path, why) for path, why in zip(new, told, strict=True)}
    finally:
        seen.keep()
    return {path: f"'{path}' ({why})" for path, why in found.items() if why}
