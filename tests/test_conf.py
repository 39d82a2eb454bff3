"""Every configuration composes; a command line that does not fit is refused with the choices, before any run."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import cli

from bitfront.cells import compose
from bitfront.cells.check import check
from bitfront.cells.flow import build_method, build_task
from bitfront.cells.record import read_all
from bitfront.cells.usage import usage
from bitfront.errors import BitfrontError
from bitfront.quant.core import Method
from bitfront.tasks.core import Task


@pytest.mark.parametrize("task", compose.options("task"))
@pytest.mark.parametrize("quant", compose.options("quant"))
def test_every_cell_composes_and_builds(task: str, quant: str) -> None:
    check([f"task={task}", f"quant={quant}"])
    config = compose.load([f"task={task}", f"quant={quant}"])
    assert isinstance(build_task(config), Task) and isinstance(build_method(config), Method)
    assert (config.task, config.method) == (task, quant)


@pytest.mark.parametrize("name", compose.options("quant"))
def test_a_methods_knobs_reach_the_method(name: str) -> None:
    raw = yaml.safe_load(compose.file("quant", name).read_text())["quant"]
    for base in yaml.safe_load(compose.file("quant", name).read_text()).get("defaults", [])[:-1]:
        raw = yaml.safe_load(compose.file("quant", base).read_text())["quant"] | raw
    knobs = {knob for knob, _ in compose.knobs("quant", name)}
    of_all = compose.shared()
    assert knobs == {key for key, value in raw.items() if value == f"${{{key}}}" and key not in of_all}


@pytest.mark.parametrize("task", compose.options("task"))
def test_every_method_quantizes_the_same_tensors_and_is_calibrated_on_as_much(task: str) -> None:
    """Facts of the task: no method has its own."""
    cells = [compose.load([f"task={task}", f"quant={m}"]).values["quant"] for m in compose.options("quant")]
    for keys in (("min_size", "exclude", "include"), ("samples", "batch_size")):
        assert len({str([cell[key] for key in keys]) for cell in cells if keys[0] in cell}) == 1


@pytest.mark.parametrize("task", compose.options("task"))
def test_every_task_takes_all_options_of_the_training(task: str) -> None:
    words = ["train.clip=1.0", "train.ema=0.9", "train.keep=best", "train.max_size=1.0", "train.workers=1"]
    words = [f"task={task}", *words, "train.repeats=2", "train.optim=sgd", "train.schedule=constant"]
    check(words)
    recipe = build_task(compose.load(words)).recipe
    assert all(str(getattr(recipe, key)) == value for key, value in (w[6:].split("=") for w in words[1:]))


def test_layers_of_a_cell() -> None:
    """What comes later in ``compose`` overrides what comes before."""

    def train(*words: str) -> dict[str, Any]:
        return compose.load(["task=resnet_cifar10", *words]).values["train"]

    assert (train("quant=float")["epochs"], train("quant=float")["lr"]) == (15, 0.1)
    for words in (["quant=diffq"], ["quant=lsq"], ["quant=float", "init_from=float"]):
        assert (train(*words)["epochs"], train(*words)["lr"]) == (5, 0.01), words
    assert train("quant=diffq", "init_from=null")["epochs"] == 15  # from scratch
    assert train("quant=gptq", "quant.sft=true")["epochs"] == train("quant=decoupleq", "quant.sft=true")["epochs"] == 2
    assert train("quant=lsq", "train.epochs=7")["epochs"] == 7
    assert train("quant=lsq", "train.epochs=7", "smoke=true")["epochs"] == 2
    assert train("quant=lsq", "train.epochs=1", "smoke=true")["epochs"] == 1
    assert compose.load(["task=lm_wikitext103", "quant=lsq"]).values["train"]["lr"] == 0.01
    small = [compose.load(["task=imagenet_small", f"quant={m}", "smoke=true"]).values for m in ("float", "lsq", "gptq")]
    assert [(v["init_from"], v["train"]["epochs"]) for v in small] == [(None, 2), ("float", 2), ("float", 2)]
    values = compose.load(["task=resnet_cifar10", "model=wrn28_10", "smoke=true", "quant=rtn"])
    assert values.values["task"]["network"] == values.values["model"] == "resnet8" and values.setting == "bits=4"


def test_each_pair_is_composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    composed: list[Any] = []
    real = compose.compose
    monkeypatch.setattr(compose, "compose", lambda *words: composed.append(words) or real(*words))
    compose._composed.cache_clear()
    words = ["task=lm", "quant=gptq", "bits=3", "quant.layers={head*: {bits: 8}}"]
    check([*words, "cluster=serial"])
    for seed in range(5):
        compose.load([*words, f"seed={seed}"])
    assert len(composed) == 2  # with and without the cluster


@pytest.mark.parametrize(
    "words",
    [
        ["quant=diffq", "penalty=5"],
        ["quant=rtn,ste", "bits=2,3"],
        ["quant=glob(*)"],
        ["quant=diffq", "quant.exclude=[bias]", "train.lr=1"],
        ["task=vit", "quant=lsq", "bits=range(2,5)", "seed=0,1"],
    ],
)
def test_good_command_lines_pass(words: list[str]) -> None:
    assert check(words) is None  # type: ignore[func-returns-value]


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["quant=difq"], r"no quant=difq; did you mean 'diffq'\? choices: .*float, .*ste"),
        (["task=vitt"], r"did you mean 'vit'\? choices: .*vit, vit_cifar10"),
        (["quant=rtn,stee"], r"no quant=stee"),
        (["quant=rtn", "penalty=5"], r"quant=rtn has no option 'penalty'; options: .*bits, group_size"),
        (["quant=diffq,rtn", "penalty=5"], r"quant=rtn has no option 'penalty'"),
        (["quant=diffq", "penatly=5"], r"did you mean 'penalty'"),
        (["quant=diffq", "penalty=abc"], r"penalty takes a number, got 'abc'"),
        (["quant=diffq", "penalty=1,abc"], r"penalty takes a number, got 'abc'"),
        (["quant=diffq", "penalty=nan"], r"penalty takes a number"),
        (["quant=rtn", "bits=4.5"], r"bits takes a whole number"),
        (["quant=rtn", "bits=true"], r"bits takes a whole number"),
        (["smoke=1"], r"smoke takes true or false"),
        (["quant=lsq", "quant.reestimate_bn=yes"], r"quant.reestimate_bn takes true or false"),
        (["train.epochs=[1]"], r"train.epochs takes a whole number"),
        (["quant.exclude=a", "quant=rtn"], r"quant.exclude takes a list"),
        (["quant.exclude=[1,2]", "quant=rtn"], r"each in quant.exclude takes a word, got '1'"),
        (["task.std=[1,true,1]", "task=images"], r"each in task.std takes a number, got 'True'"),
        (["task.std=[1,.inf,1]", "task=images"], r"each in task.std takes a"),
        (["quant.layers={0:{bits:2}}", "quant=rtn"], r"quant.layers takes a mapping like"),
        (["quant.layers={head.*:2}", "quant=rtn"], r"quant.layers takes a mapping like"),
        (["quant.layers=2", "quant=rtn"], r"quant.layers takes a mapping like"),
        (["train=5"], r"train takes no value; set one of its keys"),
        (["quant.bits=3"], r"quant=float has no option 'quant.bits'; .*options: seed, .*quant.raw_dtype, task"),
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
        check(words)


@pytest.mark.parametrize(
    "place", ["ü/日本", "a=b", "a b", "a,b", "a(b){c}[d]", "it's", "a#b&c%!", "back\\", "\\'", "~x", ""]
)
def test_places_are_taken_as_they_stand(place: str) -> None:
    for key in compose.PLACES:
        word = compose.quoted(f"{key}=/{place}")
        (override,) = compose.parse([word])
        assert not override.is_sweep_override() and override.value() == f"/{place}"
        assert compose.quoted(word) == word


def test_the_users_folder_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ü")
    (override,) = compose.parse([compose.quoted("root=~/runs")])
    assert override.value() == "/home/ü/runs"


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("bits=2,3", "bits=2,3"),
        ("quant.damping=interval(0.1,0.2)", "quant.damping=interval(0.1,0.2)"),
        ("quant.layers={head.*:{bits:8}}", "quant.layers={head.*:{bits:8}}"),
        ("init_from=a,b", "init_from=a,b"),
        ("root='a b'", "root='a b'"),
        ("data=Fotos ü", "data='Fotos ü'"),
        ("bits==3", "bits='=3'"),
        ("+bits=3", "+bits=3"),
        ("penalty", "penalty"),
    ],
)
def test_words_that_are_understood_stay(word: str, wanted: str) -> None:
    assert compose.quoted(word) == wanted


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (("--help",), "penalty=1.0 group_size=8"),
        (("quant=difq",), "choices: decoupleq, diffq"),
        (("quant=rtn", "penalty=5"), "has no option 'penalty'"),
        (("quant=diffq", "penalty=abc"), "penalty takes a number"),
    ],
)
def test_the_answer_comes_without_a_traceback(words: tuple[str, ...], answer: str) -> None:
    result = cli("run", *words)
    assert answer in result.stdout + result.stderr
    assert (result.returncode == 0) == (words == ("--help",))
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("word", ["task.classes=5", "task.channels=3", "task.image_size=12"])
def test_data_of_another_form_than_the_task_is_told_are_refused(word: str) -> None:
    for split in ("train", "valid", "test"):
        with pytest.raises(BitfrontError, match=f"10 classes and images of 1 x 8 x 8; got .*{word}"):
            build_task(compose.load(["task=vit", word])).dataset(split)


def test_cfg_shows_all_keys_of_a_cell() -> None:
    shown = yaml.safe_load(cli("run", "quant=diffq", "penalty=3", "--cfg", "job").stdout)
    assert shown == compose.load(["quant=diffq", "penalty=3"]).values


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (("--resolve",), "there is no --resolve; flags: -m"),
        (("hydra.verbose=true",), "hydra.* are options of a sweep"),
        (("-m", "quant=rtn", "--cfg", "job"), "a sweep takes no --cfg"),
        (("--config-dir", "/nowhere"), "takes a folder with task/<name>.yaml"),
        (("task=vit", "--config-dir"), "takes a folder with task/<name>.yaml"),
        (("task=vit", "--cfg"), "--cfg takes one word"),
        (("--cfg", "quant=diffq"), "--cfg takes one word"),
        (("quant=diffq", "penalty=1,2"), "'penalty=1,2' has several values; add -m"),
        (("task=vit,lm",), "has several values"),
        (("quant=diffq", "penalty=interval(1,2)", "--cfg", "job"), "has several values"),
        (("task@elsewhere=vit",), "only existing keys can be set"),
        (("+hydra.x=1",), "only existing keys can be set"),
        (("data_root=${oc.env:NOTHING}",), "cannot be resolved"),
        (("task.heads=5",), "task.heads must divide task.dim"),
        (("task=resnet_imagenet", "model=resnet20"), "there is no model=resnet20"),
        (("recipe=diffq/cifar11",), "did you mean 'diffq/cifar10'"),
        (("tensors.min_size=0",), "'tensors.min_size' is a fact of the task"),
        (("methods.lsq.penalty=1",), "is a fact of the task"),
    ],
)
def test_flags_and_facts(words: tuple[str, ...], answer: str) -> None:
    result = cli("run", *words)
    assert result.returncode and answer in result.stderr and "Traceback" not in result.stderr, result.stderr


OWN = """
from dataclasses import dataclass
from bitfront.quant.methods.ste import STE

@dataclass(kw_only=True)
class Mine(STE):
    pass
"""


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", "has no task._target_"),
        ("task: {_target_: Vision}\ntrain: {epochs: 1, batch_size: 8, lr: 1.0}", "there is no .Vision"),
        ("task: {_target_: nowhere.Task}\ntrain: {epochs: 1, batch_size: 8, lr: 1.0}", "there is no nowhere.Task"),
        ("task: {_target_: bitfront.tasks.vision.Vision, colour: red}", "train.* of task=mine: "),
        ("defaults: [vit, _self_]\ntask: {colour: red}", "task=mine: "),
        ("defaults: [vit, _self_]\ntrain: {speed: 3}", "train.* of task=mine"),
        ("defaults: [vit, _self_]\ntiny: {task: {colour: 3}}", "cannot be resolved"),
        ("defaults: [nothing, _self_]", "build on one that there is not"),
        ("defaults: [vit", "do not fit together"),
    ],
)
def test_a_mistake_in_ones_own_yaml_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, answer: str
) -> None:
    own = tmp_path / "its own (folder), here"
    (own / "task").mkdir(parents=True)
    (own / "task" / "mine.yaml").write_text(f"# @package _global_\n# mine\n{text}\n")
    monkeypatch.setenv(compose.OWN, "")
    words = ("--config-dir", str(own), "task=mine", f"smoke={str('tiny' in text).lower()}", f"root={tmp_path}")
    result = cli("run", *words)
    assert result.returncode and answer in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_ones_own_have_names_of_their_own_and_every_command_knows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "mine.yaml").write_text("# @package _global_\n# a task of mine\ndefaults: [vit, _self_]\n")
    monkeypatch.setenv(compose.OWN, "")
    own = ("--config-dir", str(tmp_path))
    assert "a task of mine" in cli("run", *own, "--help").stdout
    assert cli("run", *own, "task=mine", "smoke=true", f"root={tmp_path}").returncode == 0
    (record,) = read_all(tmp_path)
    assert "the same as in its record" in cli("evaluate", *own, f"artifact={record.artifact}").stdout
    assert own[0] in record.command and "mine" in cli("report", *own, str(tmp_path)).stdout
    monkeypatch.setenv(compose.OWN, "")
    assert "there is no task=mine" in cli("evaluate", f"artifact={record.artifact}").stderr
    (tmp_path / "task" / "vit.yaml").write_text("")
    assert "has the name of a task of ours" in cli("run", *own).stderr


def test_tasks_and_methods_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--config-dir`` has yaml files beside ours, and with them code of the user's."""
    (tmp_path / "conf" / "quant").mkdir(parents=True)
    text = compose.file("quant", "ste").read_text().replace("bitfront.quant.methods.ste.STE", "my_methods.Mine")
    (tmp_path / "conf" / "quant" / "mine.yaml").write_text(text)
    (tmp_path / "my_methods.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(compose.OWN, "")  # so that it is as it was afterwards
    words = ("--config-dir", str(tmp_path / "conf"), "task=vit", "smoke=true", f"root={tmp_path}", "bits=3")
    for method in ("mine", "glob(mi*)"):
        result = cli("run", *words, f"quant={method}", *(["-m"] if "glob" in method else []))
        assert result.returncode == 0 and "vit mine bits=3" in result.stdout, result.stderr


def test_help_names_every_task_and_method() -> None:
    text = usage()
    assert all(f"  {name} " in text for group in compose.GROUPS for name in compose.options(group))


def with_values(method: str, values: dict[str, Any]) -> compose.Config:
    """A method's configuration with other values."""
    config = compose.load([f"quant={method}"])
    changed = copy.deepcopy(config.values)
    changed["quant"] |= values
    return replace(config, values=changed)


@pytest.mark.parametrize(
    "bad",
    [
        {"bits": 16}, {"bits": 0}, {"group_size": -2}, {"min_size": -1.0},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(BitfrontError, match=next(iter(bad))):
        build_method(with_values("ste", bad))


@pytest.mark.parametrize(
    ("bad", "answer"),
    [
        ({"min_bits": 9}, "min_bits < init_bits"), ({"max_bits": 16}, "is 1..15, got 16"),
        ({"param": "x"}, "choices: bits"), ({"noise": "x"}, "choices: gaussian, uniform"),
        ({"range": "x"}, "choices: minmax, absmax"),
        ({"lr": 0.0}, "lr is positive"), ({"penalty": -1.0}, "penalty"), ({"foo": 1}, "foo"),
    ],
)  # fmt: skip
def test_diffq_values_out_of_range_are_refused(bad: dict[str, object], answer: str) -> None:
    with pytest.raises(BitfrontError, match=answer):
        build_method(with_values("diffq", bad))


def test_the_setting_names_what_differs_from_the_files() -> None:
    def setting(*words: str) -> str:
        return compose.load(words).setting

    assert setting("quant=gptq", "bits=2", "init_from=float", "quant.damping=0.01") == "bits=2"
    assert setting("quant=gptq", "bits=2") == setting("quant=gptq", "quant.bits=2") == "bits=2"
    assert setting("task=resnet", "task.network=resnet18") == setting("task=resnet", "model=resnet18")
    assert setting("quant=gptq", "quant.layers={head*: {bits: 8}}") == "bits=4 quant.layers={head*: {bits: 8}}"
    assert setting("quant=decoupleq", "J=0", "quant.sft=true", "init_from=x") == "bits=2 J=0 quant.sft=true init_from=x"
    assert setting("quant=float", "train.epochs=3", "seed=2") == "train.epochs=3"
