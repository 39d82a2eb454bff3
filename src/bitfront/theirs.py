"""Code of the user's own, ``<package.module>:<name>``, which only a word of the command line names."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from bitfront.errors import BitfrontError

MADE = "<package.module>:<function>"
FOLDER = "hf:"  # before the path of a network that transformers has saved
GGUF = ".gguf"


def saved(network: str) -> tuple[Path, dict[str, str]]:
    """The folder of a network that transformers reads, and the option that says so where it is one file of it."""
    place = Path(network.removeprefix(FOLDER))
    return (place.parent, {"gguf_file": place.name}) if place.suffix == GGUF else (place, {})


def imported(option: str, name: str) -> Any:
    """What is of that name.

    Args:
        option: of the command line, for messages.
        name: ``<package.module>:<name>``; sought in the working directory, too.

    Raises:
        BitfrontError: the module is not there or fails, or has nothing of that name.
    """
    module, _, wanted = name.partition(":")
    if not module or not wanted:
        raise BitfrontError(f"{option}={name}: give {MADE}")
    if os.getcwd() not in sys.path:  # where an installed command does not look by itself
        sys.path.append(os.getcwd())
    try:
        found = import_module(module)
    except ImportError as error:
        raise BitfrontError(
            f"{option}={name}: could not import {module} ({error}); it is sought in the working directory and among "
            f"Python's packages"
        ) from None
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise BitfrontError(f"{option}={name}: {module} fails with {type(error).__name__}: {error}") from None
    if not hasattr(found, wanted):
        own = [key for key, x in vars(found).items() if callable(x) and getattr(x, "__module__", "") == module]
        raise BitfrontError(f"{option}={name}: {module} has no '{wanted}'; it has {', '.join(own[:10]) or 'none'}")
    return getattr(found, wanted)
