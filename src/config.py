"""The configuration: one command line composed into one plain dictionary, checked before anything heavy is imported.

The yaml files are the schema: an override must name a key that they have, with a value of that key's type.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, QuotedString
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf

from src.errors import BitfrontError

CONF = Path(__file__).resolve().parents[1] / "conf"
CELL = ("task", "quant")  # the groups that make a cell
SWEEP = ("cluster", "sweeper")  # those that say how many cells are run
GROUPS = (*CELL, *SWEEP)
CHOICES = {
    "wandb": ("auto", "online", "offline", "disabled"),
    "trainer.accelerator": ("auto", "cpu", "gpu", "mps"),
    "trainer.precision": ("32-true", "bf16-mixed", "16-mixed"),  # float32 weights: what the artifact starts from
}
TYPES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a word",
    list: "a list, [a,b]",
}


def options(group: str) -> list[str]:
    """The choices of a group: its yaml files."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def load(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose a cell.

    Args:
        overrides: words of a command line without sweeps, as ``task=vit quant=diffq penalty=5``.

    Returns:
        The resolved configuration, with ``names``: the chosen task and method, and ``setting``: as words, the method's
        first knob, and what else differs from the files.
    """
    config = _compose(overrides)
    names = {group: config.hydra.runtime.choices[group] for group in CELL}
    usual = _compose([f"{group}={name}" for group, name in names.items()])
    by_knob = [_by_knob(usual, word) for word in overrides]
    if by_knob != list(overrides):
        overrides, config = by_knob, _compose(by_knob)
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    cell = {str(key): value for key, value in plain.items() if key not in ("hydra", *SWEEP)}
    words = [
        f"{knob}={cell[knob]}"
        for n, (knob, v) in enumerate(knobs("quant", names["quant"]))
        if n == 0 or cell[knob] != v
    ]
    shown = (*(f"{knob}=" for knob, _ in knobs("task", names["task"])), "task.", "train.", "quant.", "init_from=")
    shown += ("trainer.precision=",)
    for override in overrides:
        key = override.partition("=")[0]
        if override.startswith(shown) and OmegaConf.select(usual, key) != OmegaConf.select(config, key):
            words.append(override)
    return cell | {"names": names, "setting": " ".join(words)}


def check(words: Sequence[str]) -> None:
    """Refuse a command line whose overrides do not fit the configuration, sweeps included.

    Raises:
        BitfrontError: naming the choices, or the closest key.
    """
    try:
        # What begins with a dash is Hydra's, and so is what follows, as in "--cfg job".
        plain = [
            w
            for before, w in itertools.pairwise(["", *words])
            if not w.startswith("-") and ("=" in w or not before.startswith("--"))
        ]
        overrides = OverridesParser.create().parse_overrides(plain)
    except HydraException as error:
        raise BitfrontError(f"{error}; options are words like penalty=5") from None
    overrides = [o for o in overrides if not o.key_or_group.startswith("hydra")]
    chosen: dict[str, list[str]] = {}
    for override in overrides:
        if override.is_add() or override.is_force_add() or override.is_delete():
            raise BitfrontError(f"'{override.input_line}' adds or deletes a key; only existing keys can be set")
        if override.is_sweep_override() and (names(key := override.key_or_group, *SWEEP) or key == "trainer.devices"):
            raise BitfrontError(f"{key} is the same for all cells of a sweep; give it one value")
        if override.key_or_group in GROUPS:
            chosen[override.key_or_group] = _choices(override)
    for choice in itertools.product(*chosen.values()):
        try:
            config = _compose([f"{group}={name}" for group, name in zip(chosen, choice, strict=True)])
        except MissingConfigException:  # of Hydra's launcher
            raise BitfrontError(
                "cluster=ray needs two more packages: pip install 'hydra-ray-launcher==1.2.2' 'ray[default]==2.60.0'"
            ) from None
        method = config.hydra.runtime.choices["quant"]
        for override in overrides:
            if override.key_or_group not in GROUPS:
                _check_key(config, override, method, overrides)


def sweeps(words: Sequence[str]) -> bool:
    """Whether a command line is a sweep: by its flag, or because it names a cluster or a sweeper."""
    return any(word in ("-m", "--multirun") or word.partition("=")[0] in SWEEP for word in words)


def names(word: str, *keys: str) -> bool:
    """Whether an override is of one of these top-level keys or groups: ``trainer.devices=2`` is of ``trainer``."""
    return re.split(r"[=./]", word, maxsplit=1)[0] in keys


def parse(words: Iterable[str], defaults: dict[str, Any]) -> dict[str, Any]:
    """Options of a small command: ``key=value`` words over defaults of the same type.

    Raises:
        BitfrontError: an unknown key or a value of another type.
    """
    values = dict(defaults)
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key not in defaults:
            raise BitfrontError(f"unknown option '{word}'; options: {', '.join(f'{k}=' for k in defaults)}")
        kind = type(defaults[key])
        try:
            values[key] = {"true": True, "false": False}[text] if kind is bool else kind(text)
        except (KeyError, ValueError):
            raise BitfrontError(f"{key} takes {TYPES[kind]}, got '{text}'") from None
    return values


def changed(task: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """The task of a finished run with other values for some of its keys: words like ``task.beam=50``.

    Raises:
        BitfrontError: an unknown key, or a value of another type.
    """
    values = dict(task)
    for word in words:
        path, _, text = word.partition("=")
        key = path.removeprefix("task.")
        known = [name for name in task if name != "_target_"]
        if key not in known:
            raise BitfrontError(f"the task has no key '{key}'; {_closest(key, known)}keys: {', '.join(known)}")
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise BitfrontError(f"'{word}' is no value") from None
        _check_type(path, task[key], values[key])
    return values


def usage() -> str:
    """The help text: tasks, methods with their knobs, and the options that all cells share."""
    lines = [
        "Run one cell, a task x a method; write one packed file and its record.",
        "",
        "  python -m src.run task=vit quant=diffq penalty=5",
        "  python -m src.run -m task=vit quant=diffq penalty=0.5,1,2,5,10    a sweep; finished cells are skipped",
        "  python -m src.run -m task=vit,lm quant=diffq penalty=0.5,2,8 cluster=local    on two workers",
        "",
        "Tasks (task=) and their knobs:",
    ]
    lines += _listed("task")
    lines += ["", "Methods (quant=) and their knobs:", *_listed("quant")]
    lines += ["", "Where the cells of a sweep run (cluster=):", *_listed("cluster")]
    lines += ["", "Which cells a sweep has (sweeper=):", *_listed("sweeper")]
    lines += ["", "Every cell:"]
    for key, value in _shared().items():
        if key not in ("defaults", "hydra"):
            shown = (
                " ".join(f"{key}.{k}={v}" for k, v in value.items()) if isinstance(value, dict) else f"{key}={value}"
            )
            lines.append(f"  {shown}")
    lines += ["", "All keys of a cell, which task.*, train.* and quant.* set:  python -m src.run quant=diffq --cfg job"]
    return "\n".join(lines).replace("=None", "=null").replace("=False", "=false")


def _compose(overrides: Sequence[str]) -> DictConfig:
    if GlobalHydra.instance().is_initialized():  # inside a job of Hydra's
        return compose("config", list(overrides), return_hydra_config=True)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=True)


def _by_knob(usual: DictConfig, word: str) -> str:
    """``bits=2`` for ``quant.bits=2``, where a knob sets the key: one cell has one setting."""
    key, equals, value = word.partition("=")
    group, _, name = key.partition(".")
    files = OmegaConf.to_container(usual[group], resolve=False) if group in CELL else {}
    assert isinstance(files, dict)
    knob = re.fullmatch(r"\$\{(\w+)\}", str(files.get(name)))
    return f"{knob[1]}{equals}{value}" if knob else word


def _values(override: Override) -> list[Any]:
    if not override.is_sweep_override():
        return [override.value()]
    return list(override.sweep_iterator()) if override.is_discrete_sweep() else []


def _choices(override: Override) -> list[str]:
    group, known = override.key_or_group, options(override.key_or_group)
    value = override.value()
    names = value.filter(known) if isinstance(value, Glob) else [str(v) for v in _values(override)]
    for name in names:
        if name not in known:
            raise BitfrontError(f"there is no {group}={name}; {_closest(name, known)}choices: {', '.join(known)}")
    return names


def _check_key(config: DictConfig, override: Override, method: str, overrides: list[Override]) -> None:
    key = override.key_or_group
    if names(key, "sweeper") and OmegaConf.select(config, key) is None:
        raise BitfrontError(f"{key} is an option of a search; add sweeper=optuna")
    known = [k for k in _keys(config) if not k.startswith("hydra")]
    if key not in known:
        short = [k for k in known if "." not in k and not OmegaConf.is_config(config[k])]
        raise BitfrontError(
            f"quant={method} has no option '{key}'; {_closest(key, known)}options: {', '.join(short)}, "
            f"{', '.join(k for k in known if k.startswith('quant.') and k != 'quant._target_')}, task.*, train.*"
        )
    if key.startswith("train.") and config.quant.get("sft") is False and not _sets(overrides, "quant.sft"):
        raise BitfrontError(
            f"quant={method} does not train, so {key} means nothing to it; for another float start run quant=float "
            "with it and give init_from=<its artifact>; quant.sft=true fine-tunes"
        )
    default = OmegaConf.select(config, key)
    interval = override.value()
    if isinstance(interval, IntervalSweep) and type(default) is not type(interval.start):
        raise BitfrontError(f"{key} takes no such interval; whole numbers take int(interval(2,8)), words a list: a,b,c")
    if _shared().get(key, key) is None:  # null in config.yaml: null or a word
        default = None
    for value in _values(override):
        _check_type(key, OmegaConf.to_container(default) if OmegaConf.is_config(default) else default, value)


def _check_type(key: str, default: Any, value: Any) -> None:
    if key == "quant.layers":
        if not (value is None or (isinstance(value, dict) and all(isinstance(v, dict) for v in value.values()))):
            raise BitfrontError(f"{key} takes a mapping like {{head.*: {{bits: 8}}}}, got '{value}'")
        return
    if key == "quant.reestimate_bn":
        default = bool(default)  # null where ids are older than the option
    if default is None:
        if value is not None and not isinstance(value, (str, QuotedString)):
            raise BitfrontError(f"{key} takes a word or null, got '{value}'")
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = {
        bool: isinstance(value, bool),
        int: number and isinstance(value, int),
        float: number and math.isfinite(value),
        list: isinstance(value, list),
        dict: False,
        str: isinstance(value, (str, QuotedString)),
    }[type(default)]
    if not fits:
        wanted = TYPES.get(type(default), "no value; set one of its keys")
        raise BitfrontError(f"{key} takes {wanted}, got '{value}'")
    if key in CHOICES and str(value) not in CHOICES[key]:
        raise BitfrontError(f"there is no {key}={value}; choices: {', '.join(CHOICES[key])}")


def _sets(overrides: list[Override], key: str) -> bool:
    """Whether the command line has a true value for a key."""
    return any(True in _values(o) for o in overrides if o.key_or_group == key)


def _closest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean '{close[0]}'? " if close else ""


def _keys(config: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key in map(str, config):
        keys.append(prefix + key)
        node = config._get_node(key)
        if isinstance(node, DictConfig) and key != "hydra":
            keys += _keys(node, f"{prefix}{key}.")
    return keys


def _shared() -> dict[str, Any]:
    """What every cell has: config.yaml."""
    return yaml.safe_load((CONF / "config.yaml").read_text())


def knobs(group: str, name: str) -> list[tuple[str, Any]]:
    """The keys that a choice's yaml, or one that it builds on, declares at top level, with their defaults."""
    keys = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    if group in SWEEP:
        return [(f"{group}.{key}", value) for key, value in keys[group].items()]
    base = next((part for part in keys.get("defaults", []) if part != "_self_"), None)
    found = dict(knobs(group, base)) if base else {}
    found |= {key: value for key, value in keys.items() if key not in (*GROUPS, "train", "init_from", "defaults")}
    return list(found.items())


def _listed(group: str) -> list[str]:
    """The help's lines on a group."""
    lines = []
    for name in options(group):
        shown = " ".join(f"{knob}={value}" for knob, value in knobs(group, name))
        lines += [f"  {name:22}{_description(group, name)}"] + ([f"{'':24}{shown}"] if shown else [])
    return lines


def _description(group: str, name: str) -> str:
    comments = [line[2:] for line in (CONF / group / f"{name}.yaml").read_text().splitlines() if line.startswith("# ")]
    return comments[1]
