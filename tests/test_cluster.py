"""Sweeps in processes of their own: every cluster ends with the same runs, whoever dies, and whoever else runs them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, cli, elsewhere, written
from joblib.externals.loky import get_reusable_executor

from bitfront import processes
from bitfront.cells.cell import Cell
from bitfront.cells.record import read_all
from bitfront.cells.runs import Run
from bitfront.commands import start

SMOKE = ("-m", "task=vit", "smoke=true", "trainer.accelerator=cpu", "wandb=disabled")


def test_what_a_start_fails_with_fails_its_cells() -> None:
    missing = cli("run", *SMOKE, "task=vit_cifar10", "smoke=false", "quant=rtn,gptq", "data_root=/nowhere")
    assert missing.returncode != 0 and "2 of 2 cells failed" in missing.stderr
    assert missing.stderr.count("the float network to start from: no images in '/nowhere/cifar10") == 2


def test_parallel_and_serial_give_the_same_artifacts(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a start, which is trained once."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # in the workers, as here; sums depend on it
    words = (*SMOKE, "quant=diffq,gptq")
    parallel = cli("run", *words, "cluster=local", f"root={tmp_path / 'parallel'}")
    get_reusable_executor().shutdown(kill_workers=True)
    serial = cli("run", *words, f"root={root}")
    assert (parallel.returncode, serial.returncode) == (0, 0), (parallel.stderr, serial.stderr)
    assert "first 1 float networks to start from" in parallel.stdout
    hashes = [{r.id: r.artifact_sha256 for r in read_all(place)} for place in (tmp_path / "parallel", root / "vit")]
    assert hashes[0] == hashes[1] and len(hashes[0]) == 3


def test_killed_and_rerun_a_sweep_redoes_only_what_was_unfinished(root: Path) -> None:
    words = (*SMOKE, "quant=diffq", "penalty=1,2,3,4", "train.epochs=6", f"root={root}")
    running = elsewhere(root, start, "run", (*words, "cluster=local"))
    deadline = time.monotonic() + 120
    while not (finished := [r.id for r in read_all(root) if r.method == "diffq"]):
        assert running.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
    running.kill()
    running.join()
    while any(Run(path).held() for path in (root / "vit" / "diffq").iterdir()):  # the workers end with it
        assert time.monotonic() < deadline
        time.sleep(0.1)
    before = written(root)
    finished = [i for i in before if i in finished]
    assert len(before) < 5  # with the start's
    result = cli("run", *words)  # wherever: the cluster is no part of a cell
    assert result.returncode == 0, result.stderr
    after = written(root)
    assert len(after) == 5 and {i: after[i] for i in before} == before
    assert result.stdout.count("finished before") == len(before) - 1


def test_an_interrupted_sweep_ends_with_its_workers_in_one_line(root: Path) -> None:
    """A terminal's Ctrl-C goes to all processes in it."""
    words = (*SMOKE, "quant=diffq", "penalty=range(1,20)", f"root={root}", "cluster=local")
    running = elsewhere(root, start, "run", words)
    deadline = time.monotonic() + 120
    while not list((root / "vit").glob("diffq/*/last.ckpt")):
        assert running.pid and running.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGINT)
    running.join(60)
    assert running.exitcode in (130, -signal.SIGINT)
    told = (root / "err").read_text()
    assert re.fullmatch(r"interrupted; the same command goes on with the 1\d of 19 cells that are not finished\n", told)
    while any(Run(path).held() for path in (root / "vit" / "diffq").iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_two_sweeps_on_the_same_cells_share_them(root: Path) -> None:
    words = (*SMOKE, "quant=diffq", "penalty=1,2,3", "train.epochs=6", f"root={root}")
    other = elsewhere(root, start, "run", words)
    while not any(Run(path).held() for path in (root / "vit").glob("diffq/*")):
        assert other.is_alive()
        time.sleep(0.02)
    here = cli("run", *words)
    other.join(200)
    outputs = [here.stdout, (root / "out").read_text()]
    assert (here.returncode, other.exitcode) == (0, 0), (outputs, here.stderr)
    assert len(read_all(root)) == 4
    lines = [line for out in outputs for line in out.splitlines()]
    found = sum(line.startswith("finished before; to run it again") for line in lines)
    assert sum(line.startswith("vit diffq") for line in lines) - found == 3, outputs  # each once, in one of the two


def test_each_cell_in_two_processes(root: Path) -> None:
    result = cli("run", *SMOKE, "quant=gptq", "trainer.devices=2", "cluster=local_ddp", f"root={root}", "seed=1")
    assert result.returncode == 0, result.stderr
    processes = {r.method: r.processes for r in read_all(root) if r.seed == 1}
    assert processes == {"float": 2, "gptq": 2}
    assert result.stdout.count("smaller than float") == 2


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


@pytest.mark.slow
def test_a_job_at_its_time_limit_is_started_again_and_goes_on(tmp_path: Path) -> None:
    """As on SLURM, by submitit on this machine: it is warned after half of the minute that it has."""
    words = ("-m", "task=vit", "quant=float", "train.epochs=1000", *SMOKE[3:], f"root={tmp_path}", "trainer.devices=1")
    running = elsewhere(tmp_path, start, "run", (*words, "cluster=local_ddp", "hydra.launcher.timeout_min=1"))
    try:
        deadline, told = time.monotonic() + 150, ""
        while "after its last finished epoch" not in told:
            assert running.is_alive() and time.monotonic() < deadline, told
            time.sleep(1)
            told = "".join(log.read_text() for log in tmp_path.glob(".submitit/*/*_log.*"))
        assert "Requeued" in told
    finally:
        os.killpg(running.pid or 0, signal.SIGKILL)


@pytest.mark.slow
def test_on_ray_a_cell_whose_node_dies_goes_on_at_another(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    from ray.cluster_utils import Cluster

    result = cli("run", *SMOKE, "quant=rtn,gptq", "cluster=ray", f"root={root}")  # a cluster of its own
    assert result.returncode == 0, result.stderr
    assert sorted(r.method for r in read_all(root)) == ["float", "gptq", "rtn"]

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else they wait for whatever else this machine does
    there = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    mortal = there.add_node(num_cpus=1)
    try:
        words = (
            "-m",
            "task=vit",
            "quant=float",
            "seed=1,2",
            "train.epochs=10",
            *SMOKE[3:],
            f"root={root}",
            "cluster=ray",
        )
        running = elsewhere(root, start, "run", (*words, f"hydra.launcher.ray.init.address={there.address}"))
        deadline = time.monotonic() + 200
        while len(list((root / "vit").glob("float/*/last.ckpt"))) < 2:
            assert running.is_alive() and time.monotonic() < deadline, (root / "err").read_text()
            time.sleep(0.1)
        there.remove_node(mortal, allow_graceful=False)
        running.join(300)
    finally:
        there.shutdown()
    assert running.exitcode == 0, (root / "err").read_text()
    assert sorted(r.seed for r in read_all(root) if r.method == "float" and not r.smoke) == [1, 2]
    assert (root / "out").read_text().count("after its last finished epoch") == 1


def test_numbers_of_processes_that_are_not_the_cells_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_devices", 1)
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", *processes.COUNTED):
        monkeypatch.delenv(name, raising=False)
    for name in ("SLURM_PROCID", "LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "3")
        assert processes.rank() == 0 and not processes.several(), name
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # as torchrun does
    assert processes.rank() == 3 and processes.several()
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name)
    processes.expect(4)  # each started by srun
    assert processes.rank() == 3 and processes.several()
