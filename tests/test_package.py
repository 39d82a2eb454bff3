"""The wheel: one package with its configuration, published numbers and page, that runs from any folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the wheel is unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    words = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, REPOSITORY]
    subprocess.run(words, check=True, capture_output=True)
    (wheel,) = folder.glob("bitfront-*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "site")
    return folder / "site"


def bitfront(installed: Path, place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(installed), "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bitfront", *words]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)


def test_it_is_one_package_with_all_that_belongs_to_it(installed: Path) -> None:
    assert sorted(path.name.partition("-")[0] for path in installed.iterdir()) == ["bitfront", "bitfront"]
    for name in ("conf", "recipes", "src/bitfront"):
        here = {p.relative_to(REPOSITORY / name) for p in (REPOSITORY / name).rglob("*") if p.suffix and p.is_file()}
        there = installed / "bitfront" / ("" if name.startswith("src") else name)
        assert {path for path in here if "__pycache__" not in path.parts and not (there / path).is_file()} == set()


def test_it_runs_and_reports_from_any_folder(installed: Path, tmp_path: Path) -> None:
    run = bitfront(installed, tmp_path, "run", "task=vit", "quant=rtn", "smoke=true")
    assert run.returncode == 0 and "bitfront run task=vit" in run.stdout and "vit rtn bits=4" in run.stdout, run.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
    assert bitfront(installed, tmp_path, "report", "task=vit-smoke").returncode == 0
    assert (tmp_path / "runs" / "report" / "report.html").is_file()
