"""The commands, end to end, as a user runs them: run, skip, resume, evaluate, report, fail clearly."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, cli, elsewhere

from bitfront.cells.cell import Cell
from bitfront.cells.provenance import environment
from bitfront.cells.record import Record, read, read_all
from bitfront.cells.runs import Run
from bitfront.commands.evaluate import compared
from bitfront.downloads import sha256
from bitfront.errors import BitfrontError
from bitfront.quant.storage.artifact import Artifact

SMOKE = ("task=vit", "smoke=true", "trainer.accelerator=cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep over every method, once for this file."""
    root = tmp_path_factory.mktemp("runs")
    result = cli("run", "-m", *SMOKE, "quant=glob(*)", f"root={root}")
    assert result.returncode == 0, result.stderr
    return root


def only(root: Path, method: str) -> Path:
    """The one run directory of a method."""
    (path,) = (root / "vit" / method).iterdir()
    return path


def record_of(path: Path) -> Record:
    """Of a run directory."""
    record = read(path / "record.json")
    assert record
    return record


def test_every_method_leaves_a_file_and_a_record(root: Path) -> None:
    records = {record.method: record for record in read_all(root)}
    assert set(records) == {path.stem for path in (REPOSITORY / "conf" / "quant").glob("*.yaml")}
    start = records["float"].artifact_sha256
    for method, record in records.items():
        artifact = only(root, method) / "model.safetensors"
        assert record.sizes.file == artifact.stat().st_size
        assert record.artifact_sha256 == sha256(artifact)
        assert record.primary.value == record.metrics["test"]["top1"]
        assert record.init_sha256 in ((None,) if method == "float" else (start, None))
        assert {"git", "packages", "machine"} <= set(record.environment)
        assert not (only(root, method) / "last.ckpt").exists()
        if method != "float":
            assert record.sizes.file < 0.5 * records["float"].sizes.file
            rule, coded = record.sizes.rule_mb * 2**20, method == "diffq"  # widths, in fewer bits than by the rule
            assert rule * (0.95 if coded else 0.98) <= record.sizes.payload <= rule * 1.02
    assert len(records["diffq"].history) == 2
    assert {"train/loss", "valid/top1", "size_mb"} <= set(records["diffq"].history[0])


def test_evaluation_of_the_file_repeats_the_record(root: Path) -> None:
    for method in ("float", "diffq", "lsq"):
        path = only(root, method)
        result = cli("evaluate", f"artifact={path / 'model.safetensors'}", "accelerator=cpu")
        assert "the same as in its record" in result.stdout, result.stdout + result.stderr
        assert repr(record_of(path).metrics["test"]["top1"]) in result.stdout


def test_evaluation_says_by_how_much_the_record_differs(root: Path) -> None:
    metrics = {"valid": {"loss": 0.5}, "test": {"loss": 0.2, "top1": math.nan}}
    recorded = replace(record_of(only(root, "rtn")), metrics=metrics, device="H100")
    measured = {"valid": {"loss": 0.5}, "test": {"loss": 0.2, "top1": math.nan, "new": 1.0}}
    assert compared(measured, recorded) == "the same as in its record"
    measured["test"]["loss"] = 0.201
    assert "made on H100, differs by up to 0.5 %" in compared(measured, recorded)
    for wrong in ({"loss": math.nan}, {"top1": 3.0}):
        assert "inf %" in compared(measured | {"test": measured["test"] | wrong}, recorded)


def test_evaluation_needs_nothing_but_the_file(root: Path, tmp_path: Path) -> None:
    shutil.copy(only(root, "diffq") / "model.safetensors", tmp_path / "x.safetensors")
    result = cli("evaluate", f"artifact={tmp_path / 'x.safetensors'}", "accelerator=cpu")
    assert result.returncode == 0 and "top1" in result.stdout and "record" not in result.stdout


CRAFTED: dict[str, Any] = {
    "a class": {"task": "leaves_a_mark.Task"},
    "a target": {"task": {"_target_": "leaves_a_mark.Task"}},
    "a target among the values": {"config": {"task": {"_target_": "leaves_a_mark.Task"}}},
    "a function": {"task": "os.system", "config": {"task": {"command": "touch mark"}}},
    "a place for a task": {"task": "../../elsewhere/task"},
    "a module for a network": {"task": "resnet", "config": {"task": {"network": "leaves_a_mark.build"}}},
    "a folder for data": {"config": {"task": {"data": "../../etc"}}},
    "a home for data": {"config": {"task": {"data": "~"}}},
    "an unknown key": {"config": {"task": {"loader": "leaves_a_mark"}}},
    "another type": {"config": {"task": {"dim": "leaves_a_mark"}}},
    "a place for the language model": {"task": "asr", "config": {"task": {"lm": "leaves_a_mark", "beam": 5}}},
    "another type of the same value": {"config": {"task": {"depth": 2.0}}},
    "true for a number": {"config": {"task": {"depth": True}}},
    "an element of another type": {"task": "resnet", "config": {"task": {"mean": ["leaves_a_mark"]}}},
    "a mapping within a list": {"task": "separation", "config": {"task": {"sources": ["a", {"b": "leaves_a_mark"}]}}},
    "an unknown key within a mapping": {"task": "separation", "config": {"task": {"demucs": {"leaves": 1}}}},
    "what evaluation does not need": {"config": {"train": {"workers": 100}}},
    "no network": {"config": {"task": {"dim": -32}}},
    "no mapping": {"config": ["leaves_a_mark"]},
    "a nested class": {"task": "separation", "config": {"task": {"demucs": {"_target_": "leaves_a_mark.Task"}}}},
    "nothing": {"task": None},
}


@pytest.mark.parametrize("about", CRAFTED.values(), ids=CRAFTED)
def test_a_file_decides_on_no_code_and_no_place(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, about: dict[str, Any]
) -> None:
    """A crafted header is refused in one line, and nothing that it names is imported, called or read."""
    (tmp_path / "leaves_a_mark.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass Task: pass\nbuild = Task")
    monkeypatch.syspath_prepend(str(tmp_path))
    artifact = Artifact.load(only(root, "rtn") / "model.safetensors")
    artifact.about = artifact.about | about
    artifact.save(tmp_path / "crafted.safetensors")
    result = cli("evaluate", f"artifact={tmp_path / 'crafted.safetensors'}", "accelerator=cpu")
    assert result.returncode == 1 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result
    assert not (tmp_path / "mark").exists() and "leaves_a_mark" not in sys.modules


def test_what_a_file_may_not_say_a_user_may(root: Path, tmp_path: Path) -> None:
    """A run with a place in its task is measured again where the user gives the place."""
    artifact = Artifact.load(only(root, "rtn") / "model.safetensors")
    artifact.about["config"]["task"]["data"] = "sub/generated"
    artifact.save(tmp_path / "x.safetensors")
    words = ("evaluate", f"artifact={tmp_path / 'x.safetensors'}", "accelerator=cpu")
    assert "give task.data=<place> yourself" in cli(*words).stderr
    assert "top1" in cli(*words, "task.data=generated").stdout
    artifact.about = {}
    artifact.save(tmp_path / "x.safetensors")
    assert "give task=<name>" in cli(*words).stderr


def test_a_checkpoint_is_data(tmp_path: Path) -> None:
    """What Lightning resumes from is read without the power to call."""
    import torch

    words = [*SMOKE, "quant=float", f"root={tmp_path}", "wandb=disabled"]
    run = Cell(words).run()
    assert run is not None
    run.path.mkdir(parents=True)
    torch.save({"state_dict": Mark(tmp_path / "mark")}, run.checkpoint)
    result = cli("run", *words)
    assert result.returncode == 0 and "could run any code" in result.stderr, result.stderr
    assert not (tmp_path / "mark").exists() and (run.path / "last.ckpt.damaged").exists()


class Mark:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("damage", ["rotten", "removed"])
def test_a_finished_cell_whose_file_is_another_is_run_again(root: Path, tmp_path: Path, damage: str) -> None:
    for method in ("float", "rtn"):
        shutil.copytree(root / "vit" / method, tmp_path / "vit" / method)
    artifact = only(tmp_path, "rtn") / "model.safetensors"
    data = bytearray(artifact.read_bytes())
    data[-1] ^= 1
    artifact.write_bytes(data) if damage == "rotten" else artifact.unlink()
    words = [*SMOKE, "quant=rtn", f"root={tmp_path}", "wandb=disabled"]
    assert "is run again" in cli("run", *words, "dry_run=true").stdout
    result = cli("run", *words)
    assert result.returncode == 0 and "is run again" in result.stdout
    assert sha256(artifact) == record_of(only(root, "rtn")).artifact_sha256


def test_a_finished_cell_leaves_nothing_of_its_interruptions(root: Path) -> None:
    path = only(root, "gptq")
    (path / "last.ckpt").write_bytes(b"x")
    (path / "blocks" / "y").mkdir(parents=True)
    assert "finished before" in cli("run", *SMOKE, "quant=gptq", f"root={root}").stdout
    assert not (path / "last.ckpt").exists() and not (path / "blocks").exists()


def test_a_finished_cell_is_not_run_again(root: Path) -> None:
    before = (only(root, "diffq") / "record.json").stat().st_mtime_ns
    result = cli("run", *SMOKE, "quant=diffq", f"root={root}")
    assert "finished before" in result.stdout and result.returncode == 0
    assert (only(root, "diffq") / "record.json").stat().st_mtime_ns == before


KILLED = """
import os, signal, sys
from bitfront.cells import training
from bitfront.cells.cell import Cell
real = training.Training.training_step
def step(self, batch, index):
    if self.current_epoch == 1 and index == 1 and self.model.names:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, batch, index)
training.Training.training_step = step
Cell(sys.argv[1:]).execute()
"""


def run_code(code: str, words: list[str]) -> None:
    sys.argv = ["-c", *words]
    exec(code, {"__name__": "__main__"})


def killed(folder: Path, code: str, words: list[str]) -> int | None:
    """How a process of its own ends."""
    process = elsewhere(folder, run_code, code, words)
    process.join(300)
    return process.exitcode


@pytest.mark.parametrize("method", ["diffq", "lsq", "diffq_lsq"])
def test_killed_and_rerun_ends_like_an_uninterrupted_run(root: Path, tmp_path: Path, method: str) -> None:
    words = [*SMOKE, f"quant={method}", f"root={tmp_path}", "wandb=disabled"]
    shutil.copytree(root / "vit" / "float", tmp_path / "vit" / "float")
    assert killed(tmp_path, KILLED, words) == -signal.SIGKILL
    path = only(tmp_path, method)
    assert (path / "last.ckpt").is_file() and not (path / "record.json").exists()
    if method == "lsq":  # whose checkpoint has rotted
        data = bytearray((path / "last.ckpt").read_bytes())
        data[len(data) // 2] ^= 1
        (path / "last.ckpt").write_bytes(data)
    assert cli("run", *words).returncode == 0
    assert (path / "last.ckpt.damaged").exists() == (method == "lsq")
    again, straight = record_of(path), record_of(only(root, method))
    assert again.artifact_sha256 == straight.artifact_sha256
    assert again.metrics == straight.metrics and again.history == straight.history


KILLED_CALIBRATING = """
import os, signal, sys
from bitfront.cells.cell import Cell
from bitfront.quant.engine import calibration
real = calibration.quantize_block
def quantize(*arguments):
    if arguments[-1] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
calibration.quantize_block = quantize
Cell(sys.argv[1:]).execute()
"""


TUNED = ["quant.sft=true", "quant.sft_codes=true", "quant.distill=0.5", "train.epochs=2"]


@pytest.mark.parametrize("words", [["J=2"], TUNED], ids=["calibrating", "fine-tuning"])
def test_killed_after_some_blocks_and_rerun_ends_like_an_uninterrupted_run(
    root: Path, tmp_path: Path, words: list[str]
) -> None:
    words = [*SMOKE, "quant=decoupleq", *words, "wandb=disabled"]
    for name in "ab":
        shutil.copytree(root / "vit" / "float", tmp_path / name / "vit" / "float")
    code = KILLED if "quant.sft=true" in words else KILLED_CALIBRATING
    assert killed(tmp_path, code, [*words, f"root={tmp_path / 'a'}"]) == -signal.SIGKILL
    path = only(tmp_path / "a", "decoupleq")
    assert list(path.glob("blocks/*/0000.pt")) and not (path / "record.json").exists()
    resumed, straight = (cli("run", *words, f"root={tmp_path / name}") for name in "ab")
    assert resumed.returncode == straight.returncode == 0, resumed.stderr
    assert "resuming" in resumed.stdout
    again, once = (record_of(only(tmp_path / name, "decoupleq")) for name in "ab")
    assert again.artifact_sha256 == once.artifact_sha256 and again.metrics == once.metrics
    names = [[layer["name"] for layer in record.calibration["layers"]] for record in (again, once)]
    assert names[0] == names[1] and set(names[0]) == set(once.widths)
    assert len(once.history) == (2 if "quant.sft=true" in words else 0)
    assert not (path / "blocks").exists() and not (path / "last.ckpt").exists()


def test_training_follows_the_float_network_that_it_starts_from(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "vit" / "float", tmp_path / "vit" / "float")
    words = [*SMOKE, "quant=lsq", "bits=8", "train.epochs=1", "train.lr=1e-6", f"root={tmp_path}", "wandb=disabled"]
    labels, answers = (Cell([*words, f"quant.distill={share}"]).execute() for share in (0, 1))
    # From float weights in 8 bits, the network is at what it follows; at the labels it is not.
    assert answers.history[0]["train/loss"] < 0.05 * labels.history[0]["train/loss"]
    with pytest.raises(BitfrontError, match="init_from=float"):
        Cell([*words, "quant.distill=1", "init_from=null"]).execute()


def test_layers_with_settings_of_their_own_from_the_command_line(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "vit" / "float", tmp_path / "vit" / "float")
    result = cli(
        "run", *SMOKE, "quant=gptq", "quant.layers={blocks.0.*: {bits: 8}}", f"root={tmp_path}", "wandb=disabled"
    )
    assert result.returncode == 0, result.stderr
    widths = record_of(only(tmp_path, "gptq")).widths
    assert {name: len(counts) - 1 for name, counts in widths.items()} == {
        name: 8 if name.startswith("blocks.0.") else 4 for name in widths
    }


def test_start_from_an_artifact_given_by_path(root: Path, tmp_path: Path) -> None:
    start = only(root, "float") / "model.safetensors"
    result = cli("run", *SMOKE, "quant=rtn", f"init_from={start}", f"root={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert record_of(only(tmp_path, "rtn")).init_sha256 == sha256(start)
    # The same start under another name is the same cell.
    assert only(tmp_path, "rtn").name == only(root, "rtn").name


def test_report_of_the_runs(root: Path, tmp_path: Path) -> None:
    result = cli("report", str(root), f"out={tmp_path}")
    assert result.returncode == 0
    names = {path.name for path in tmp_path.iterdir()}
    tables = {f"vit-smoke.{kind}" for kind in ("csv", "md", "tex", "png", "svg")}
    assert names == tables | {"vit-smoke_bits.svg", "vit-smoke_layers.svg", "report.html"}
    for method in ("float", "rtn", "gptq", "decoupleq", "ste", "lsq", "diffq"):
        assert method in result.stdout and method in (tmp_path / "vit-smoke.md").read_text()


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (("quant=rtn", "init_from=null"), "give init_from=float"),
        (("quant=rtn", "init_from=/nowhere/x"), "no such file"),
        (("quant=rtn", "bits=16", "init_from=null"), "1..15, got 16"),
        (("quant=gptq", "train.epochs=3"), "quant=gptq does not train, so train.epochs means nothing"),
        (("quant=gptq", "quant.layers=3"), "quant.layers takes a mapping"),
        (("trainer.devices=0",), "trainer.devices is positive"),
        (("task=vit_cifar10", "smoke=false", "data_root=/nowhere"), "no images in '/nowhere/cifar10"),
        (("root=/proc/nowhere",), "choose another root"),
        (("train.lr=1e30", "quant=float"), "lower train.lr"),
        (("-m", "trainer.devices=2"), "sweep in one process cannot use several devices"),
        (("train.batch_size=0",), "train.batch_size is positive"),
    ],
)
def test_a_users_mistake_is_one_clear_message(words: tuple[str, ...], answer: str, tmp_path: Path) -> None:
    result = cli("run", *SMOKE, f"root={tmp_path}", *words)
    assert result.returncode != 0
    assert answer in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    assert len([line for line in result.stderr.splitlines() if "error:" in line]) == 1


def test_a_failed_cell_is_recorded_does_not_stop_the_sweep_and_is_tried_again(tmp_path: Path) -> None:
    result = cli("run", "-m", *SMOKE, "train.lr=1e30,1e-3", f"root={tmp_path}")
    assert result.returncode != 0 and "lower train.lr" in result.stderr
    records = [json.loads(p.read_text()) for p in tmp_path.rglob("record.json")]
    assert sorted(r["status"] for r in records) == ["failed", "finished"]
    assert len(read_all(tmp_path)) == 1
    assert "lower train.lr" in cli("run", *SMOKE, "train.lr=1e30", f"root={tmp_path}").stderr


def test_a_sweep_over_methods_can_fix_options_that_only_they_have(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "vit" / "float", tmp_path / "vit" / "float")
    words = ("quant=rtn,gptq", "bits=3", "quant.samples=64", "quant.layers={head*: {bits: 2}}", "quant.min_size=0.0")
    result = cli("run", "-m", *SMOKE, *words, f"root={tmp_path}", "wandb=disabled")
    assert result.returncode == 0, result.stderr
    records = [r for r in read_all(tmp_path) if r.method != "float"]
    assert sorted(r.method for r in records) == ["gptq", "rtn"]
    for r in records:
        assert r.config["bits"] == 3 and r.config["quant"]["samples"] == 64 and len(r.widths["head.weight"]) == 3


HOLD = """
import sys
from pathlib import Path
from bitfront.cells.runs import Run
with Run(Path(sys.argv[1])).locked(wait=False):
    print("held", flush=True)
    input()
"""


def test_a_cell_that_is_running_elsewhere_is_left_alone(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "vit" / "float" / only(root, "float").name
    words = [sys.executable, "-c", HOLD, str(path)]
    holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "held\n" and Run(path).held()
    result = cli("run", *SMOKE, "quant=float", f"root={tmp_path}")
    assert result.returncode != 0 and f"running already (process {holder.pid} on " in result.stderr, result.stderr
    holder.communicate("\n")
    assert not Run(path).held()


@pytest.mark.parametrize("damage", ["artifact", "start"])
def test_damaged_files_are_named(root: Path, tmp_path: Path, damage: str) -> None:
    data = (only(root, "float") / "model.safetensors").read_bytes()
    broken = tmp_path / "broken"
    broken.write_bytes(data[:-100])
    words = ("evaluate", f"artifact={broken}")
    if damage == "start":
        words = ("run", *SMOKE, "quant=rtn", f"init_from={broken}", f"root={tmp_path}")
    result = cli(*words)
    assert result.returncode != 0 and "damaged" in result.stderr and "Traceback" not in result.stderr


def test_a_folder_of_any_name(root: Path, tmp_path: Path) -> None:
    place = tmp_path / "Läufe, a=b (1)" / "wandb"
    shutil.copytree(root / "vit", place / "vit")
    assert cli("run", *SMOKE, "quant=rtn", f"root={place}").returncode == 0
    sweep = cli("run", "-m", *SMOKE, "quant=rtn", "bits=4,3,2", f"root={place}")
    assert sweep.returncode == 0 and sweep.stdout.count("finished before") == 1, sweep.stderr
    found = [r for r in read_all(place) if r.method == "rtn"]
    assert len(found) == 3
    assert cli("report", str(place)).returncode == 0 and (place / "report" / "report.html").is_file()
    assert "the same as in its record" in cli("evaluate", f"artifact={found[-1].artifact}").stdout


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
def test_interrupt_keeps_what_was_computed(tmp_path: Path, how: str) -> None:
    words = [*SMOKE, "quant=float", f"root={tmp_path}", "wandb=disabled"]
    code = KILLED.replace("SIGKILL", how).replace(" and self.model.names", "")
    assert killed(tmp_path, code, words) not in (0, None)
    assert (only(tmp_path, "float") / "last.ckpt").is_file()
    assert cli("run", *words).returncode == 0


def test_a_start_has_the_network_that_model_names() -> None:
    start = Cell(["task=resnet", "model=mobilenet", "quant=lsq", "bits=3", "root=x"]).start
    assert start and start.words == ["task=resnet", "model=mobilenet", "root=x", "quant=float"]
    trained_on = Cell(["task=resnet", "quant=float", "init_from=float", "train.epochs=2", "train.lr=0.01"])
    assert trained_on.start and trained_on.start.words == ["task=resnet", "quant=float"]
    assert trained_on.start.start is None


def test_half_precision_without_a_gpu_is_no_other_precision(tmp_path: Path) -> None:
    result = cli("run", *SMOKE, "quant=float", "trainer.precision=16-mixed", f"root={tmp_path}")
    assert result.returncode and "16-mixed is for GPUs; choose bf16-mixed" in result.stderr
    assert not read_all(tmp_path)


def test_code_and_configuration_make_a_run_dirty_and_nothing_else_does(tmp_path: Path) -> None:
    for name in ("src/errors.py", "conf/a.yaml", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a")
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*git, *words], check=True)

    def about() -> dict[str, Any]:
        return environment(tmp_path / "src", tmp_path / "conf")

    def dirty(name: str) -> bool:
        before = (tmp_path / name).read_text() if (tmp_path / name).exists() else None
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("b")
        found = about()["dirty"]
        (tmp_path / name).unlink() if before is None else (tmp_path / name).write_text(before)
        assert not about()["dirty"]
        return bool(found)

    assert all(dirty(name) for name in ("src/errors.py", "src/new.py", "conf/a.yaml", "conf/new.yaml"))
    assert not any(dirty(name) for name in ("README.md", "tuning/record.json"))
    installed = tmp_path / "venv" / "bitfront"  # within a repository that does not know it
    installed.mkdir(parents=True)
    assert (environment(installed, installed)["git"], environment(installed, installed)["dirty"]) == (None, False)
