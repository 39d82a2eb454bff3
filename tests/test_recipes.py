"""Recipes, their published numbers and their READMEs agree with each other and with the configurations."""

from __future__ import annotations

import csv
import functools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from torch import nn

from src import config
from src.cell import build, build_task
from src.quant.calibration import PostTraining
from src.quant.core import Float, Method
from src.quant.ste import STE

RECIPES = REPOSITORY / "recipes"
SCRIPTS = sorted(RECIPES.glob("*/*.sh"))
FOLDERS = sorted({path.parent for path in SCRIPTS})
PAPERS = sorted(path.parent for path in RECIPES.glob("*/paper.csv"))
HEADER = "recipe,table,model,task,method,setting,metric,value,size,certainty,source,note"
EACH = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
IN_EACH = pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
OF_PAPERS = pytest.mark.parametrize("folder", PAPERS, ids=lambda path: path.name)


def commands(script: Path) -> list[str]:
    """A recipe's command lines."""
    joined = script.read_text().replace("\\\n", " ")
    return [line for line in joined.splitlines() if line and not line.startswith(("#", ". "))]


def words(command: str) -> list[str]:
    """The overrides of a command line."""
    return [word for word in shlex.split(command)[4:] if word != "$@"]


def cells(command: str) -> list[list[str]]:
    """The overrides of each job of a command line's sweep, as Hydra expands it."""
    overrides = OverridesParser.create().parse_overrides(words(command))
    (batch,) = BasicSweeper.split_arguments(overrides, None)
    return batch


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "paper.csv", newline="") as file:
        return list(csv.DictReader(file))


@functools.cache
def loaded(script: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Every cell of a recipe by task, method and setting, as its record has them."""
    every = [config.load(overrides) for command in commands(script) for overrides in cells(command)]
    return {(cell["names"]["task"], cell["names"]["quant"], cell["setting"]): cell for cell in every}


def full_size(cell: dict[str, Any]) -> tuple[nn.Module, Method]:
    """A cell's network at full size, without its memory, and method."""
    with torch.device("meta"):
        return build_task(cell).model(), build(cell["quant"])


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    """Hundreds of cells that have their task and method in common: compose what is the same once."""
    compose = functools.cache(config._compose)
    with initialize_config_dir(str(config.CONF), version_base="1.3"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "_compose", lambda overrides: compose(tuple(overrides)))
        yield


@EACH
def test_every_line_composes_and_takes_more_options(script: Path) -> None:
    for command in commands(script):
        assert command.startswith("python -m src.run -m ") and command.endswith(' "$@"')
        config.check(["-m", *words(command), "smoke=true", "data_root=elsewhere", "cluster=slurm"])
    assert loaded(script)
    assert os.access(script, os.X_OK)


@OF_PAPERS
def test_a_published_number_is_complete(folder: Path) -> None:
    assert (folder / "paper.csv").read_text().splitlines()[0] == HEADER
    for row in rows(folder):
        assert row["certainty"] in ("quoted", "computed", "recalled", "unsure"), row
        assert all(row[key] for key in ("table", "model", "method", "metric", "source")), row
        assert row["value"] or row["size"], row
        assert all(float(row[key]) >= 0 for key in ("value", "size") if row[key]), row
        assert bool(row["recipe"]) == bool(row["task"]) and (row["task"] or not row["setting"]), row
    stated = [tuple(row.values()) for row in rows(folder)]
    assert len(stated) == len(set(stated))


@OF_PAPERS
def test_a_number_with_a_recipe_is_of_one_of_its_cells(folder: Path) -> None:
    for row in rows(folder):
        if row["recipe"]:
            key = row["task"], row["method"], row["setting"]
            assert key in loaded(folder / f"{row['recipe']}.sh"), key


@IN_EACH
def test_the_readme_names_every_recipe_its_cells_and_which_has_no_published_number(folder: Path) -> None:
    lines = (folder / "README.md").read_text().splitlines()
    scripts = {path.name for path in folder.glob("*.sh")}
    assert set(re.findall(r"[\w-]+\.sh", "\n".join(lines))) == scripts
    compared = {f"{row['recipe']}.sh" for row in rows(folder) if row["recipe"]} if folder in PAPERS else scripts
    for script in scripts:
        (about,) = (line for line in lines if line.startswith("|") and f"`{script}`" in line)
        assert ("no published number" in about) == (script not in compared), about
        assert f"| {sum(len(cells(command)) for command in commands(folder / script))} |" in about


def test_settings_of_layers_and_groups_fit_the_networks_at_full_size() -> None:
    """Which smoke runs do not build."""
    lines = [c for script in SCRIPTS for c in commands(script) if "quant.layers=" in c or "group_size=64" in c]
    for command in lines:
        for overrides in cells(command):
            network, method = full_size(config.load(overrides))
            weights = method.eligible(network)  # refuses names that it does not have
            if isinstance(method, PostTraining):
                method.check_shapes({name: w.shape for name, w in weights.items()})
    assert len(lines) >= 5


def test_computed_sizes_are_those_of_our_cells() -> None:
    compared = 0
    for row in rows(RECIPES / "diffq"):
        if row["certainty"] == "computed" and row["recipe"]:
            script = RECIPES / "diffq" / f"{row['recipe']}.sh"
            network, method = full_size(loaded(script)[row["task"], row["method"], row["setting"]])
            assert isinstance(method, (Float, STE))
            size = method.attach(network).megabytes().item()
            assert f"{size:.{len(row['size'].partition('.')[2])}f}" == row["size"], row
            compared += 1
    assert compared > 30


def test_every_folder_has_its_numbers_and_readme() -> None:
    assert set(FOLDERS) == {path.parent for path in RECIPES.glob("*/README.md")} == {*PAPERS, RECIPES / "bitfront"}


def test_a_line_that_fails_does_not_stop_the_next_but_fails_the_recipe(tmp_path: Path) -> None:
    def outcome(body: str) -> tuple[int, list[str]]:
        text = f'. "{RECIPES}/lines.sh"\n{body}\necho "$@" in "$PWD"\n'
        result = subprocess.run(["bash", "-c", text, "x", "a=1"], cwd=tmp_path, capture_output=True, text=True)
        return result.returncode, result.stdout.splitlines()

    assert outcome("true") == (0, [f"a=1 in {REPOSITORY}"])
    assert outcome("false") == (1, [f"a=1 in {REPOSITORY}"])
    assert outcome("kill -INT $$") == (130, [])


@pytest.mark.slow
@EACH
def test_every_line_runs_in_smoke_mode(script: Path, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    options = ("smoke=true", "wandb=disabled", "trainer.accelerator=cpu", f"root={tmp_path}", "data_root=/nowhere")
    result = subprocess.run([script, *options], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True)
    assert result.returncode == 0, result.stderr.decode()[-3000:]
    records = {path.parent.parent.parent.name for path in tmp_path.glob("*/*/*/record.json")}
    assert records == {key[0] for key in loaded(script)}
