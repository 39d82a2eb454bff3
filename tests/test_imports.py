"""Imports point one way, without a circle: research code is plain PyTorch, and what only reads starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import REPOSITORY

from bitfront.commands import COMMANDS

PACKAGE = REPOSITORY / "src" / "bitfront"
FRAMEWORKS = {"lightning", "hydra", "wandb", "omegaconf", "rich"}
BASE = {"errors", "shipped", "console", "processes", "progress", "ranges", "theirs", "downloads", "files", "saved"}
MAY = {  # what each floor may import, besides itself
    **{name: {"errors", "shipped", "processes"} for name in BASE},
    "quant": {"errors", "ranges", "progress", "files", "saved"},
    "exports": {"quant", "errors", "progress", "files"},
    "models": {"errors", "theirs", "downloads"},
    "data": {"errors", "shipped", "progress", "theirs", "downloads", "files"},
    "tasks": {"data", "models", "errors", "processes", "progress", "ranges"},
    "cells": {"tasks", "models", "quant", "exports", "library", "data", *BASE},
    "sweeps": {"cells", *BASE},
    "reports": {"cells", *BASE},
    "commands": {"sweeps", "reports", "cells", "tasks", "quant", "models", "data", *BASE},
    "run": {"commands"},
    "__main__": {"commands", *BASE},
    "library": {"quant", "exports", "errors"},
    "standalone": set(),
    "": {"library", "quant", "errors"},
}

ROOMS = {  # what each part of ``quant`` may import of the others; "" are the files beside them
    "forwards": set(),
    "storage": {"forwards"},
    "layers": {"storage", "forwards"},
    "": {"storage", "forwards"},
    "engine": {"", "layers", "storage", "forwards"},
    "methods": {"engine", "", "layers", "storage", "forwards"},
}


def module(path: Path) -> str:
    """``quant.storage.packed`` of ``src/bitfront/quant/storage/packed.py``."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


SOURCES = {module(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """All names that a file imports anywhere, within functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def arrows(name: str) -> set[str]:
    """The modules of ours that one imports."""
    ours = {n.removeprefix("bitfront.") for n in imported(SOURCES[name]) if n.startswith("bitfront.")}
    return (ours & SOURCES.keys()) - {name}


def test_there_is_no_circle() -> None:
    graph = {name: arrows(name) for name in SOURCES}
    assert sum(map(len, graph.values())) > 100
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names it


@pytest.mark.parametrize("name", SOURCES)
def test_arrows_point_down(name: str) -> None:
    floor = name.partition(".")[0]
    assert {other.partition(".")[0] for other in arrows(name)} <= {floor, *MAY[floor]}
    if floor in ("quant", "tasks", "data", "models"):
        assert not {other.partition(".")[0] for other in imported(SOURCES[name])} & FRAMEWORKS


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("quant.") and name != "quant."])
def test_arrows_point_down_within_quant(name: str) -> None:
    def room(module: str) -> str:
        parts = module.split(".")[1:]
        return parts[0] if parts and parts[0] in ROOMS else ""

    inner = {room(other) for other in arrows(name) if other.startswith("quant.")}
    assert inner <= {room(name), *ROOMS[room(name)]}


def test_wandb_is_imported_in_one_file() -> None:
    places = {name for name, path in SOURCES.items() if any(n.partition(".")[0] == "wandb" for n in imported(path))}
    assert places == {"cells.tracking"}


def loaded(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has after some code."""
    code += "; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", f"import sys; {code}"], capture_output=True, text=True, check=True)
    return set(done.stdout.split("\n")[-2].split())


def test_the_library_loads_torch_with_the_first_name_that_needs_it() -> None:
    assert not loaded("import bitfront") & {"torch", "numpy", "hydra", "lightning", "yaml"}
    assert not loaded("import bitfront; bitfront.BitfrontError") & {"torch", "hydra"}
    assert "torch" in loaded("import bitfront; bitfront.DecoupleQ")


def test_the_library_has_every_method() -> None:
    import bitfront

    assert set(bitfront.__all__) == {name for names in bitfront._HOMES.values() for name in names}
    assert all(getattr(bitfront, name).__name__ == name for name in bitfront.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        bitfront.Nothing  # noqa: B018


def test_commands_start_without_torch() -> None:
    """All of them, with help, a refused word, and a report, up to what draws."""
    code = f"from bitfront.commands import start; [start(name, ['--help']) for name in {COMMANDS}]"
    code += "\ntry: start('run', ['quant=rtn', 'penalty=5'])\nexcept SystemExit as end: assert 'penalty' in str(end)\n"
    code += "import bitfront.reports.tables, bitfront.reports.readme, bitfront.sweeps.recipes"
    assert not loaded(code) & {"torch", "lightning", "pandas", "matplotlib", "wandb", "optuna"}


@pytest.mark.parametrize("door", [("-m", "src.run"), ("-m", "bitfront.run"), ("-m", "bitfront", "run")])
def test_doors_are_the_same(door: tuple[str, ...]) -> None:
    words = [sys.executable, *door, "quant=rtn", "penalty=5"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: quant=rtn has no option 'penalty'")
