"""Search for hyper-parameters: small files with a good metric, by Optuna's multi-objective TPE sampler.

    python -m src.run -m task=vit quant=diffq penalty='tag(log,interval(0.1,50))' group_size=4,8,16 sweeper=optuna

Two objectives, the size of the file and the metric on the validation split; the test split is only shown. Trials are
cells like all others, and the sampler is seeded and asked for a batch at a time on any cluster, so that an interrupted
search, run again, passes through the finished cells to where it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import optuna
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from rich import box
from rich.table import Table

from bitfront.cells.cell import Cell
from bitfront.cells.compose import parse
from bitfront.cells.record import Record
from bitfront.console import CONSOLE
from bitfront.errors import BitfrontError
from bitfront.sweeps.sweep import Attempt, Sweep

MIB = 2**20


def search(sweep: Sweep, words: Sequence[str]) -> list[Attempt]:
    """Run trials, ``sweeper.batch`` at a time, and print the Pareto front.

    Args:
        sweep: completes the trials' cells.
        words: what cells have; the swept ones are the space.

    Returns:
        What became of the trials; several may be of the same cell.

    Raises:
        BitfrontError: nothing to search, or something that cannot be.
    """
    settings, overrides = sweep.config.sweeper, parse(words)
    space = {o.get_key_element(): distribution(o) for o in overrides if o.is_sweep_override()}
    fixed = [str(o.input_line) for o in overrides if not o.is_sweep_override()]
    if not space or {"task", "seed"} & set(space):
        raise BitfrontError(
            "sweeper=optuna searches the options of one task, such as penalty='tag(log,interval(0.1,50))'; "
            f"got {', '.join(space) or 'nothing'}"
        )
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=settings.seed, n_startup_trials=settings.startup)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    done: dict[int, Attempt] = {}
    while len(done) < settings.trials:
        count = min(settings.batch, settings.trials - len(done))
        trials = [study.ask(space) for _ in range(count)]
        cells = {trial.number: (*fixed, *_words(trial.params)) for trial in trials}
        batch = {tuple(a.cell.words): a for a in sweep.complete([Cell(key) for key in dict.fromkeys(cells.values())])}
        for number, key in cells.items():
            done[number] = batch[key]
            record = batch[key].cell.record()
            values = objectives(record) if record else [math.nan]
            fine = all(map(math.isfinite, values))
            study.tell(number, values if fine else None, TrialState.COMPLETE if fine else TrialState.FAIL)
    show([done[trial.number].cell for trial in study.best_trials], fixed)
    return list(done.values())


def ends(words: Sequence[str]) -> list[Cell]:
    """Cells in which each option of the space in turn has each of its choices, or its lowest and its highest value:
    what is refused of them would be of trials.
    """
    overrides = parse(words)
    values = {o.get_key_element(): _ends(o) for o in overrides if o.is_sweep_override()}
    fixed = [str(o.input_line) for o in overrides if not o.is_sweep_override()]
    first = {key: some[0] for key, some in values.items()}
    points = [first | {key: value} for key, some in values.items() for value in some]
    return [Cell([*fixed, *_words(point)]) for point in points]


def _ends(override: Override) -> list[Any]:
    space = distribution(override)
    if isinstance(space, CategoricalDistribution):
        return list(space.choices)
    assert isinstance(space, (IntDistribution, FloatDistribution))
    return [space.low, space.high]


def objectives(record: Record) -> list[float]:
    """What is minimised: bytes of the file, and the validation metric, negated if higher is better."""
    return [record.sizes.file, -record.primary.better(record.metrics["valid"][record.primary.name])]


def distribution(override: Override) -> BaseDistribution:
    """Of a swept word: ``interval(a,b)``, also within ``int(...)`` or ``tag(log,...)``; ``range(a,b)``; ``a,b,c``."""
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        assert sweep.start is not None and sweep.end is not None
        kind = IntDistribution if isinstance(sweep.start, int) else FloatDistribution  # int(interval(2,8))
        return kind(sweep.start, sweep.end, log="log" in sweep.tags)  # type: ignore[arg-type]
    if isinstance(sweep, RangeSweep) and all(isinstance(v, int) for v in (sweep.start, sweep.stop, sweep.step)):
        values: list[Any] = list(override.sweep_iterator())
        return IntDistribution(min(values), max(values), step=abs(int(sweep.step)))
    return CategoricalDistribution(list(override.sweep_string_iterator()))


def show(front: Sequence[Cell], fixed: Sequence[str]) -> None:
    """Print the front, smallest file first; the words that all cells share only once."""
    grid = Table(
        title=f"Pareto front of {' '.join(fixed)}", header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for heading in ("MiB", "valid", "test", "found"):
        grid.add_column(heading, justify="left" if heading == "found" else "right", overflow="fold")
    records = {tuple(cell.words): record for cell in front if (record := cell.record())}
    for words, record in sorted(records.items(), key=lambda item: item[1].sizes.file):
        values = (f"{record.metrics[split][record.primary.name]:.4g}" for split in ("valid", "test"))
        grid.add_row(f"{record.sizes.file / MIB:.3f}", *values, " ".join(words[len(fixed) :]))
    CONSOLE.print(grid)


def _words(params: dict[str, Any]) -> list[str]:
    return [f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in params.items()]
