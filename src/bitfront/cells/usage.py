"""The help of the command ``run``: tasks, methods with their knobs, and the options that all cells share."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import yaml

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
        f"  {run} recipe=diffq/cifar10 dry_run=true    which they are, and how long they take; starts nothing",
        "",
        "Tasks (task=) and their knobs:",
        *_listed("task"),
        "",
        "Networks (model=), of the tasks that have a choice:",
        *(line for text, tasks in networks().items() for line in (f"  {text}", f"{'':24}task={', '.join(tasks)}")),
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


def networks() -> dict[str, list[str]]:
    """What ``model=`` takes, and the tasks that take it: their defaults, and what the comments beside them name."""
    tasks: dict[frozenset[str], list[str]] = defaultdict(list)
    texts: dict[frozenset[str], str] = {}
    for name in compose.options("task"):
        if "model" in dict(compose.knobs("task", name)):
            found = _choices("task", name, "model")
            covered = tuple(choice.removesuffix("<name>") for choice in found if choice.endswith(".<name>"))
            kept = [choice for choice in dict.fromkeys(found) if "<" in choice or not choice.startswith(covered)]
            tasks[frozenset(kept)].append(name)
            texts.setdefault(frozenset(kept), " | ".join(kept))
    return {text: tasks[key] for key, text in texts.items()}


def elsewhere(task: str) -> str:
    """For who gave a task a network that it has not: what it takes, and which kinds other tasks take."""
    known = networks()
    kinds: dict[str, list[str]] = defaultdict(list)
    for text, tasks in known.items():
        for kind in text.split(" | "):
            if "<" in kind and task not in tasks:
                kinds[kind] += tasks
    own = next((text for text, tasks in known.items() if task in tasks), "no other")
    others = [f"{kind} (task={', '.join(sorted(tasks))})" for kind, tasks in kinds.items() if kind not in own]
    return f"task={task} takes model={own}" + (f"; others take {', '.join(others)}" if others else "")


def _listed(group: str) -> list[str]:
    lines = []
    for name in compose.options(group):
        shown = " ".join(f"{knob}={value}" for knob, value in compose.knobs(group, name))
        lines += [f"  {name:22}{_description(group, name)}"] + ([f"{'':24}{shown}"] if shown else [])
    return lines


def _description(group: str, name: str) -> str:
    lines = compose.file(group, name).read_text().splitlines()
    return next((line[2:] for line in lines if line.startswith("# ") and "@package" not in line), "")


def _choices(group: str, name: str, key: str) -> list[str]:
    """A key's default in the yaml of a choice and what the comment beside it names; without one, likewise in the yaml
    that it builds on.
    """
    text = compose.file(group, name).read_text()
    found = re.search(rf"^{key}: (.*?)(?:  # (.*))?$", text, re.MULTILINE)
    own = [found[1], *found[2].split(" | ")] if found and found[2] else [found[1]] if found else []
    if len(own) > 1:
        return own
    parts = [part for part in yaml.safe_load(text).get("defaults", []) if isinstance(part, str) and part != "_self_"]
    return own + [choice for part in parts for choice in _choices(group, str(Path(name).parent / part), key)]
