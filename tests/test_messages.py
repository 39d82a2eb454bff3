"""What commands say before, during and after: the first mistake first, before torch; interrupts; bars; dry runs."""

from __future__ import annotations

import io
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, cli

from bitfront import ranges
from bitfront.cells import compose, training
from bitfront.cells.cell import Cell
from bitfront.cells.check import check_values
from bitfront.cells.record import Record, read_all
from bitfront.cells.usage import usage
from bitfront.errors import BitfrontError
from bitfront.progress import Bar, clear, phase
from bitfront.quant.engine import calibration
from bitfront.sweeps.beforehand import SHOWN
from bitfront.sweeps.forecast import Planned, estimate, summary
from bitfront.tasks.recipe import Recipe

SMOKE = ("task=vit", "smoke=true", "trainer.accelerator=cpu", "wandb=disabled")
WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # to import it would fail
from bitfront.commands import start
for line in sys.stdin.read().splitlines():
    try:
        start("run", line.split())
    except SystemExit as end:
        print(end.code)
"""


def without_torch(*lines: str) -> list[str]:
    """What the command ``run`` says to some command lines where torch cannot be imported."""
    words = [sys.executable, "-c", WITHOUT_TORCH]
    done = subprocess.run(words, input="\n".join(lines), capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def files(root: Path) -> set[Path]:
    """Everything below a folder."""
    return set(root.rglob("*"))


# the order of mistakes


def test_the_first_mistake_is_named_first_and_before_torch() -> None:
    """An unknown key, a wrong type, a value out of range, a missing file: each comes before those after it."""
    words = ["init_from=nowhere.pth", "quant.samples=-1", "bits=abc", "penalti=3"]
    answers = ["nowhere.pth: no such file", "quant.samples is positive", "bits takes a whole number", "'penalti'"]
    lines = [f"task=vit quant=decoupleq {' '.join(words[: n + 1])}" for n in range(len(words))]
    for line, answer, said in zip(lines, answers, without_torch(*lines), strict=True):
        assert said.startswith("error: ") and answer in said, line


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("quant=decoupleq bits=9", "bits is 1..8, got 9"),
        ("quant=rtn bits=16", "bits is 1..15, got 16"),
        ("quant=rtn quant.target=all", "choices: network, block"),
        ("quant=diffq penalty=-1", "penalty is in [0, 1e6]"),
        ("quant=gptq quant.held_out=1.0", "quant.held_out is in [0, 1), got 1"),
        ("train.epochs=-1", "train.epochs is not negative"),
        ("train.ema=1.0", "train.ema is in [0, 1)"),
        ("train.schedule=step", "train.period=0 is out of range for train.schedule=step"),
        ("trainer.devices=0", "trainer.devices is positive"),
        ("seed=-1", "seed is 0..4294967295"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_word(words: str, answer: str) -> None:
    with pytest.raises(BitfrontError) as refused:
        check_values(compose.load(["task=vit", *words.split()]))
    assert answer in str(refused.value)


@pytest.mark.parametrize("group", compose.CELL)
def test_ranges_that_are_read_are_those_of_the_classes(group: str) -> None:
    for name in compose.options(group):
        target = compose.target(group, name)
        place, _, kind = target.rpartition(".")
        assert ranges.declared(target) == ranges.of(getattr(import_module(place), kind)) != {}, target


def beyond(allowed: ranges.Range) -> list[Any]:
    """Values out of a range: another kind, no number, and what is just past its ends."""
    if isinstance(allowed, tuple):
        return ["nothing like it", None]
    low, high = allowed.split("..") if ".." in allowed else allowed[1:-1].split(", ")
    ends = [float(low) - 1] if low != "-inf" else []
    ends += [float(high) + 1] if high not in ("", "inf") else []
    return [*(int(x) if ".." in allowed else x for x in ends), math.nan, math.inf, None, "x", [1]]


@pytest.mark.parametrize("group", compose.CELL)
def test_every_number_of_every_task_and_method_has_a_range_that_is_kept(group: str) -> None:
    for name in compose.options(group):
        config = compose.load([f"{group}={name}", *(["quant=float"] if group == "task" else [])])
        declared, values = ranges.declared(compose.target(group, name)), config.values[group]
        numbers = {key for key, value in values.items() if type(value) in (int, float)}
        assert numbers <= declared.keys(), name
        for key, allowed in declared.items():
            for value in beyond(allowed) if key in values else ():
                spoiled = replace(config, values=config.values | {group: values | {key: value}})
                with pytest.raises(BitfrontError, match=key):
                    check_values(spoiled)


def test_ranges_are_read_without_importing_and_narrowed_by_subclasses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base_of_mine.py").write_text(
        "raise RuntimeError\nclass Top:\n    ranges: dict = {'a': '0..', 'b': '1..3'}\nclass Side(Top):\n    pass\n"
    )
    (tmp_path / "method_of_mine.py").write_text(
        "from base_of_mine import Side, Top as Root\nraise RuntimeError\n"
        "class Narrow(Root):\n    ranges: dict = {'a': '5..'}\n"
        "class Mine(Side, Narrow):\n    ranges: dict = {'c': ('x',)}\n"
        "class Computed:\n    ranges: dict = {'a': str(1)}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert ranges.declared("method_of_mine.Mine") == {"a": "5..", "b": "1..3", "c": ("x",)}
    assert not ranges.declared("method_of_mine.Computed") and not ranges.declared("nowhere.Mine")


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        ("1..15", [1, 15], [0, 16, 2.0, True, "2", None]),
        ("-1..", [-1, 10**9], [-2, 0.5]),
        ("[0, 1)", [0, 0.0, 0.999], [1, -0.1, float("nan"), "0"]),
        ("(0, inf)", [1e-9, 5], [0, -1, float("inf")]),
        (("a", 1), ["a", 1], ["b", 2]),
    ],
)
def test_ranges(allowed: Any, inside: list[Any], outside: list[Any]) -> None:
    assert all(ranges.inside(value, allowed) for value in inside)
    for value in outside:
        assert not ranges.inside(value, allowed)
        with pytest.raises(BitfrontError, match="knob"):
            ranges.refuse({"x": value, "other": None}, {"x": allowed, "absent": "1.."}, lambda key: f"knob {key}")


def test_a_recipe_needs_no_torch_to_be_checked() -> None:
    code = "import sys; sys.modules['torch'] = None; from bitfront.tasks.recipe import Recipe"
    code += "; Recipe(epochs=1, batch_size=2, lr=1)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    with pytest.raises(BitfrontError, match=r"train\.batch_size is positive"):
        Recipe(epochs=1, batch_size=0, lr=1.0)


# bad cells of a sweep


@pytest.mark.parametrize(
    ("words", "answer", "bad", "cells"),
    [
        ("quant=rtn bits=2,40,50", "bits is 1..15, got 40", 2, 3),
        ("quant=float seed=-1,-2,-3,-4,-5,-6,-7,8", "seed is 0..4294967295, got -5", 7, 8),
        ("quant=float,diffq task.dim=32,31", "task.heads must divide task.dim", 2, 4),
        ("quant=gptq group_size=0,8", "group_size is n or -1", 1, 2),
        ("quant=rtn,gptq init_from=/nowhere/a", "no such file", 2, 2),
    ],
)
def test_bad_cells_are_named_together_and_nothing_starts(
    tmp_path: Path, words: str, answer: str, bad: int, cells: int
) -> None:
    result = cli("run", "-m", *SMOKE, *words.split(), f"root={tmp_path}")
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert f"{bad} of {cells} cells cannot run, so none was started" in result.stderr and answer in result.stderr
    assert result.stderr.count("python -m src.run") == min(bad, SHOWN)
    assert (f"and {bad - SHOWN} more" in result.stderr) == (bad > SHOWN)
    assert not files(tmp_path) and not result.stdout


def test_finished_cells_need_no_torch(floats: Path) -> None:
    line = f"{' '.join(SMOKE)} quant=float root={floats}"
    single, sweep = without_torch(f"{line}", f"-m {line}")[0], without_torch(f"-m {line}")[-1]
    assert single.startswith("vit float") and sweep.startswith("finished before: vit float")


# networks


def test_help_and_errors_say_which_networks_there_are_and_for_which_tasks(tmp_path: Path) -> None:
    shown = usage().splitlines()
    at = next(n for n, line in enumerate(shown) if "timm.<name>" in line and "hf:<folder>" in line)
    assert "<package.module>:<function>" in shown[at] and "task=images" in shown[at + 1]
    wrong = cli("run", "task=resnet", "model=timm.resnet18", f"root={tmp_path}")
    assert "there is no model=timm.resnet18; choices: resnet" in wrong.stderr
    assert "task=resnet takes model=resnet20 | resnet18 | " in wrong.stderr
    assert "timm.<name> (task=efficientnet_imagenet, imagenet_small, images, " in wrong.stderr
    assert "hf:<folder> (task=" in wrong.stderr
    close = cli("run", "task=images", "data=generated", "model=torchvision.resnet80", f"root={tmp_path}")
    assert "torchvision.resnet50" in close.stderr, close.stderr


# the report's filters


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("task=vit-smok method=float", "task=vit-smok in '{}'; did you mean 'vit-smoke'? there are task=vit-smoke"),
        ("task=vit-smoke method=flot", "method=flot in '{}'; did you mean 'float'? there are method=float"),
        ("method=float,zzz", "method=zzz in '{}'; there are method=float"),
        ("max_size=abc taks=vit", "unknown option 'taks=vit'; did you mean 'task'?"),
    ],
)
def test_filters_of_the_report_say_what_there_is(floats: Path, words: str, answer: str) -> None:
    result = cli("report", str(floats), *words.split())
    assert result.returncode == 1 and answer.format(floats) in result.stderr and not result.stdout


# interrupts


def interrupted(*words: str, kept: str, status: int = 130) -> None:
    """A command that is interrupted ends in its status, and in one line without a traceback."""
    result = cli("run", *words)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it would hear no second one; pytest is to
    last = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert last == [f"interrupted; the same command goes on {kept}", str(status)], result.stderr


def at(n: int, real: Callable[..., Any], number: signal.Signals = signal.SIGINT) -> Callable[..., Any]:
    """A function that interrupts this process the n-th time that it is called."""
    calls = iter(range(1, 10**9))

    def wrapped(*arguments: Any, **options: Any) -> Any:
        if next(calls) == n:
            os.kill(os.getpid(), number)
        return real(*arguments, **options)

    return wrapped


WHILE_IMPORTING = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.{how})
sys.meta_path.insert(0, Finder())
sys.argv[1:] = {words!r}
from bitfront.commands import start
start({command!r})
"""


@pytest.mark.parametrize(
    ("command", "words", "module", "how", "status"),
    [
        ("run", ["task=vit", "quant=float", "root={}"], "torch._C", "SIGINT", 130),
        ("run", ["-m", "task=vit", "quant=float", "root={}"], "hydra.core.plugins", "SIGTERM", 143),
        ("run", ["task=vit", "quant=float", "root={}"], "omegaconf", "SIGUSR1", 138),
        ("report", ["results/records", "out={}"], "pandas", "SIGINT", 130),
    ],
)
def test_an_interrupt_during_imports(
    tmp_path: Path, command: str, words: list[str], module: str, how: str, status: int
) -> None:
    words = [word.format(tmp_path) for word in words]
    code = WHILE_IMPORTING.format(module=module, how=how, words=words, command=command)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    # CPython ends by the signal where that came in the middle of its own import machinery; shells say 130 to that, too
    assert done.returncode in (status, -(status - 128))
    assert done.stderr == "interrupted; the same command goes on from the beginning\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_an_interrupt_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, status: int
) -> None:
    words = (*SMOKE, "quant=float", f"root={tmp_path}")
    for n, kept in ((1, "from the beginning"), (2, "after its last finished epoch")):
        with monkeypatch.context() as patch:
            begins = training.Training.on_train_epoch_start
            patch.setattr(training.Training, "on_train_epoch_start", at(n, begins, number))
            interrupted(*words, kept=kept, status=status)
    assert cli("run", *words).stdout.startswith("resuming")


def test_an_interrupt_in_calibration(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (*SMOKE, "quant=gptq", f"root={root}")
    for n, kept in ((1, "after its float start"), (2, "after block 1")):
        with monkeypatch.context() as patch:
            patch.setattr(calibration, "quantize_block", at(n, calibration.quantize_block))
            interrupted(*words, kept=kept)
    assert "after block 1" in cli("run", *words).stdout


def test_an_interrupt_in_a_sweep_says_what_is_left(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("-m", *SMOKE, "quant=rtn", "bits=2,3,4", f"root={root}")
    with monkeypatch.context() as patch:
        patch.setattr(Cell, "execute", at(2, Cell.execute))
        interrupted(*words, kept="with the 2 of 3 cells that are not finished")
    assert cli("run", *words).stdout.count("finished before") == 1


# bars


class Terminal(io.StringIO):
    """A terminal that remembers what it has shown."""

    def isatty(self) -> bool:
        return True

    def pictures(self) -> list[str]:
        """Each line as it was drawn."""
        return [text for text in self.getvalue().replace("\r", "\n").splitlines() if text.strip()]


def until(holds: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_bar_moves_though_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with phase("loading"):
        until(lambda: len(set(screen.pictures())) > 2)
    assert all("loading" in picture for picture in screen.pictures())


def test_of_nested_bars_the_inner_one_has_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    outer = Bar(total=2, desc="training")
    with Bar(total=5, desc="validation"):
        before = len(screen.pictures())
        outer.update()
        until(lambda: len(screen.pictures()) > before + 2)
        assert all("validation" in picture for picture in screen.pictures()[before:])
    until(lambda: "training:  50%" in screen.pictures()[-1])
    clear()
    assert outer.disable and "\n" not in screen.getvalue()


def test_a_log_file_gets_no_line_of_what_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with phase("loading"):
        assert list(Bar(range(3))) == [0, 1, 2]
    assert not log.getvalue()


# dry runs


def test_a_dry_run_tells_and_does_nothing(root: Path) -> None:
    words = ("-m", *SMOKE, "quant=float,rtn,ste", "seed=0,1", f"root={root}", "cluster=local")
    before = files(root)
    result = cli("run", *words, "dry_run=true")
    assert result.returncode == 0 and files(root) == before, result.stderr
    lines = [line.split() for line in result.stdout.splitlines() if line.startswith("vit ")]
    states = [(line[1], "seed=1" in line, line[2].startswith("finished")) for line in lines]
    assert states == [("float", False, True), ("float", True, False)] + [
        (method, seed, False) for method in ("rtn", "ste") for seed in (False, True)
    ]
    assert (
        result.stdout.count("the start of 2 cells") == 2 and "6 cells, 1 finished; nothing was started" in result.stdout
    )
    assert [line[-1] == "unknown" for line in lines] == [False, False, True, True, False, False]
    assert "2 cells of unknown time" in result.stdout and "2 cells at once" in result.stdout


def test_a_dry_run_of_one_cell_shows_its_start_and_refuses_what_the_run_would(tmp_path: Path) -> None:
    result = cli("run", *SMOKE, "quant=lsq", f"root={tmp_path}", "dry_run=true")
    assert "to do, the start of 1 cell" in result.stdout and "1 cell, 0 finished" in result.stdout
    wrong = cli("run", *SMOKE, "task.dim=31", f"root={tmp_path}", "dry_run=true")
    assert wrong.returncode == 1 and "task.heads must divide" in wrong.stderr and not files(tmp_path)
    assert "dry_run takes true or false" in cli("run", *SMOKE, "dry_run=maybe").stderr
    assert "did you mean 'dry_run'?" in cli("run", *SMOKE, "dry_rum=true").stderr
    assert "leave out dry_run=" in cli("run", *SMOKE, "seed=1,2", "sweeper=optuna", "dry_run=true").stderr


def test_dry_run_is_no_part_of_a_cell(floats: Path) -> None:
    assert "finished before" in cli("run", *SMOKE, "quant=float", f"root={floats}", "dry_run=false").stdout


def test_a_dry_run_says_where_an_interrupted_run_goes_on(root: Path) -> None:
    words = [*SMOKE, "quant=ste", f"root={root}"]
    run = Cell(words).run()
    assert run is not None
    run.path.mkdir(parents=True)
    state = {"state_dict": {}, "optimizer_states": [], "pytorch-lightning_version": "2"}
    torch.save({**state, "bitfront": {"history": [{"epoch": 1}]}}, run.checkpoint)
    assert "goes on after epoch 1 of 2" in cli("run", *words, "dry_run=true").stdout
    run.checkpoint.unlink()
    (run.blocks / "a").mkdir(parents=True)
    (run.blocks / "a" / "0000.pt").touch()
    assert "goes on after block 1" in cli("run", *words, "dry_run=true").stdout
    with run.locked(wait=False):
        assert "is running" in cli("run", *words, "dry_run=true").stdout


def test_estimates_are_of_the_same_method_by_the_epoch_or_else_of_its_kind(floats: Path) -> None:
    (made,) = read_all(floats)

    def record(method: str, seconds: float, epochs: int, task: str = "vit") -> Record:
        config = made.config | {"train": made.config["train"] | {"epochs": epochs}}
        if method in ("rtn", "gptq"):
            config = config | {"quant": {"sft": False}}
        stages = {"train": {"seconds": seconds}, "evaluate": {"seconds": 1.0}}
        return replace(made, task=task, method=method, config=config, stages=stages)

    cell = compose.load([*SMOKE, "quant=lsq"])
    assert cell.values["train"]["epochs"] == 2
    records = [record("lsq", 10.0, 1), record("lsq", 40.0, 4), record("lsq", 90.0, 1), record("ste", 500.0, 2)]
    assert estimate(cell, records) == 21.0  # the median of 21, 21 and 181
    assert estimate(cell, records, left=0.5) == 11.0
    others = [record("ste", 30.0, 2), record("rtn", 3.0, 1), record("lsq", 7.0, 2, task="lm")]
    assert estimate(cell, others) == 31.0
    assert estimate(compose.load([*SMOKE, "quant=gptq"]), others) == 7.0  # nothing of 2 epochs in 3 s is training there
    assert estimate(cell, others[1:]) is None and estimate(compose.load(["task=vit", "quant=lsq"]), records) is None


def test_the_sum_is_shared_by_the_workers_after_the_starts() -> None:
    def part(seconds: float | None) -> Planned:
        return Planned(Cell([]), 0, "to do" if seconds != 0 else "finished", 1.0, seconds)

    lines = summary([part(600)], [part(600), part(600), part(1200), part(0)], 2, ["cpu"])
    assert lines == [
        "4 cells, 1 finished; nothing was started",
        "about 30 minutes by what finished runs took on cpu, 2 cells at once",
    ]
    assert "about 40 minutes" in summary([part(600)], [part(600), part(1800)], 8, ["cpu"])[1]
    assert "2 cells of unknown time" in summary([], [part(None), part(None)], 1, [])[1]
