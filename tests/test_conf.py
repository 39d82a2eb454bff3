"""Every configuration composes; a command line that does not fit is refused with the choices, before any run."""

from __future__ import annotations

import time

import pytest
import yaml
from conftest import command

from src import config
from src.cell import build, build_task
from src.errors import BitfrontError
from src.quant.core import Method
from src.record import identity
from src.tasks.core import Task


@pytest.mark.parametrize("task", config.options("task"))
@pytest.mark.parametrize("quant", config.options("quant"))
def test_every_cell_composes_and_builds(task: str, quant: str) -> None:
    config.check([f"task={task}", f"quant={quant}"])
    cell = config.load([f"task={task}", f"quant={quant}"])
    assert isinstance(build_task(cell), Task) and isinstance(build(cell["quant"]), Method)
    assert cell["names"] == {"task": task, "quant": quant}


@pytest.mark.parametrize("name", config.options("quant"))
def test_a_methods_knobs_reach_the_method(name: str) -> None:
    node = yaml.safe_load((config.CONF / "quant" / f"{name}.yaml").read_text())
    knobs = set(node) - {"quant", "init_from", "defaults"}
    assert knobs == {value[2:-1] for value in node["quant"].values() if str(value).startswith("${")}
    assert knobs == {key for key, value in node["quant"].items() if value == f"${{{key}}}"}


@pytest.mark.parametrize(
    "words",
    [
        ["quant=diffq", "penalty=5"],
        ["quant=diffq", "--cfg", "job"],
        ["-m", "quant=rtn,ste", "bits=2,3"],
        ["-m", "quant=glob(*)"],
        ["quant=diffq", "quant.exclude=[bias]", "train.lr=1"],
        ["-m", "task=vit", "quant=lsq", "bits=range(2,5)", "seed=0,1"],
    ],
)
def test_good_command_lines_pass(words: list[str]) -> None:
    assert config.check(words) is None  # type: ignore[func-returns-value]


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["quant=difq"], r"no quant=difq; did you mean 'diffq'\? choices: .*float, .*ste"),
        (["task=vitt"], r"did you mean 'vit'\? choices: .*vit, vit_cifar10"),
        (["-m", "quant=rtn,stee"], r"no quant=stee"),
        (["quant=rtn", "penalty=5"], r"quant=rtn has no option 'penalty'; options: .*bits, group_size"),
        (["-m", "quant=diffq,rtn", "penalty=5"], r"quant=rtn has no option 'penalty'"),
        (["quant=diffq", "penatly=5"], r"did you mean 'penalty'"),
        (["quant=diffq", "penalty=abc"], r"penalty takes a number, got 'abc'"),
        (["-m", "quant=diffq", "penalty=1,abc"], r"penalty takes a number, got 'abc'"),
        (["quant=diffq", "penalty=nan"], r"penalty takes a number"),
        (["quant=rtn", "bits=4.5"], r"bits takes a whole number"),
        (["quant=rtn", "bits=true"], r"bits takes a whole number"),
        (["smoke=1"], r"smoke takes true or false"),
        (["quant=lsq", "quant.reestimate_bn=yes"], r"quant.reestimate_bn takes true or false"),
        (["train.epochs=[1]"], r"train.epochs takes a whole number"),
        (["quant.exclude=a", "quant=rtn"], r"quant.exclude takes a list"),
        (["train=5"], r"train takes no value; set one of its keys"),
        (["+penalty=5"], r"only existing keys can be set"),
        (["~seed"], r"only existing keys can be set"),
        (["penalty"], r"options are words like penalty=5"),
        ([""], r"options are words like penalty=5"),
        (["wandb=maybe"], r"no wandb=maybe; choices: auto, online, offline, disabled"),
        (["trainer.accelerator=tpu"], r"choices: auto, cpu, gpu, mps"),
        (["trainer.precision=bf16-true"], r"choices: 32-true, bf16-mixed, 16-mixed"),
        (["init_from=5"], r"init_from takes a word or null"),
        (["root=2024"], r"root takes a word"),
    ],
)
def test_bad_command_lines_are_refused_with_the_choices(words: list[str], answer: str) -> None:
    with pytest.raises(BitfrontError, match=answer):
        config.check(words)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (("--help",), "penalty=1.0 group_size=8"),
        (("quant=difq",), "choices: decoupleq, diffq"),
        (("quant=rtn", "penalty=5"), "has no option 'penalty'"),
        (("quant=diffq", "penalty=abc"), "penalty takes a number"),
    ],
)
def test_the_answer_comes_at_once_and_without_a_traceback(words: tuple[str, ...], answer: str) -> None:
    began = time.perf_counter()
    result = command("src.run", *words)
    seconds = time.perf_counter() - began
    assert answer in result.stdout + result.stderr
    assert (result.returncode == 0) == (words == ("--help",))
    assert "Traceback" not in result.stderr
    assert seconds < 2


def test_help_names_every_task_and_method() -> None:
    text = config.usage()
    assert all(f"  {name} " in text for group in config.GROUPS for name in config.options(group))


@pytest.mark.parametrize(
    "bad",
    [
        {"bits": 16}, {"bits": 0}, {"group_size": -2}, {"min_size": -1.0},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(BitfrontError, match=next(iter(bad))):
        build(config.load(["quant=ste"])["quant"] | bad)


@pytest.mark.parametrize(
    ("bad", "answer"),
    [
        ({"min_bits": 9}, "min_bits < init_bits"), ({"max_bits": 16}, "<= 15"), ({"param": "x"}, "'bits' or 'noise'"),
        ({"noise": "x"}, "'gaussian' or 'uniform'"), ({"range": "x"}, "'minmax' or 'absmax'"),
        ({"lr": 0.0}, "quant.lr"), ({"penalty": -1.0}, "penalty"), ({"foo": 1}, "foo"),
    ],
)  # fmt: skip
def test_diffq_values_out_of_range_are_refused(bad: dict[str, object], answer: str) -> None:
    with pytest.raises(BitfrontError, match=answer):
        build(config.load(["quant=diffq"])["quant"] | bad)


def test_identity_is_of_what_determines_the_result() -> None:
    base = identity(config.load(["quant=diffq", "penalty=5"]), None)
    for word in ("penalty=5.0", "root=x", "wandb=offline", "data_root=/x", "trainer.devices=2", "quant.penalty=5"):
        assert identity(config.load(["quant=diffq", "penalty=5", word]), None) == base, word
    for word in ("penalty=6", "seed=1", "train.lr=0.1", "trainer.precision=bf16-mixed", "smoke=true", "task.dim=64"):
        assert identity(config.load(["quant=diffq", "penalty=5", word]), None) != base, word
    assert identity(config.load(["quant=diffq", "penalty=5"]), "abc") != base


def test_the_setting_names_what_differs_from_the_files() -> None:
    def setting(*words: str) -> str:
        return config.load(words)["setting"]

    assert setting("quant=gptq", "bits=2", "init_from=float", "quant.damping=0.01") == "bits=2"
    assert setting("quant=gptq", "bits=2") == setting("quant=gptq", "quant.bits=2") == "bits=2"
    assert setting("task=resnet", "task.network=resnet18") == setting("task=resnet", "model=resnet18")
    assert setting("quant=gptq", "quant.layers={head*: {bits: 8}}") == "bits=4 quant.layers={head*: {bits: 8}}"
    assert setting("quant=decoupleq", "J=0", "quant.sft=true", "init_from=x") == "bits=2 J=0 quant.sft=true init_from=x"
    assert setting("quant=float", "train.epochs=3", "seed=2") == "train.epochs=3"
