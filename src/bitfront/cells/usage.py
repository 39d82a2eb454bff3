"""The help of the command ``run``: tasks, methods with their knobs, and the options that all cells share."""

from __future__ import annotations

from bitfront.cells import compose
from bitfront.shipped import module


def usage() -> str:
    """The whole text."""
    run = module("run")
    lines = [
        "Run one cell, a task x a method; write one packed file and its record.",
        "",
        f"  {run} task=vit quant=diffq penalty=5",
        f"  {run} -m task=vit quant=diffq penalty=0.5,1,2,5,10    a sweep; finished cells are skipped",
        f"  {run} -m task=vit,lm quant=diffq penalty=0.5,2,8 cluster=local    on two workers",
        f"  {run} recipe=diffq/cifar10 data_root=/data    all cells of a published table",
        "",
        "Tasks (task=) and their knobs:",
        *_listed("task"),
        "",
        "Methods (quant=) and their knobs:",
        *_listed("quant"),
        "",
        "Where the cells of a sweep run (cluster=):",
        *_listed("cluster"),
        "",
        "Which cells a sweep has (sweeper=):",
        *_listed("sweeper"),
        "",
        "Every cell:",
    ]
    for key, value in compose.shared().items():
        if key not in ("defaults", "hydra", *compose.BLOCKS):
            of = [f"{key}.{k}={v}" for k, v in value.items()] if isinstance(value, dict) else [f"{key}={value}"]
            lines.append(f"  {' '.join(of)}")
    lines += [
        "",
        f"All keys of a cell, which task.*, train.* and quant.* set:  {run} quant=diffq --cfg job",
        "Tasks and methods of your own, <folder>/{task,quant}/<name>.yaml:  --config-dir <folder>",
    ]
    return "\n".join(lines).replace("=None", "=null").replace("=False", "=false")


def _listed(group: str) -> list[str]:
    lines = []
    for name in compose.options(group):
        shown = " ".join(f"{knob}={value}" for knob, value in compose.knobs(group, name))
        lines += [f"  {name:22}{_description(group, name)}"] + ([f"{'':24}{shown}"] if shown else [])
    return lines


def _description(group: str, name: str) -> str:
    lines = compose.file(group, name).read_text().splitlines()
    return next((line[2:] for line in lines if line.startswith("# ") and "@package" not in line), "")
