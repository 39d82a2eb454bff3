"""Imports point one way: research code is plain PyTorch, and what only reads records starts without torch."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, command

SOURCES = sorted((REPOSITORY / "src").rglob("*.py"))
FRAMEWORKS = {"lightning", "hydra", "wandb", "omegaconf"}
READS_RECORDS = {"torch", "lightning", "wandb", "src.quant", "src.tasks", "src.artifact", "src.training"}
FORBIDDEN = {
    "src/packed.py": FRAMEWORKS | {"src.artifact", "src.quant", "src.tasks", "src.training"},
    "src/artifact.py": FRAMEWORKS | {"src.quant", "src.tasks", "src.training"},
    "src/quant": FRAMEWORKS | {"src.tasks", "src.data", "src.training", "src.cell", "src.run", "src.record"},
    "src/tasks": FRAMEWORKS | {"src.quant", "src.training", "src.cell", "src.run", "src.record", "src.artifact"},
    "src/data": FRAMEWORKS | {"src.quant", "src.tasks", "src.training", "src.cell", "src.run", "src.record"},
    "src/models": FRAMEWORKS
    | {"src.quant", "src.tasks", "src.data", "src.training", "src.cell", "src.run", "src.record"},
    "src/training.py": {"hydra", "wandb", "omegaconf", "src.run", "src.cell"},
    "src/record.py": FRAMEWORKS | {"torch", "src.quant", "src.tasks", "src.artifact"},
    **{f"src/{name}.py": READS_RECORDS for name in ("dashboard", "report", "rows", "tables", "figures", "page")},
}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_import_direction(path: Path) -> None:
    place = str(path.relative_to(REPOSITORY))
    for prefix, forbidden in FORBIDDEN.items():
        if place.startswith(prefix):
            wrong = {n for n in imported(path) for f in forbidden if n == f or n.startswith(f + ".")}
            assert not wrong


def test_wandb_is_imported_in_one_file() -> None:
    assert [p.name for p in SOURCES if any(n.partition(".")[0] == "wandb" for n in imported(p))] == ["tracking.py"]


@pytest.mark.parametrize("module", ["run", "report", "evaluate", "dashboard"])
def test_commands_start_without_torch(module: str) -> None:
    code = f"import sys, src.{module}; sys.exit('torch' in sys.modules)"
    import subprocess

    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0
    assert command(f"src.{module}", "--help").returncode == 0
