"""A user's own data: where they lie, and which part is for what. Starts without torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bitfront.errors import BitfrontError
from bitfront.files import write_atomically
from bitfront.theirs import FOLDER

SPLITS = ("train", "valid", "test")
NAMES = {
    **{"train": "train", "training": "train"},
    **{"valid": "valid", "val": "valid", "validation": "valid", "dev": "valid"},
    **{"test": "test", "testing": "test"},
}
HIDDEN = (".", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found", "Thumbs.db", "desktop.ini")  # beginnings of names


def find(data: str, data_root: str, option: str = "data=") -> Path:
    """The folder or file that a user means.

    Args:
        data: relative to the working directory, or to ``data_root``.
        data_root: folder of the data sets.
        option: that has it, for messages.

    Raises:
        BitfrontError: it is in neither place.
    """
    places = [Path(data).expanduser(), Path(data_root) / data]
    for place in places:
        if place.exists():
            return place
    raise BitfrontError(
        f"there is no {option}{data}: neither '{places[0].absolute()}' nor '{places[1].absolute()}' is there"
    )


def first(names: Sequence[str], data_root: str, option: str) -> Path:
    """The first of some folders or files that is there.

    Raises:
        BitfrontError: none is.
    """
    for name in names[:-1]:
        with suppress(BitfrontError):
            return find(name, data_root, option)
    return find(names[-1], data_root, option)


def network(name: str, data_root: str) -> str:
    """The name of a network, with the place of one that transformers has saved as ``find`` finds it.

    Raises:
        BitfrontError: there is none.
    """
    if not name.startswith(FOLDER):
        return name
    return FOLDER + str(find(name.removeprefix(FOLDER), data_root, f"model={FOLDER}"))


def unsplit(data: str, data_root: str) -> bool:
    """Whether data of the user's have no part for validation or test, so that these are made of them.

    Raises:
        BitfrontError: there are no such data.
    """
    place = find(data, data_root)
    parts = place.iterdir() if place.is_dir() else ()
    return not any(split_of(part.stem if part.is_file() else part.name) in ("valid", "test") for part in parts)


def split_of(name: str) -> str | None:
    """The split that a folder, or a file without its ending, is named after; None if it is no such name."""
    return NAMES.get(name.lower())


def split_folders(folder: Path) -> dict[str, Path]:
    """The subfolders that are splits, in the order of ``SPLITS``; empty if there are none.

    Raises:
        BitfrontError: two are for the same split.
    """
    return _by_split(path for path in folder.iterdir() if path.is_dir())


def split_files(folder: Path, suffixes: Collection[str]) -> dict[str, Path]:
    """Likewise the files, as ``train.txt``.

    Args:
        folder: that has them.
        suffixes: in lower case, as ".txt".
    """
    return _by_split(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in suffixes)


def _by_split(paths: Any) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(paths):
        split = split_of(path.stem if path.is_file() else path.name)
        if split in found:
            raise BitfrontError(f"'{found[split]}' and '{path}' are both for {split}; rename or move one of them")
        if split:
            found[split] = path
    return {split: found[split] for split in SPLITS if split in found}


def files(folder: Path, suffixes: Collection[str] = ()) -> list[Path]:
    """All files below a folder that are not hidden, in the order of their names; links are followed. What systems put
    into people's folders counts as hidden.

    Args:
        folder: of the data.
        suffixes: in lower case, as ".png"; none for any.

    Raises:
        BitfrontError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise BitfrontError(f"could not read '{error.filename}' ({error.strerror})")

    found: list[str] = []
    seen: set[str] = set()
    for place, below, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        below[:] = [] if real in seen else [name for name in below if not name.startswith(HIDDEN)]
        if real not in seen:
            chosen = (name for name in names if not suffixes or os.path.splitext(name)[1].lower() in suffixes)
            found += [os.path.join(place, name) for name in chosen if not name.startswith(HIDDEN)]
        seen.add(real)
    return [Path(path) for path in sorted(found) if os.path.isfile(path)]


def completed(
    given: Mapping[str, Sequence[str]], memory: Path, groups: Mapping[str, str] | None = None
) -> dict[str, list[str]]:
    """All three splits of data that may have splits of their own.

    Train alone is split in three. Where only valid is missing, it is a tenth of train; where only test is missing, the
    user's valid becomes test, as ImageNet's is used, and valid is a tenth of train, so that test data choose nothing.

    Args:
        given: names by split; at least "train".
        memory, groups: as in ``splits``.

    Raises:
        BitfrontError: there is no training data, or as in ``splits``.
    """
    if empty := [split for split in {"train": None, **given} if not given.get(split)]:
        raise BitfrontError(f"there is nothing in {empty[0]}; train is needed, valid and test are made of it without")
    if len(given) == 1:
        return splits(given["train"], memory, groups)
    if len(given) == 3:
        return {split: sorted(given[split]) for split in SPLITS}
    return {**held_out(given["train"], memory, groups), "test": sorted(given.get("test", given.get("valid", [])))}


def labelled(
    folder: Path, suffixes: Collection[str], memory: Path
) -> tuple[list[str], dict[str, list[tuple[Path, int]]]]:
    """Files whose folders say their class: ``<class>/*`` or ``{train,valid,test}/<class>/*``; ``completed`` makes what
    is missing.

    Args:
        folder: that has them.
        suffixes: of the files, in lower case.
        memory: as in ``splits``.

    Returns:
        The classes, sorted; by split, the files and the number of each one's class.

    Raises:
        BitfrontError: the layout is another one, a class is empty or unknown in training, or there is only one.
    """
    roots = _roots(folder)
    found = {split: {path.name: files(path, suffixes) for path in _below(root)} for split, root in roots.items()}
    classes = sorted(found.get("train", {}))
    if len(classes) < 2:
        raise BitfrontError(
            f"'{roots.get('train', folder)}' has {len(classes)} class folders, and two are needed; expected "
            f"{folder}/<class>/* or {folder}/{{train,valid,test}}/<class>/*"
        )
    for split, by_class in found.items():
        if unknown := sorted(by_class.keys() - set(classes)):
            raise BitfrontError(f"'{roots[split] / unknown[0]}' is of a class that train has not: {', '.join(classes)}")
        if empty := [label for label, paths in by_class.items() if not paths]:
            raise BitfrontError(f"'{roots[split] / empty[0]}' holds no file of {' '.join(sorted(suffixes))}")
    label = {p.relative_to(folder).as_posix(): c for part in found.values() for c, paths in part.items() for p in paths}
    given = {
        s: [p.relative_to(folder).as_posix() for paths in part.values() for p in paths] for s, part in found.items()
    }
    parts = completed(given, memory, label)
    return classes, {s: [(folder / name, classes.index(label[name])) for name in names] for s, names in parts.items()}


def _roots(folder: Path) -> dict[str, Path]:
    """By split, the folder that has its classes."""
    if not folder.is_dir():
        raise BitfrontError(f"'{folder}' is no folder")
    roots = split_folders(folder)
    others = [path for path in _below(folder) if path not in roots.values()]
    if not roots or (others and not _below(roots.get("train", folder / "train"))):  # a class may be named train
        return {"train": folder}
    if others:
        raise BitfrontError(f"'{others[0]}' is no split; classes belong below {', '.join(map(str, roots.values()))}")
    return roots


def _below(folder: Path) -> list[Path]:
    """The folders in a folder that are not hidden, sorted."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(HIDDEN))


def splits(names: Sequence[str], memory: Path, groups: Mapping[str, str] | None = None) -> dict[str, list[str]]:
    """Train, valid and test of data without splits, made once and remembered.

    Of a group, in the order of a hash of the names, the first tenth (rounded up) is test and the next valid; one of
    fewer than three is all train. Later a name keeps its split, and one that is new to a known group has it by its hash
    alone, so that the splits stay as data are added.

    Args:
        names: of the samples, the same wherever the data lie.
        memory: file that remembers, see ``memory``.
        groups: of each name, as its class; None for one group.

    Returns:
        Names by split, sorted.

    Raises:
        BitfrontError: there are too few names, or the memory is damaged or cannot be written.
    """
    return _remembered(names, memory, groups, ("test", "valid"))


def held_out(names: Sequence[str], memory: Path, groups: Mapping[str, str] | None = None) -> dict[str, list[str]]:
    """Train and valid of training data whose test data are apart, likewise."""
    return _remembered(names, memory, groups, ("valid",))


def _remembered(
    names: Sequence[str], memory: Path, groups: Mapping[str, str] | None, tenths: Sequence[str]
) -> dict[str, list[str]]:
    told = recall(memory)
    known = {name: told[name] for name in names if told.get(name) in (*tenths, "train")}
    parts = defaultdict(list)
    for name in names:
        parts[groups[name] if groups else ""].append(name)
    chosen: dict[str, str] = {}
    for part in parts.values():
        if any(name in known for name in part):
            chosen |= {name: known.get(name) or _by_hash(name, tenths) for name in part}
        else:
            chosen |= _ranked(part, tenths)
    found = {split: sorted(n for n in names if chosen[n] == split) for split in SPLITS if split in (*tenths, "train")}
    if empty := [split for split, part in found.items() if not part]:
        raise BitfrontError(
            f"{len(names)} samples in {len(parts)} groups leave none for {empty[0]}; add some (three of a group), or "
            "make folders named train, valid and test"
        )
    if chosen.items() - told.items():
        try:
            remember(memory, told | chosen)
        except (OSError, BitfrontError) as error:
            raise BitfrontError(
                f"could not write '{memory}', which remembers the splits ({error}); give another place with "
                "data_root=<folder>"
            ) from None
    return found


def _ranked(names: Sequence[str], tenths: Sequence[str]) -> dict[str, str]:
    size = -(-len(names) // 10) if len(names) > 2 else 0
    order = sorted(names, key=_hash)
    return {name: tenths[n // size] if n < size * len(tenths) else "train" for n, name in enumerate(order)}


def _by_hash(name: str, tenths: Sequence[str]) -> str:
    at = int(_hash(name) * 10)
    return tenths[at] if at < len(tenths) else "train"


def _hash(name: str) -> float:
    """Of a name, evenly over 0..1."""
    return int.from_bytes(hashlib.sha1(name.encode(errors="surrogateescape")).digest()[:7]) / 256**7


def memory(data_root: str, folder: Path, kind: str) -> Path:
    """The file that remembers the splits of a folder, hidden, as that may be ``data_root`` itself.

    Args:
        data_root: folder of the data sets.
        folder: of the user's data.
        kind: of the task, as "images": another one may split them by other names.
    """
    return Path(data_root) / ".splits" / f"{kind}-{named(folder)}.json"


def named(path: Path) -> str:
    """A name for a path, wherever one works."""
    real = path.resolve()
    return f"{real.name}-{hashlib.sha1(str(real).encode(errors='surrogateescape')).hexdigest()[:8]}"


def recall(path: Path) -> dict[str, Any]:
    """A mapping in a json file; empty if there is none.

    Raises:
        BitfrontError: it is damaged.
    """
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise BitfrontError(f"'{path}' cannot be read ({error}); delete it") from None
    if not isinstance(found, dict):
        raise BitfrontError(f"'{path}' is damaged; delete it")
    return found


def remember(path: Path, content: Mapping[str, Any]) -> None:
    """Write such a file.

    Raises:
        OSError, BitfrontError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=0))
