"""Search for hyper-parameters: small files with a good metric, or the best within a size, by Optuna's TPE sampler.

    python -m src.run -m task=vit quant=diffq penalty='tag(log,interval(0.1,50))' group_size=4,8,16 sweeper=optuna

Two objectives, the size of the file and the metric on the validation split; the test split is only shown. Trials are
cells like all others, and the sampler is seeded and asked for a batch at a time on any cluster, so that an interrupted
search, run again, passes through the finished cells to where it was. With one ``max_size`` for all trials there is one
objective, the metric, and the size is a constraint: a trial whose file cannot be so small is infeasible, no failure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import optuna
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from rich import box
from rich.table import Table

from bitfront.cells.cell import Cell
from bitfront.cells.compose import load, parse
from bitfront.cells.record import Record
from bitfront.console import CONSOLE
from bitfront.errors import BitfrontError
from bitfront.sweeps.sweep import Attempt, Sweep

MIB = 2**20
LISTED = 5  # of the best within a size
REFUSED = re.compile(r"max_size\b.* (cannot be kept|allows)")  # by methods, and by what writes the file


def search(sweep: Sweep, words: Sequence[str]) -> list[Attempt]:
    """Run trials, ``sweeper.batch`` at a time, and print the Pareto front, or the best within ``max_size``.

    Args:
        sweep: completes the trials' cells.
        words: what cells have; the swept ones are the space.

    Returns:
        What became of the trials, of those only that are feasible; several may be of the same cell.

    Raises:
        BitfrontError: nothing to search, or something that cannot be; no trial is feasible.
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
    limit = _limit(words, space)
    study = optuna.create_study(directions=["minimize"] * (1 if limit else 2), sampler=sampler)
    done: dict[int, Attempt] = {}
    while len(done) < settings.trials:
        count = min(settings.batch, settings.trials - len(done))
        trials = [study.ask(space) for _ in range(count)]
        cells = {trial.number: (*fixed, *_words(trial.params)) for trial in trials}
        batch = {tuple(a.cell.words): a for a in sweep.complete([Cell(key) for key in dict.fromkeys(cells.values())])}
        for trial in trials:
            done[trial.number] = attempt = batch[cells[trial.number]]
            values, excess = outcome(attempt, limit)
            if limit:
                trial.set_constraint("max_size", excess)
            fine = excess > 0 or all(map(math.isfinite, values))
            study.tell(trial, values if fine else None, TrialState.COMPLETE if fine else TrialState.FAIL)
    if not limit:
        show([done[trial.number].cell for trial in study.best_trials], fixed, "Pareto front")
        return list(done.values())
    feasible = {number: attempt for number, attempt in done.items() if outcome(attempt, limit)[1] <= 0}
    if not feasible:
        raise BitfrontError(f"no trial keeps its size; the first: {done[0].error or 'its file is larger'}")
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    best = sorted((trial for trial in complete if trial.number in feasible), key=lambda trial: trial.values)
    show([feasible[trial.number].cell for trial in best], fixed, "Best", LISTED)
    if beyond := len(done) - len(feasible):
        CONSOLE.print(f"{beyond} of {len(done)} trials cannot be as small as {limit / MIB:.4g} MiB")
    return list(feasible.values())


def outcome(attempt: Attempt, limit: int = 0) -> tuple[list[float], float]:
    """A trial's values, NaN if it failed, and the bytes by which its file exceeds a limit that is not 0; where the
    method has refused to make it, nobody knows them, and they are as many as the limit.
    """
    if record := attempt.cell.record():
        return (objectives(record)[1:], record.sizes.file - limit) if limit else (objectives(record), 0)
    refused = limit > 0 and REFUSED.search(attempt.error) is not None
    return ([math.inf], limit) if refused else ([math.nan], 0)


def _limit(words: Sequence[str], space: dict[str, Any]) -> int:
    """Bytes that the file of every trial may have; 0 for any, or if the size is searched, too."""
    if {"max_size", "quant.max_size"} & set(space):
        return 0
    return int(load(ends(words)[0].words).values["quant"].get("max_size", 0.0) * MIB)


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


def show(found: Sequence[Cell], fixed: Sequence[str], title: str, most: int = 0) -> None:
    """Print the front, smallest file first, or ``most`` cells as they come; words that all share only once."""
    grid = Table(title=f"{title} of {' '.join(fixed)}", header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("MiB", "valid", "test", "found"):
        grid.add_column(heading, justify="left" if heading == "found" else "right", overflow="fold")
    records = {tuple(cell.words): record for cell in found if (record := cell.record())}
    rows = list(records.items())[:most] if most else sorted(records.items(), key=lambda item: item[1].sizes.file)
    for words, record in rows:
        values = (f"{record.metrics[split][record.primary.name]:.4g}" for split in ("valid", "test"))
        grid.add_row(f"{record.sizes.file / MIB:.3f}", *values, " ".join(words[len(fixed) :]))
    CONSOLE.print(grid)


def _words(params: dict[str, Any]) -> list[str]:
    return [f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in params.items()]
