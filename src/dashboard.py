"""Views of the project in Weights & Biases: per task, which method keeps the metric at which size.

    python -m src.dashboard dry_run=true            what would be made; needs no login and no network
    python -m src.dashboard                         a view for every task with finished runs below runs/
    python -m src.dashboard results/records task=vit entity=my-team

The panels show what these runs have logged, so that none is empty. Each call saves new views; an old one is deleted in
the app.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from src import config, record, tracking
from src.errors import BitfrontError

try:
    from wandb_workspaces import workspaces
    from wandb_workspaces.reports import v2 as wr
except ImportError:  # it is optional
    workspaces = None  # type: ignore[assignment]

OPTIONS = {"task": "", "entity": "", "project": tracking.project(), "dry_run": False}
SIZE, BITS = "size/mib", "size/bits_per_weight"
CONSOLE = Console(highlight=False, soft_wrap=True, markup=False)


def main() -> None:
    """Save the views that the command line asks for, or print them."""
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        options = " ".join(f"{key}={value}" for key, value in OPTIONS.items()).replace("=False", "=false")
        CONSOLE.print(f"{__doc__}\nOptions: {options}")
        return
    try:
        root = Path(words.pop(0)) if words and "=" not in words[0] else Path("runs")
        chosen = config.parse(words, OPTIONS)
        made = views(root, chosen["task"], chosen["project"])
        if chosen["dry_run"]:
            for view in made:
                CONSOLE.print(outline(view._to_model().model_dump(by_alias=True, exclude_none=True)))
        else:
            save(made, chosen["entity"])
    except BitfrontError as error:
        sys.exit(f"error: {error}")


def views(root: Path, task: str, project: str) -> list[workspaces.Workspace]:
    """A view for each task of the finished runs below a folder, or for one.

    Raises:
        BitfrontError: there are no such runs, or W&B's library for views is not installed.
    """
    if workspaces is None:
        raise BitfrontError("views need W&B's library for them; install it: pip install wandb-workspaces==0.4.13")
    records = [each for each in record.read_all(root) if not each["config"]["smoke"]]
    tasks = sorted({each["task"] for each in records})
    if not tasks:
        raise BitfrontError(f"no finished runs in '{root}', smoke runs aside; make one: python -m src.run task=vit")
    if task not in ("", *tasks):
        raise BitfrontError(f"no finished runs of task={task} in '{root}'; there are task={', '.join(tasks)}")
    return [view([r for r in records if r["task"] == name], project) for name in tasks if task in ("", name)]


def view(records: Sequence[dict[str, Any]], project: str) -> workspaces.Workspace:
    """The view of one task.

    Args:
        records: finished ones, all of the task.
        project: in W&B.
    """
    task, metric = records[0]["task"], f"test/{records[0]['primary']['name']}"
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


def front(records: Sequence[dict[str, Any]]) -> workspaces.Section:
    """Metric against size, a point per run, with the line of the best metric up to each size: the Pareto front."""
    name, higher = records[0]["primary"]["name"], records[0]["primary"]["higher_is_better"]
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


def bits(records: Sequence[dict[str, Any]]) -> list[workspaces.Section]:
    """Bits over the epochs: means, and each tensor's histogram. Nothing if no run has trained widths."""
    tensors = sorted({name for each in records if each["history"] for name in each["widths"]})
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


def training(records: Sequence[dict[str, Any]]) -> list[workspaces.Section]:
    """What every epoch logs: losses, validation metrics, size by the papers' rule. Nothing if no run has trained."""
    names = sorted({name for each in records for numbers in each["history"] for name in numbers} - {"epoch"})
    return [workspaces.Section(name="Training", panels=[wr.LinePlot(y=[name]) for name in names])] if names else []


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


def save(made: Sequence[workspaces.Workspace], entity: str) -> None:
    """Create the views and print where they are.

    Raises:
        BitfrontError: nobody is logged in, or W&B does not take them.
    """
    if not tracking.logged_in():
        raise BitfrontError("W&B knows no key of yours; run `wandb login`, or see the views with dry_run=true")
    tracking.quiet()
    try:
        for view in made:
            view.entity = entity or tracking.entity()
            CONSOLE.print(f"{view.name}: {view.save().url}")
    except Exception as error:  # of W&B's many kinds
        raise BitfrontError(
            f"W&B did not take the views ({error}); is it reachable, and has the project a run of yours "
            "(`wandb sync runs/*/*/*/wandb/offline-run-*`)? dry_run=true shows the views"
        ) from None


if __name__ == "__main__":
    main()
