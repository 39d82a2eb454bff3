"""What the readers of a user's own folders share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from bitfront.data.folders import split_folders, split_of
from bitfront.errors import BitfrontError

RARE = 0.01  # share of the samples that may have a fault


def by_split(folder: Path, names: Iterable[str]) -> dict[str, list[str]]:
    """The splits that samples have by the folder that they are in: all are of train where no folder is named so.

    Args:
        folder: of the data.
        names: of the samples, relative to it.

    Raises:
        BitfrontError: two folders are for one split, or beside them are samples in none.
    """
    roots = split_folders(folder)
    if "train" not in roots:
        return {"train": list(names)}
    found: dict[str, list[str]] = {split: [] for split in roots}
    for name in names:
        split = split_of(name.partition("/")[0])
        if split is None:
            raise BitfrontError(f"'{folder / name}' is in none of {', '.join(map(str, roots.values()))}; move it there")
        found[split].append(name)
    return found


def utf8(path: Path) -> str:
    """A text, without a mark of its byte order.

    Raises:
        BitfrontError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BitfrontError(f"'{path}' is not UTF-8 at byte {error.start}; convert it, as with iconv") from None
    except OSError as error:
        raise BitfrontError(f"could not read '{path}' ({error.strerror})") from None


def few(odd: Sequence[str], total: int, fault: str, then: str = "left out") -> list[str]:
    """A note on the samples that have a fault, if there are any.

    Args:
        odd: what each is, for the message.
        total: samples.
        fault: as "audio files have no transcript".
        then: what is done with them.

    Raises:
        BitfrontError: they are more than a few.
    """
    about = f"{len(odd)} of {total} {fault}" + (f", as {odd[0]}" if odd else "")
    if len(odd) > RARE * total:
        raise BitfrontError(f"{about}; that is more than {RARE:.0%}")
    return [f"{about}; {then}"] if odd else []
