"""Sweeps in processes of their own: every cluster ends with the same runs, whoever dies, and whoever else runs them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, cli, command, written

from bitfront.cells.cell import Cell
from bitfront.cells.record import read_all
from bitfront.cells.runs import Run

SMOKE = ("-m", "task=vit", "smoke=true", "trainer.accelerator=cpu", "wandb=disabled")


def test_a_start_is_trained_once_and_what_it_fails_with_fails_its_cells(tmp_path: Path) -> None:
    words = (*SMOKE, "quant=rtn,gptq", f"root={tmp_path}", "cluster=local")
    result = command("src.run", *words)
    assert result.returncode == 0, result.stderr
    assert sorted(r.method for r in read_all(tmp_path)) == ["float", "gptq", "rtn"]
    missing = cli("run", *SMOKE, "task=vit_cifar10", "smoke=false", "quant=rtn,gptq", "data_root=/nowhere")
    assert missing.returncode != 0 and "2 of 2 cells failed" in missing.stderr
    assert missing.stderr.count("the float network to start from: no images in '/nowhere/cifar10") == 2


def test_parallel_and_serial_give_the_same_artifacts(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as workers of two cores have; sums depend on it
    shutil.copytree(root / "vit", tmp_path / "serial" / "vit")
    words = (*SMOKE, "quant=diffq,gptq")
    both = [("cluster=local", f"root={root}"), (f"root={tmp_path / 'serial'}",)]
    assert all(command("src.run", *words, *where).returncode == 0 for where in both)
    hashes = [{r.id: r.artifact_sha256 for r in read_all(place / "vit")} for place in (root, tmp_path / "serial")]
    assert hashes[0] == hashes[1] and len(hashes[0]) == 3


def test_killed_and_rerun_a_sweep_redoes_only_what_was_unfinished(root: Path) -> None:
    words = (*SMOKE, "quant=diffq", "penalty=1,2,3,4", "train.epochs=6", f"root={root}", "cluster=local")
    running = subprocess.Popen([sys.executable, "-m", "src.run", *words], cwd=REPOSITORY)
    deadline = time.monotonic() + 120
    while not (finished := [r.id for r in read_all(root) if r.method == "diffq"]):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    while any(Run(path).held() for path in (root / "vit" / "diffq").iterdir()):  # the workers end with it
        assert time.monotonic() < deadline
        time.sleep(0.1)
    before = written(root)
    finished = [i for i in before if i in finished]
    assert len(before) < 5  # with the start's
    result = command("src.run", *words)
    assert result.returncode == 0, result.stderr
    after = written(root)
    assert len(after) == 5 and {i: after[i] for i in before} == before
    assert result.stdout.count("finished before") == len(before) - 1


def test_an_interrupted_sweep_ends_with_its_workers_in_one_line(root: Path) -> None:
    """A terminal's Ctrl-C goes to all processes in it."""
    words = (*SMOKE, "quant=diffq", "penalty=range(1,20)", f"root={root}", "cluster=local")
    command_line = [sys.executable, "-m", "src.run", *words]
    running = subprocess.Popen(command_line, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list((root / "vit").glob("diffq/*/last.ckpt")):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGINT)
    _, told = running.communicate(timeout=60)
    assert running.returncode in (130, -signal.SIGINT)
    assert re.fullmatch(r"interrupted; the same command goes on with the 1\d of 19 cells that are not finished\n", told)
    while any(Run(path).held() for path in (root / "vit" / "diffq").iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_two_sweeps_on_the_same_cells_share_them(root: Path) -> None:
    words = [sys.executable, "-m", "src.run", *SMOKE, "quant=diffq", "penalty=1,2,3", "train.epochs=6", f"root={root}"]
    both = [subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert len(read_all(root)) == 4
    lines = [line for out in outputs for line in out.splitlines()]
    found = sum(line.startswith("finished before; to run it again") for line in lines)
    assert sum(line.startswith("vit diffq") for line in lines) - found == 3, outputs  # each once, in one of the two


def test_each_cell_in_two_processes(root: Path) -> None:
    result = command(
        "src.run", *SMOKE, "quant=diffq,gptq", "trainer.devices=2", "cluster=local_ddp", f"root={root}", "seed=1"
    )
    assert result.returncode == 0, result.stderr
    processes = {r.method: r.processes for r in read_all(root) if r.seed == 1}
    assert processes == {"float": 2, "diffq": 2, "gptq": 1}  # calibration is for one
    assert result.stdout.count("smaller than float") == 3


@pytest.mark.slow
def test_a_cell_in_two_processes_that_runs_elsewhere_is_waited_for(root: Path) -> None:
    """The second process must not wait for the first where it never comes."""
    words = ["task=vit", "smoke=true", "quant=float", "trainer.devices=2", f"root={root}", "trainer.accelerator=cpu"]
    run = Cell(words).run()
    assert run is not None
    with run.locked(wait=False):
        command_line = [sys.executable, "-m", "src.run", "-m", *words, "wandb=disabled", "cluster=local_ddp"]
        running = subprocess.Popen(command_line, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        assert running.stdout is not None
        while "waiting for 1 cells" not in (line := running.stdout.readline()):
            assert line, "it ended"
    assert running.wait(timeout=200) == 0
    record = run.finished()
    assert record and record.processes == 2
