"""Checking a command line before anything heavy is imported. The yaml files are the schema: a word must name a key that
they have, with a value of that key's type; the classes say which values are in range.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from bitfront.cells import compose
from bitfront.cells.compose import Config
from bitfront.cells.identity import calibrated, trains
from bitfront.errors import BitfrontError
from bitfront.ranges import Ranges, declared, refuse
from bitfront.tasks.recipe import Recipe

CHOICES = {
    "wandb": ("auto", "online", "offline", "disabled"),
    "trainer.accelerator": ("auto", "cpu", "gpu", "mps"),
    "trainer.precision": ("32-true", "bf16-mixed", "16-mixed"),  # float32 weights: what the artifact starts from
}
CALIBRATION = "bitfront.quant.engine.plan.Calibration"
TRAINER: Ranges = {"devices": "1..", "accumulate_grad_batches": "1.."}
OF_COMMANDS = ("recipe", "dry_run")  # words of the command ``run`` that are no keys of a cell
TYPES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a word",
    list: "a list, [a,b]",
}


def check(words: Sequence[str]) -> None:
    """Refuse words that do not fit the configuration, sweeps included: first those that name nothing, then values of
    another type.

    Raises:
        BitfrontError: naming the choices, or the closest key.
    """
    try:
        overrides = compose.parse(words)
    except HydraException as error:
        raise BitfrontError(f"{error}; options are words like penalty=5") from None
    for override in overrides:
        if override.package is not None or override.is_add() or override.is_force_add() or override.is_delete():
            raise BitfrontError(f"'{override.input_line}' adds or deletes a key; only existing keys can be set")
    overrides = [o for o in overrides if not compose.names(o.key_or_group, "hydra")]
    chosen: dict[str, list[str]] = {}
    for override in overrides:
        key = override.key_or_group
        if override.is_sweep_override() and (compose.names(key, *compose.SWEEP) or key == "trainer.devices"):
            raise BitfrontError(f"{key} is the same for all cells of a sweep; give it one value")
        if key in compose.GROUPS:
            chosen[key] = _choices(override)
    for group in compose.CELL:
        chosen.setdefault(group, [compose.default(group)])
    pairs = [dict(zip(chosen, choice, strict=True)) for choice in itertools.product(*chosen.values())]
    configs = [(compose.files(**pair), pair["quant"]) for pair in pairs]
    plain = [override for override in overrides if override.key_or_group not in compose.GROUPS]
    _check_size(plain)
    for refused in (_check_key, _check_value):
        for config, method in configs:
            for override in plain:
                refused(config, override, method, plain)


def _check_size(overrides: Sequence[Override]) -> None:
    """Refuse a size together with what it is in place of."""
    given = {o.key_or_group.removeprefix("quant."): _values(o) for o in overrides}
    for key in ("bits", "penalty"):
        if key in given and any(given.get("max_size", ())):
            raise BitfrontError(
                f"max_size is in place of {key}; give one of them (quant.layers={{<pattern>: {{bits: 8}}}} settles "
                "some tensors, and max_size the others)"
            )


def check_values(config: Config) -> None:
    """Refuse values that are out of range, as the objects made of them do, which need torch.

    Raises:
        BitfrontError: with the range.
    """
    values = config.values
    if values["max_size"] and not {"bits", "init_bits"} & values["quant"].keys():
        raise BitfrontError(f"quant={config.method} has no widths that max_size={values['max_size']} could choose")
    whole = trains(values) or values["quant"].get("reestimate_bn")
    if values["offload"] and whole and "min_size" in values["quant"]:
        raise BitfrontError(
            f"offload={values['offload']} is of methods that quantize after training, without quant.sft and "
            "quant.reestimate_bn, which have all of the network on the device"
        )
    if not recipe_of(config).epochs and trains(values) and "min_size" in values["quant"]:
        trained = "quant.sft=true" if calibrated(values) else f"quant={config.method}"
        raise BitfrontError(
            f"{trained} needs training, and train.epochs=0 of task={config.task} is none; quant=rtn, gptq, gsq "
            "and decoupleq do without, or give train.epochs=<n> if its data are enough"
        )
    if values["quant"].get("sft_codes") and (optim := recipe_of(config).optim) != "adamw":
        raise BitfrontError(
            f"train.optim={optim} would not move codes but to 0; give train.optim=adamw with quant.sft_codes=true"
        )
    for group, name in zip(compose.CELL, (config.task, config.method), strict=True):
        label = functools.partial(_typed, values, group)
        refuse({"seed": values["seed"], **values[group]}, declared(compose.target(group, name)), label)
    refuse(values["trainer"], TRAINER, "trainer.{}".format)
    refuse(values, {"offload": declared(CALIBRATION)["offload"]})


def recipe_of(config: Config) -> Recipe:
    """The recipe of a configuration.

    Raises:
        BitfrontError: its values do not fit.
    """
    try:
        return Recipe(**config.values["train"])
    except TypeError as error:
        raise BitfrontError(f"train.* of task={config.task}: {error}") from None


def _typed(values: Mapping[str, Any], group: str, key: str) -> str:
    """The word by which a user sets a key: the knob of its name, if there is one."""
    return key if key in values else f"{group}.{key}"


def check_type(key: str, default: Any, value: Any) -> None:
    """Refuse a value that is not of the type of a key's default, or not among its choices.

    Raises:
        BitfrontError: with the type, or the choices.
    """
    if key == "quant.layers":
        pairs = value.items() if isinstance(value, dict) else [(value, value)] if value is not None else []
        if not all(isinstance(name, (str, QuotedString)) and isinstance(some, dict) for name, some in pairs):
            raise BitfrontError(f"{key} takes a mapping like {{head.*: {{bits: 8}}}}, got '{value}'")
        return
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
    for element in value if isinstance(value, list) else ():
        check_type(f"each in {key}", default[0] if default else "", element)
    if key in CHOICES and str(value) not in CHOICES[key]:
        raise BitfrontError(f"there is no {key}={value}; choices: {', '.join(CHOICES[key])}")


def check_choice(group: str, name: str) -> None:
    """Refuse a task, method, cluster or sweeper that there is no yaml of.

    Raises:
        BitfrontError: with the choices.
    """
    if name not in (known := compose.options(group)):
        raise BitfrontError(f"there is no {group}={name}; {closest(name, known)}choices: {', '.join(known)}")


def closest(name: str, known: Sequence[str]) -> str:
    """A suggestion, if a known name is close."""
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean '{close[0]}'? " if close else ""


def _choices(override: Override) -> list[str]:
    names = [str(value) for value in _values(override)]
    for name in names:
        check_choice(override.key_or_group, name)
    return names


def _values(override: Override) -> list[Any]:
    if not override.is_sweep_override():
        return [override.value()]
    return list(override.sweep_iterator()) if override.is_discrete_sweep() else []


def _check_key(config: DictConfig, override: Override, method: str, overrides: list[Override]) -> None:
    key = override.key_or_group
    if compose.names(key, "sweeper") and OmegaConf.select(config, key) is None:
        raise BitfrontError(f"{key} is an option of a search; add sweeper=optuna")
    if compose.names(key, *compose.BLOCKS):
        raise BitfrontError(
            f"'{key}' is a fact of the task, in its yaml; a cell sets train.*, quant.min_size, quant.samples and so on"
        )
    known = [k for k in _keys(config) if not compose.names(k, "hydra", *compose.BLOCKS) and k != "task.fingerprint"]
    if key not in known:
        short = [k for k in known if "." not in k and not OmegaConf.is_config(config[k])]
        short += [k for k in known if k.startswith("quant.") and k != "quant._target_"]
        near = closest(key, [*known, *OF_COMMANDS])
        raise BitfrontError(f"quant={method} has no option '{key}'; {near}options: {', '.join(short)}, task.*, train.*")
    if key.startswith("train.") and calibrated(config) and not (config.quant.sft or _sets(overrides, "quant.sft")):
        raise BitfrontError(
            f"quant={method} does not train, so {key} means nothing to it; for another float start run quant=float "
            "with it and give init_from=<its artifact>; quant.sft=true fine-tunes"
        )


def _check_value(config: DictConfig, override: Override, method: str, overrides: list[Override]) -> None:
    key = override.key_or_group
    default = OmegaConf.select(config, key)
    interval = override.value()
    if isinstance(interval, IntervalSweep) and type(default) is not type(interval.start):
        raise BitfrontError(f"{key} takes no such interval; whole numbers take int(interval(2,8)), words a list: a,b,c")
    if compose.shared().get(key, key) is None:  # null in config.yaml: null or a word
        default = None
    plain = OmegaConf.to_container(default) if OmegaConf.is_config(default) else default
    for value in _values(override):
        check_type(key, plain, value)


def _sets(overrides: list[Override], key: str) -> bool:
    """Whether the command line has a true value for a key."""
    return any(True in _values(o) for o in overrides if o.key_or_group == key)


def _keys(config: Mapping[Any, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key in map(str, config):
        keys.append(prefix + key)
        node = config._get_node(key) if isinstance(config, DictConfig) else config[key]
        if isinstance(node, DictConfig):
            keys += _keys(node, f"{prefix}{key}.")
    return keys
