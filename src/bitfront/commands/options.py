"""Options of the small commands: ``key=value`` words over a dataclass of defaults."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bitfront.cells.check import TYPES, closest
from bitfront.errors import BitfrontError, first_line

T = TypeVar("T")


def options(schema: type[T], words: Iterable[str]) -> T:
    """The options that words set.

    Args:
        schema: a dataclass with a default for each option.
        words: ``key=value``.

    Raises:
        BitfrontError: an unknown key, or a value of another type.
    """
    known, chosen = [f.name for f in fields(schema)], OmegaConf.structured(schema)  # type: ignore[arg-type]
    parts = [(word, *word.partition("=")) for word in words]
    for word, key, equals, _ in parts:
        if not equals or key not in known:
            raise BitfrontError(
                f"unknown option '{word}'; {closest(key, known)}options: {', '.join(f'{k}=' for k in known)}"
            )
    for _, key, _, text in parts:
        kind = type(chosen[key])
        try:
            chosen[key] = text
        except OmegaConfBaseException:
            raise BitfrontError(f"{key} takes {TYPES[kind]}, got '{text}'") from None
    try:
        return OmegaConf.to_object(chosen)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise BitfrontError(first_line(error)) from None


def folder(words: list[str]) -> tuple[Path, list[str]]:
    """The folder of runs, which the first word may name, and the other words."""
    named = words and ("=" not in words[0] or Path(words[0]).is_dir())
    return (Path(words[0]), words[1:]) if named else (Path("runs"), words)


def usage(about: str | None, schema: type[Any]) -> str:
    """The help of a command: its module's text, and its options with their defaults."""
    shown = " ".join(f"{f.name}={f.default}" for f in fields(schema))
    return f"{about}\nOptions: {shown.replace('=False', '=false')}"
