"""What a file says of its task. It names the task; the configuration of that name is ours, or the user's own, and the
values that the file has are checked against it: nothing of a file decides which code runs, or which place is read but
for the user's own data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from bitfront.cells import compose
from bitfront.cells.check import check_choice, check_type, closest
from bitfront.cells.compose import Config
from bitfront.cells.identity import FINGERPRINT
from bitfront.errors import ArtifactError, BitfrontError

OF_TRAINING = ("batch_size",)  # of which the digits of a metric depend


def recorded(about: Any, where: str, words: Sequence[str] = ()) -> Config:
    """The configuration of the task that a file is for.

    Args:
        about: as the file has it: ``task``, a name; ``config`` with ``task`` and ``train``, values by key; ``smoke``.
        where: the file, for messages.
        words: ``task.<key>=<value>``, for keys that are to differ from the file's.

    Raises:
        ArtifactError: there is no such task or key, or a value of the file is of another type or names a place.
        BitfrontError: a word does not fit.
    """
    about = about if isinstance(about, Mapping) else {}
    task, smoke, values = about.get("task"), about.get("smoke", False), about.get("config", {})
    if not isinstance(task, str) or not isinstance(smoke, bool) or not isinstance(values, Mapping):
        raise ArtifactError(f"'{where}' does not name a task of ours; give task=<name> if it is of one")
    try:
        check_choice("task", task)
        config = compose.load([f"task={task}", f"quant={compose.default('quant')}", f"smoke={str(smoke).lower()}"])
    except BitfrontError as error:
        raise ArtifactError(f"'{where}' is not of a run of ours: {error}") from None
    ours = config.values["task"]
    typed = _typed(words, ours)
    training = {key: config.values["train"][key] for key in OF_TRAINING}
    try:
        told = {key: value for key, value in _mapping("task", values.get("task", {})).items() if key not in typed}
        own = _own_data(told) if FINGERPRINT in ours else {}
        ours |= own | _checked("task", {key: value for key, value in told.items() if key not in own}, ours)
        config.values["train"] |= _checked("train", _mapping("train", values.get("train", {})), training)
    except BitfrontError as error:
        raise ArtifactError(f"'{where}' is not of a run of ours: {error}") from None
    ours |= typed
    return config


def _typed(words: Sequence[str], known: Mapping[str, Any]) -> dict[str, Any]:
    """The values of words."""
    found = {}
    for word in words:
        path, _, text = word.partition("=")
        key = path.removeprefix("task.")
        if key not in known:
            raise BitfrontError(f"the task has no key '{key}'; {closest(key, list(known))}keys: {', '.join(known)}")
        try:
            found[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise BitfrontError(f"'{word}' is no value") from None
        check_type(path, known[key], found[key])
    return found


def _own_data(told: Mapping[str, Any]) -> dict[str, Any]:
    """Where a run found the user's own data, which are only read, and what they were; of the file's values."""
    own = {key: told[key] for key in ("data", FINGERPRINT) if key in told}
    for key, value in own.items():
        if not isinstance(value, str) and (key == "data" or value is not None):
            raise BitfrontError(f"task.{key} takes no {value!r}")
    return own


def _checked(prefix: str, values: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The values, all of them of keys, types and kinds that ours have."""
    for key, value in values.items():
        path = f"{prefix}.{key}"
        if key not in known:
            raise BitfrontError(f"it sets {path!r}, which there is not")
        if isinstance(known[key], dict):
            _checked(path, _mapping(path, value), known[key])
        elif known[key] is None:  # a file of the user's
            _refuse_place(path, value)
        else:
            check_type(path, known[key], value)
            elements = value if isinstance(value, list) else [value]
            kind = type(known[key][0]) if isinstance(known[key], list) and known[key] else (str, int, float)
            for element in elements:
                if isinstance(value, list) and (isinstance(element, bool) or not isinstance(element, kind)):
                    raise BitfrontError(f"{path} takes no {element!r}")
                if isinstance(element, str) and value != known[key] and re.search(r"[/\\:]|^[.~]", element):
                    _refuse_place(path, element)
    return dict(values)


def _mapping(path: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise BitfrontError(f"its {path} is no mapping")
    return value


def _refuse_place(path: str, value: Any) -> None:
    if value is not None:
        raise BitfrontError(f"it names a place for {path}: {value!r}; give {path}=<place> yourself")
