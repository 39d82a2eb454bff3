"""Views of the project in Weights & Biases: per task, which method keeps the metric at which size.

The panels show what the runs have logged, so that none is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitfront.cells import tracking
from bitfront.cells.check import closest
from bitfront.cells.record import Record, numbers, read_all
from bitfront.errors import BitfrontError
from bitfront.shipped import module

try:
    from wandb_workspaces import workspaces
    from wandb_workspaces.reports import v2 as wr
except ImportError:  # it is optional
    workspaces = None  # type: ignore[assignment]

SIZE, BITS = "size/mib", "size/bits_per_weight"


def views(root: Path, task: str, project: str) -> list[workspaces.Workspace]:
    """A view for each task of the finished runs below a folder, or for one.

    Raises:
        BitfrontError: there are no such runs, or W&B's library for views is not installed.
    """
    if workspaces is None:
        raise BitfrontError("views need W&B's library for them; install it: pip install wandb-workspaces==0.4.13")
    records = [record for record in read_all(root) if not record.smoke]
    tasks = sorted({record.task for record in records})
    if not tasks:
        raise BitfrontError(f"no finished runs in '{root}', smoke runs aside; make one: {module('run')} task=vit")
    if task not in ("", *tasks):
        near = closest(task, tasks)
        raise BitfrontError(f"no finished runs of task={task} in '{root}'; {near}there are task={', '.join(tasks)}")
    return [view([r for r in records if r.task == name], project) for name in tasks if task in ("", name)]


def view(records: Sequence[Record], project: str) -> workspaces.Workspace:
    """The view of one task.

    Args:
        records: finished ones, all of the task.
        project: in W&B.
    """
    task, metric = records[0].task, f"test/{records[0].primary.name}"
    return workspaces.Workspace(
        entity="",  # the user's, when it is saved
        project=project,
        name=f"{task}: {metric} against size",
        sections=[front(records), *bits(records), *training(records), runs(metric)],
        settings=workspaces.WorkspaceSettings(max_runs=200),
        runset_settings=workspaces.RunsetSettings(
            filters=f"Config('task') == '{task}' and Config('smoke') == False",
            order=[workspaces.Ordering(workspaces.Summary(SIZE))],
            pinned_columns=[f"summary:{name}" for name in (metric, SIZE, "size/ratio", BITS, "minutes")],
        ),
    )


def front(records: Sequence[Record]) -> workspaces.Section:
    """Metric against size, a point per run, with the line of the best metric up to each size: the Pareto front."""
    name, higher = records[0].primary.name, records[0].primary.higher_is_better
    panels: list[Any] = [
        wr.ScatterPlot(
            title=f"{split}/{name} against {size}",
            x=size,
            y=f"{split}/{name}",
            log_x=True,
            running_ymax=higher,
            running_ymin=not higher,
        )
        for size, split in ((SIZE, "test"), (SIZE, "valid"), (BITS, "test"))
    ]
    return workspaces.Section(name="Metric against size", panels=panels, is_open=True)


def bits(records: Sequence[Record]) -> list[workspaces.Section]:
    """Bits over the epochs: means, and each tensor's histogram. Nothing if no run has trained widths."""
    tensors = sorted({name for record in records if record.history for name in record.widths})
    if not tensors:
        return []
    means: list[Any] = [
        wr.LinePlot(title="bits per quantized weight", y=["mean_bits"]),
        wr.LinePlot(title="bits by tensor", metric_regex="mean_bits/.*"),
    ]
    histograms: list[Any] = [wr.LinePlot(title=f"bits of {name}", y=[f"bits/{name}"]) for name in tensors]
    return [
        workspaces.Section(name="Bits over time", panels=means, is_open=True),
        workspaces.Section(name="Histograms of bits over time", panels=histograms),
    ]


def training(records: Sequence[Record]) -> list[workspaces.Section]:
    """What every epoch logs: losses, validation metrics, size by the papers' rule. Nothing if no run has trained."""
    panels: list[Any] = [wr.LinePlot(y=[name]) for name in sorted(numbers(records))]
    return [workspaces.Section(name="Training", panels=panels)] if panels else []


def runs(metric: str) -> workspaces.Section:
    """Methods, sweeps and single runs side by side."""
    panels: list[Any] = [
        *(wr.BarPlot(title=f"{y} by method", metrics=[y], groupby=wr.Config("method")) for y in (metric, "minutes")),
        wr.BarPlot(title=f"{metric} by sweep", metrics=[metric], groupby="Group"),
        wr.RunComparer(diff_only="split"),
    ]
    return workspaces.Section(name="Methods and sweeps", panels=panels)


def outline(view: dict[str, Any]) -> str:
    """A view as lines of text.

    Args:
        view: the library's model of it, as it would be sent.
    """
    section = view["spec"]["section"]
    (shown,) = section["runSets"]
    filters = " and ".join(f"{f['key']['name']} {f['op']} {f['value']}" for f in shown["filters"]["filters"])
    lines = [f"{view['project']}: view '{view['displayName']}'", f"  runs with {filters}"]
    lines.append(f"  columns {', '.join(shown['runFeed']['columnOrder'])}")
    for part in section["panelBankConfig"]["sections"]:
        lines.append(f"  {part['name']}")
        for panel in part["panels"]:
            lines.append(f"    {panel['viewType']}: {', '.join(keys(panel['config'])) or 'all that differs'}")
    return "\n".join(lines)


def keys(panel: dict[str, Any]) -> list[str]:
    """What a panel shows: names of metrics and configuration, and a front."""
    names = [*panel.get("metrics", []), *(panel[name] for name in ("metricRegex", "yAxis") if name in panel)]
    about = {"xAxis": "over", "groupBy": "by"}
    names += [f"{word} {panel[name]}" for name, word in about.items() if name in panel]
    fronts = {"showMaxYAxisLine": "front of the highest", "showMinYAxisLine": "front of the lowest"}
    return names + [text for name, text in fronts.items() if panel.get(name)]


def save(view: workspaces.Workspace, entity: str) -> str:
    """Create a view; return its address.

    Raises:
        BitfrontError: nobody is logged in, or W&B does not take them.
    """
    if not tracking.logged_in():
        raise BitfrontError("W&B knows no key of yours; run `wandb login`, or see the views with dry_run=true")
    tracking.quiet()
    try:
        view.entity = entity or tracking.entity()
        return view.save().url
    except Exception as error:  # of W&B's many kinds
        raise BitfrontError(
            f"W&B did not take the view ({error}); is it reachable, and has the project a run of yours "
            "(`wandb sync runs/*/*/*/wandb/offline-run-*`)? dry_run=true shows the views"
        ) from None
