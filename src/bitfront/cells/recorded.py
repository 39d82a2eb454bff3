"""What a file says of its task. It names the task; the configuration of that name is ours, or the user's own, and the
values that the file has are checked against it: nothing of a file decides which code runs or which place is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from bitfront.cells import compose
from bitfront.cells.check import check_choice, check_type, closest
from bitfront.cells.compose import Config
from bitfront.errors import ArtifactError, BitfrontError


def recorded(about: Mapping[str, Any], where: str) -> Config:
    """The configuration of the task that a file is for.

    Args:
        about: as the file has it: ``task``, a name; ``config`` with ``task`` and ``train``, values by key; ``smoke``.
        where: the file, for messages.

    Raises:
        ArtifactError: there is no such task or key, or a value is of another type or names a place.
    """
    task, smoke, values = about.get("task"), about.get("smoke", False), about.get("config", {})
    if not isinstance(task, str) or not isinstance(smoke, bool) or not isinstance(values, Mapping):
        raise ArtifactError(f"'{where}' does not name a task of ours; give task=<name> if it is of one")
    try:
        check_choice("task", task)
        config = compose.load([f"task={task}", f"quant={compose.default('quant')}", f"smoke={str(smoke).lower()}"])
        for group in ("task", "train"):
            config.values[group] |= _checked(group, values.get(group, {}), config.values[group])
    except BitfrontError as error:
        raise ArtifactError(f"'{where}' is not of a run of ours: {error}") from None
    return config


def otherwise(config: Config, words: Sequence[str]) -> None:
    """Set keys of the task that are to differ from the file's: words like ``task.beam=50``.

    Raises:
        BitfrontError: an unknown key, or a value of another type.
    """
    known = config.values["task"]
    for word in words:
        path, _, text = word.partition("=")
        key = path.removeprefix("task.")
        if key not in known:
            raise BitfrontError(f"the task has no key '{key}'; {closest(key, list(known))}keys: {', '.join(known)}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise BitfrontError(f"'{word}' is no value") from None
        check_type(path, known[key], value)
        known[key] = value


def _checked(prefix: str, values: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise BitfrontError(f"its {prefix} is no mapping")
    for key, value in values.items():
        path = f"{prefix}.{key}"
        if key not in known:
            raise BitfrontError(f"it sets {path!r}, which there is not")
        if isinstance(known[key], dict):
            if not (isinstance(value, Mapping) and all(type(v) in (bool, int, float) for v in value.values())):
                raise BitfrontError(f"{path} takes numbers by name")
        elif value != known[key]:
            check_type(path, known[key], value)
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and re.search(r"[/\\:]|^[.~]", text):
                    raise BitfrontError(f"it names a place for {path}: {text!r}; give {path}=<place> yourself")
    return dict(values)
