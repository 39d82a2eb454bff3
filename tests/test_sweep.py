"""Sweeps: every cluster ends with the same runs; failures, deaths and other sweeps cost only the cell they hit."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import REPOSITORY, cli, written
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from bitfront.cells import compose
from bitfront.cells.cell import Cell
from bitfront.cells.check import check
from bitfront.cells.record import Record, read_all
from bitfront.cells.runs import Run
from bitfront.errors import BitfrontError, BusyError
from bitfront.sweeps import search, workers
from bitfront.sweeps.grid import grid
from bitfront.sweeps.sweep import Attempt, Sweep

SMOKE = ("-m", "task=vit", "smoke=true", "trainer.accelerator=cpu", "wandb=disabled")


def test_what_failed_is_listed_with_its_command_and_only_that_is_run_again(root: Path) -> None:
    words = (*SMOKE, "quant=float", "train.lr=1e30,1e-3", f"root={root}")
    result = cli("run", *words)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    report = result.stderr.partition("1 of 2 cells failed")[2]
    assert "lower train.lr" in report
    before = written(root)
    (line,) = (line.split() for line in report.splitlines() if "python -m src.run" in line)
    assert line[:3] == ["python", "-m", "src.run"] and compose.load(line[3:]).values["train"]["lr"] == 1e30
    repeated = cli("run", *words)
    assert "finished before: vit float train.lr=" in repeated.stdout and "1 of 2 cells failed" in repeated.stderr
    after = written(root)
    finished = {r.id for r in read_all(root)}
    assert {i: t for i, t in after.items() if i in finished} == {i: t for i, t in before.items() if i in finished}


@pytest.fixture
def sweep(root: Path) -> Any:
    """A sweep without a cluster: its launcher is the test's."""
    with initialize_config_dir(str(compose.CONF), version_base="1.3"):
        yield Sweep([f"root={root}"])


class Dying:
    """A launcher whose process dies with every cell of some width."""

    def __init__(self, bits: str, finished: Record) -> None:
        self.bits, self.finished, self.batches = bits, finished, []  # type: ignore[var-annotated]

    def launch(self, batch: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
        self.batches.append([next(w for w in words if w.startswith("bits=")) for words in batch])
        for words in batch:
            run = Cell(words).run()
            assert run is not None
            with run.locked(wait=False):
                if self.bits in words:
                    raise RuntimeError("a worker is gone")
                shutil.copy(self.finished.artifact, run.artifact)
                run.finish(self.finished)
        return [SimpleNamespace(return_value=(False, "")) for _ in batch]


def test_a_process_that_dies_takes_no_other_cell_with_it(root: Path, sweep: Sweep) -> None:
    words = ["task=vit", "smoke=true", "trainer.accelerator=cpu", "quant=rtn", f"root={root}"]
    (start,) = read_all(root)
    finished = Cell(["task=vit", "smoke=true", f"root={root}"]).record()
    assert finished and finished.id == start.id
    launcher = sweep.launcher = Dying("bits=3", finished)
    attempts = sweep.complete(grid([[*words, "bits=2,3,4,5"]]))
    assert [bool(attempt.error) for attempt in attempts] == [False, True, False, False]
    assert "its process died" in attempts[1].error and "a worker is gone" in attempts[1].error
    assert launcher.batches == [["bits=2", "bits=3", "bits=4", "bits=5"], ["bits=3"], ["bits=4", "bits=5"]]


def test_lines_are_one_sweep() -> None:
    """What several lines have in common is one cell, and all cells go to the cluster together."""
    cells = grid([["quant=rtn", "bits=2,3"], ["quant=rtn", "bits=3"], ["quant=rtn", "bits=4", "J=1,2"]])
    assert [cell.words[1:] for cell in cells] == [["bits=2"], ["bits=3"], ["bits=4", "J=1"], ["bits=4", "J=2"]]
    with pytest.raises(BitfrontError, match="add sweeper=optuna"):
        grid([["penalty=interval(1,2)"]])


def test_a_recipe_is_one_sweep(root: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "# mine\ntask: vit\nshared: trainer.accelerator=cpu\nlines: |\n  quant=rtn bits=2,3\n  quant=gptq\n"
    )
    words = (f"recipe={recipe}", "smoke=true", "wandb=disabled", f"root={root}")
    result = cli("run", *words)
    assert result.returncode == 0, result.stderr
    assert sorted((r.method, r.setting) for r in read_all(root)) == [
        ("float", ""), ("gptq", "bits=4"), ("rtn", "bits=2"), ("rtn", "bits=3"),
    ]  # fmt: skip
    assert cli("run", *words).stdout.count("finished before") == 3
    recipe.write_text("lines: 3\n")
    assert "is no recipe" in cli("run", *words).stderr


def test_a_cluster_that_starts_nothing_says_so_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no SLURM there
    result = cli("run", *SMOKE, "quant=rtn,gptq", "cluster=slurm", f"root={root}")
    assert result.returncode != 0 and result.stderr.count("slurm cluster") == 2 and "Traceback" not in result.stderr


def test_slurm_gets_a_task_and_a_gpu_for_each_device() -> None:
    from hydra import compose as composed

    with initialize_config_dir(str(compose.CONF), version_base="1.3"):
        words = ["cluster=slurm", "trainer.devices=4", "cluster.workers=3", "hydra.launcher.partition=long"]
        launcher = composed("config", words, return_hydra_config=True).hydra.launcher
    assert (launcher.tasks_per_node, launcher.gpus_per_node, launcher.array_parallelism) == (4, 4, 3)
    assert launcher.partition == "long"


def test_where_a_cell_runs_is_no_part_of_it() -> None:
    cells = [compose.load(["task=vit", "quant=rtn", *place]) for place in ([], ["cluster=slurm", "cluster.workers=9"])]
    assert cells[0] == cells[1]


def test_numbers_of_workers_are_their_own_as_long_as_they_live(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from bitfront.sweeps.workers import own_number
print(own_number(Path({str(tmp_path)!r})), flush=True)
input()
"""
    others = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
        )
        for _ in range(2)
    ]
    assert {other.stdout.readline().strip() for other in others if other.stdout} == {"0", "1"}
    for other in others:
        other.communicate("\n")
    assert workers.own_number(tmp_path) == 0


def test_a_worker_ends_when_its_sweep_is_gone() -> None:
    ended: list[int] = []
    workers._end_unless(lambda: False, 0.0, ended.append)
    assert ended == [1]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("penalty=interval(0.5,5)", FloatDistribution(0.5, 5)),
        ("penalty=tag(log,interval(0.1,50))", FloatDistribution(0.1, 50, log=True)),
        ("bits=int(interval(2,8))", IntDistribution(2, 8)),
        ("bits=range(2,9,2)", IntDistribution(2, 8, step=2)),
        ("group_size=4,8,16", CategoricalDistribution(["4", "8", "16"])),
    ],
)
def test_spaces_of_a_search(word: str, expected: Any) -> None:
    assert search.distribution(OverridesParser.create().parse_override(word)) == expected


def test_a_search_ends_in_a_front_and_is_the_same_again(root: Path) -> None:
    space = ("penalty=tag(log,interval(0.1,50))", "group_size=4,8")
    words = (*SMOKE, "quant=diffq", *space, "sweeper=optuna", "sweeper.trials=5", "sweeper.startup=3", f"root={root}")
    first = cli("run", *words)
    assert first.returncode == 0, first.stderr
    records = [r for r in read_all(root) if r.method == "diffq"]
    assert 3 <= len(records) <= 5
    points = {tuple(search.objectives(r)) for r in records}
    front = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    shown = first.stdout.partition("Pareto front")[2].count("penalty=")
    assert len(front) <= shown <= len(records)
    again = cli("run", *words)
    assert again.stdout.partition("Pareto front")[2] == first.stdout.partition("Pareto front")[2]
    assert len([r for r in read_all(root) if r.method == "diffq"]) == len(records)


@pytest.fixture
def like(root: Path) -> Callable[..., Record]:
    """A record with other numbers."""
    content = read_all(root)[0].as_json()

    def made(size: float, valid: float, name: str = "top1", higher: bool = True) -> Record:
        return Record.of(
            content
            | {
                "primary": {"name": name, "higher_is_better": higher, "value": 1.0},
                "sizes": content["sizes"] | {"file": int(size)},
                "metrics": {"valid": {name: valid}, "test": {name: 1.0}},
            }
        )

    return made


def test_a_trial_that_diverged_does_not_end_the_search(
    monkeypatch: pytest.MonkeyPatch, like: Callable[..., Record]
) -> None:
    def record(cell: Cell) -> Record:
        penalty = float(next(word for word in cell.words if word.startswith("penalty=")).partition("=")[2])
        return like(100 / penalty, float("nan") if penalty > 5 else penalty)

    monkeypatch.setattr(Cell, "record", record)
    words = ["task=vit", "quant=diffq", "penalty=tag(log,interval(0.1,50))"]
    fake: Any = SimpleNamespace(
        config=SimpleNamespace(sweeper=SimpleNamespace(trials=9, batch=4, seed=0, startup=4)),
        complete=lambda cells: [Attempt(cell) for cell in cells],
    )
    assert len(search.search(fake, words)) == 9


def penalty_of(cell: Cell) -> float:
    return float(next(word for word in cell.words if word.startswith("penalty=")).partition("=")[2])


def made(penalty: float) -> bool:
    return penalty >= 2 and not 20 <= penalty <= 30


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch, like: Callable[..., Record]) -> Callable[..., list[Cell]]:
    """A search in which a smaller penalty makes a better and larger file; below 2 it is refused, at 2 to 3 too large,
    and at 20 to 30 there is a failure of another kind. All its trials.
    """

    def record(cell: Cell) -> Record | None:
        penalty = penalty_of(cell)
        size = (0.1 + 0.3 / penalty) * 2**20  # within 0.2 MiB from a penalty of 3
        return like(size, 80 - penalty) if made(penalty) else None

    def error(cell: Cell) -> str:
        penalty = penalty_of(cell)
        return "max_size=0.2 MiB cannot be kept: it has 0.3" if penalty < 2 else "diverged" * (20 <= penalty <= 30)

    monkeypatch.setattr(Cell, "record", record)
    monkeypatch.setenv("COLUMNS", "300")

    def run(*words: str, told: list[str] | None = None) -> list[Cell]:
        trials: list[Cell] = []

        def complete(cells: Sequence[Cell]) -> list[Attempt]:
            trials.extend(cells)
            return [Attempt(cell, error(cell)) for cell in cells]

        settings = SimpleNamespace(trials=40, batch=4, seed=0, startup=10)
        fake: Any = SimpleNamespace(config=SimpleNamespace(sweeper=settings), complete=complete)
        attempts = search.search(fake, ["task=vit", "quant=diffq", *words])
        if told is not None:
            told += [attempt.error for attempt in attempts]
        return trials

    return run


SPACE = "penalty=tag(log,interval(0.1,50))"


def shown(out: str) -> list[float]:
    """The penalties of a printed table."""
    return [float(word.partition("=")[2]) for word in out.split() if word.startswith("penalty=") and "(" not in word]


def test_a_search_within_a_size_shows_the_best_that_keep_it(
    searched: Callable[..., list[Cell]], capsys: pytest.CaptureFixture[str]
) -> None:
    errors: list[str] = []
    penalties = [penalty_of(cell) for cell in searched(SPACE, "max_size=0.2", told=errors)]
    fit = sorted({p for p in penalties if p >= 3 and made(p)})
    out = capsys.readouterr().out
    assert shown(out) == fit[:5] and "Pareto" not in out
    assert sum(map(bool, errors)) == sum(20 <= p <= 30 for p in penalties) > 0  # what is refused for its size is none
    assert len(errors) == sum(p >= 3 for p in penalties) < len(penalties)
    assert sum(p < 3 for p in penalties[10:]) < 15  # of 30: the sampler knows what they are, else it had 27
    with pytest.raises(BitfrontError, match=r"no trial keeps its size; the first: max_size=0\.2 MiB cannot"):
        searched("penalty=0.1,1,1.5", "max_size=0.2")


def test_a_search_over_sizes_or_without_one_has_two_objectives(
    searched: Callable[..., list[Cell]], capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ((SPACE,), (SPACE, "max_size=0.1,0.2"), (SPACE, "max_size=0.0")):
        errors: list[str] = []
        penalties = [penalty_of(cell) for cell in searched(*words, told=errors)]
        out = capsys.readouterr().out
        assert "Pareto front" in out and set(shown(out)) == set(filter(made, penalties)), words
        assert len(errors) == 40 and sum(map(bool, errors)) == sum(not made(p) for p in penalties)


def test_a_search_minimises_size_and_validation_loss(like: Callable[..., Record]) -> None:
    assert search.objectives(like(7, 90.0)) == [7, -90.0]
    assert search.objectives(like(7, 20.0, "wer", False)) == [7, 20.0]


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (("quant=diffq", "penalty=interval(1,2)"), "add sweeper=optuna"),
        (("quant=rtn", "init_from=/nowhere"), "no such file"),
        (("quant=diffq", "penalty=interval(-1,5)", "sweeper=optuna"), "penalty is in [0, 1e6], got -1"),
        (("quant=rtn", "--cfg", "job"), "takes no --cfg"),
        (("quant=diffq", "sweeper=optuna"), "got nothing"),
        (("task=vit,lm", "quant=diffq", "penalty=1,2", "sweeper=optuna"), "options of one task"),
        (("quant=diffq", "trainer.devices=2", "cluster=local", "penalty=1,2"), "trainer.devices=2 penalty=1,2 cluster"),
        (("cluster=cloud",), "there is no cluster=cloud"),
        (("cluster=local,serial",), "the same for all cells"),
        (("trainer.devices=1,2",), "the same for all cells"),
        (("cluster.workers=0",), "cluster.workers is positive"),
        (("cluster=local", "hydra.launcher.partition=long"), "options of the cluster="),
        (("cluster=local", "hydra.launcher.n_jobs=many"), "options of the cluster="),
        (("sweeper.trials=3",), "add sweeper=optuna"),
        (("quant=rtn", "bits=interval(2,4)", "sweeper=optuna"), "int(interval(2,8))"),
        (("cluster.workers=two",), "cluster.workers takes a whole number"),
    ],
)
def test_mistakes(words: tuple[str, ...], answer: str) -> None:
    result = cli("run", *SMOKE, *words)
    assert result.returncode != 0 and answer in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_a_directory_is_held_as_long_as_its_process_says(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = (root / "vit" / "float").iterdir()
    monkeypatch.setenv("BITFRONT_JOB", "17")
    assert not Run(path).held() and not Run(root / "nothing").held()
    with Run(path).locked(wait=False):
        assert Run(path).held() and Run(path).held("17") and not Run(path).held("7")
        with pytest.raises(BusyError, match=f"process {os.getpid()} on .*, job 17"), Run(path).locked(wait=False):
            pass
    assert not Run(path).held() and Run(path).finished()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    run = Run(tmp_path / "run")
    with run.locked(wait=False):
        pass
    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(BitfrontError, match="has no locks"), run.locked(wait=False):
        raise AssertionError
    with pytest.raises(BitfrontError, match="has no locks"):
        run.held()


def test_without_ray_its_packages_are_named(root: Path) -> None:
    try:
        import hydra_plugins.hydra_ray_launcher  # noqa: F401
    except ImportError:
        with pytest.raises(BitfrontError, match="hydra-ray-launcher"):
            check(["task=vit", "cluster=ray"])
