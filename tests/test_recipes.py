"""Recipes, their published numbers and their READMEs agree with each other and with the configurations."""

from __future__ import annotations

import csv
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import REPOSITORY
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from torch import nn

from bitfront.cells import compose
from bitfront.cells.check import check
from bitfront.cells.compose import Config
from bitfront.cells.flow import build_method, build_task
from bitfront.quant.core import Float, Method
from bitfront.quant.methods.ste import STE
from bitfront.sweeps.recipes import lines, recipes

RECIPES = REPOSITORY / "recipes"
FOLDERS = sorted({RECIPES / Path(name).parent for name in recipes()})
PAPERS = sorted(path.parent for path in RECIPES.glob("*/paper.csv"))
HEADER = "recipe,table,model,task,method,setting,metric,value,size,certainty,source,note"
EACH = pytest.mark.parametrize("name", recipes())
IN_EACH = pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
OF_PAPERS = pytest.mark.parametrize("folder", PAPERS, ids=lambda path: path.name)


def cells(line: list[str]) -> list[list[str]]:
    """The words of each cell of a line, as Hydra expands its sweep."""
    (batch,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(line), None)
    return batch


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "paper.csv", newline="") as file:
        return list(csv.DictReader(file))


@functools.cache
def loaded(name: str) -> dict[tuple[str, str, str], Config]:
    """Every cell of a recipe by task, method and setting, as its record has them."""
    every = [compose.load(words) for line in lines(name) for words in cells(line)]
    return {(cell.task, cell.method, cell.setting): cell for cell in every}


def full_size(cell: Config) -> tuple[nn.Module, Method]:
    """A cell's network at full size, without its memory, and method."""
    with torch.device("meta"):
        return build_task(cell).model(), build_method(cell)


@EACH
def test_every_line_composes_and_takes_more_options(name: str) -> None:
    for line in lines(name):
        check([*line, "smoke=true", "data_root=elsewhere", "cluster=slurm"])
    assert loaded(name)
    assert (RECIPES / f"{name}.yaml").read_text().startswith("# ")


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
            assert key in loaded(f"{folder.name}/{row['recipe']}"), key


@IN_EACH
def test_the_readme_names_every_recipe_its_cells_and_which_has_no_published_number(folder: Path) -> None:
    about = dict(re.findall(r"^\| `([\w-]+)` \|(.*)$", (folder / "README.md").read_text(), re.MULTILINE))
    assert set(about) == {Path(name).name for name in recipes() if Path(name).parent.name == folder.name}
    compared = {row["recipe"] for row in rows(folder) if row["recipe"]} if folder in PAPERS else set(about)
    for name, text in about.items():
        assert ("no published number" in text) == (name not in compared), text
        assert f"| {sum(len(cells(line)) for line in lines(f'{folder.name}/{name}'))} |" in text, text


def test_settings_of_layers_and_groups_fit_the_networks_at_full_size() -> None:
    """Which smoke runs do not build."""
    files = {"task=llm", "task=asr_whisper"}  # that networks are
    every = [line for name in recipes() for line in lines(name) if not files & {*line}]
    special = [line for line in every if any("layers=" in w or w == "group_size=64" for w in line)]
    for line in special:
        for words in cells(line):
            network, method = full_size(compose.load(words))
            method.eligible(network)  # refuses names that it does not have
    assert len(special) >= 5


@pytest.mark.parametrize("name", ["llama", "blocks", "levels_lm", "samples"])
def test_of_llama_exactly_the_linear_layers_of_the_blocks_are_quantized(name: str) -> None:
    with torch.device("meta"):
        network = transformers.LlamaForCausalLM(transformers.LlamaConfig())  # whose default is LLaMA-7B
    layers = network.model.layers.named_modules(prefix="model.layers")
    linear = {f"{name}.weight" for name, module in layers if isinstance(module, nn.Linear)}
    methods = {str(cell.values["quant"]): build_method(cell) for cell in loaded(f"decoupleq/{name}").values()}
    for method in methods.values():
        assert isinstance(method, Float) or set(method.eligible(network)) == linear
    assert sum(not isinstance(method, Float) for method in methods.values()) >= 2


def test_computed_sizes_are_those_of_our_cells() -> None:
    compared = 0
    for row in rows(RECIPES / "diffq"):
        if row["certainty"] == "computed" and row["recipe"]:
            cell = loaded(f"diffq/{row['recipe']}")[row["task"], row["method"], row["setting"]]
            network, method = full_size(cell)
            assert isinstance(method, (Float, STE))
            size = method.attach(network).megabytes().item()
            assert f"{size:.{len(row['size'].partition('.')[2])}f}" == row["size"], row
            compared += 1
    assert compared > 30


def test_every_folder_has_its_numbers_and_readme() -> None:
    assert set(FOLDERS) == {path.parent for path in RECIPES.glob("*/README.md")} == {*PAPERS, RECIPES / "bitfront"}


@pytest.mark.slow
@EACH
def test_every_recipe_runs_in_smoke_mode(name: str, tmp_path: Path) -> None:
    options = ("smoke=true", "wandb=disabled", "trainer.accelerator=cpu", f"root={tmp_path}", "data_root=/nowhere")
    command = [sys.executable, "-m", "src.run", f"recipe={name}", *options]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True)
    assert result.returncode == 0, result.stderr.decode()[-3000:]
    records = {path.parent.parent.parent.name for path in tmp_path.glob("*/*/*/record.json")}
    assert records == {key[0] for key in loaded(name)}
