"""Recipes: all cells of a published table, or of a comparison of our own, as the union of several grids.

    # DiffQ, CIFAR-10: accuracy against size
    task: resnet_cifar10_paper
    shared: model=resnet18,mobilenet
    lines: |
      quant=float
      quant=ste,lsq bits=2,3,4

A line is a sweep's command line, words as in a shell; what is shared comes before each.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import yaml

from bitfront.cells.check import closest
from bitfront.errors import BitfrontError
from bitfront.shipped import shipped


def recipes() -> list[str]:
    """The names of those that come with the package: ``<paper>/<name>``."""
    return sorted(f"{path.parent.name}/{path.stem}" for path in shipped("recipes").glob("*/*.yaml"))


def lines(name: str) -> list[list[str]]:
    """The words of each line of a recipe, what is shared first.

    Args:
        name: as ``recipes`` has it, or the path of a file.

    Raises:
        BitfrontError: there is no such recipe, or the file is none.
    """
    path = Path(name) if name.endswith(".yaml") else shipped("recipes") / f"{name}.yaml"
    try:
        content = yaml.safe_load(path.read_text())
        shared = [f"task={content['task']}", *shlex.split(content.get("shared") or "")]
        return [[*shared, *shlex.split(line)] for line in content["lines"].splitlines() if line.strip()]
    except FileNotFoundError:
        known = recipes()
        raise BitfrontError(
            f"there is no recipe={name}; {closest(name, known)}choices: {', '.join(known)}, or the path of a yaml"
        ) from None
    except (OSError, yaml.YAMLError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise BitfrontError(f"'{path}' is no recipe, with task and lines: {error}") from None
