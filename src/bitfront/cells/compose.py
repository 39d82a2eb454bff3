"""A cell's configuration: what the yaml files say of its task and method, then the command line.

Hydra composes the files of each pair once. What a task says for all methods stands in blocks of its yaml, and is laid
over the recipe and the method's settings in this order, each over the one before:

    train                what the float network is trained with
    finetune.train       what of it differs where a cell starts from trained weights
    calibration.train    what of it differs where a calibrated network is fine-tuned (``quant.sft=true``)
    methods.<method>     what is true of this pair alone
    the command line
    tiny                 with ``smoke=true``, first over the blocks, in the end over all: whole numbers are upper limits
"""

from __future__ import annotations

import copy
import functools
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bitfront.cells.identity import FINGERPRINT, calibrated
from bitfront.data.folders import find, first
from bitfront.data.identified import fingerprint
from bitfront.errors import BitfrontError, first_line
from bitfront.models.pretrained import NETWORKS
from bitfront.shipped import module, shipped
from bitfront.theirs import FOLDER

CONF = shipped("conf")
OWN = "BITFRONT_CONF"  # a folder of the user's with tasks and methods beside ours; --config-dir sets it
CELL = ("task", "quant")  # the groups that make a cell
PLACES, PLAIN = ("root", "data_root"), re.compile(r"[\w/.:+-]*", re.ASCII)  # of one folder; words that need no quotes
SWEEP = ("cluster", "sweeper")  # those that say how many cells are run
GROUPS = (*CELL, *SWEEP)
BLOCKS = ("finetune", "tensors", "calibration", "methods", "tiny")  # of a task, which no word of a command line sets
SHOWN = (
    "task.",
    "train.",
    "quant.",
    "init_from",
    "max_size",
    "raw_dtype",
    "trainer.",
)  # in the setting, if they differ


@dataclass(frozen=True)
class Config:
    """One cell's configuration.

    Attributes:
        task, method: names of the choices.
        values: of all keys; ``task``, ``train`` and ``quant`` are what builds its objects.
        setting: as words, the method's first knob, and what else differs from the files.
    """

    task: str
    method: str
    values: dict[str, Any]
    setting: str


def folders() -> list[Path]:
    """Where the yaml files are: the user's own, and ours."""
    return [*([Path(own)] if (own := os.environ.get(OWN)) else []), CONF]


def use(folder: str) -> None:
    """Have the user's own tasks and methods beside ours, in this process and in those that it starts.

    Raises:
        BitfrontError: there are none, or one has the name of one of ours.
    """
    path = Path(folder).resolve()
    own = {group: {file.stem for file in (path / group).glob("*.yaml")} for group in CELL}
    if not folder or not any(own.values()):
        raise BitfrontError(f"--config-dir takes a folder with task/<name>.yaml or quant/<name>.yaml, got '{folder}'")
    for group, found in own.items():
        if taken := sorted(found & {file.stem for file in (CONF / group).glob("*.yaml")}):
            raise BitfrontError(f"'{path / group / taken[0]}.yaml' has the name of a {group} of ours; rename it")
    os.environ[OWN] = str(path)


def options(group: str) -> list[str]:
    """The choices of a group: its yaml files."""
    return sorted({path.stem for folder in folders() for path in (folder / group).glob("*.yaml")})


def file(group: str, name: str) -> Path:
    """The yaml of a choice, or of what it builds on."""
    return next(path for folder in folders() if (path := folder / group / f"{name}.yaml").is_file())


def target(group: str, name: str) -> str:
    """The class of a task or method, as our configuration, or the user's own, names it."""
    other = {"task": "quant", "quant": "task"}[group]
    return str(files(**{group: name, other: default(other)})[group]["_target_"])


def default(group: str) -> str:
    """What is chosen without a word."""
    return next(part[group] for part in shared()["defaults"] if isinstance(part, dict) and group in part)


def shared() -> dict[str, Any]:
    """What every cell has: config.yaml."""
    return _content(CONF / "config.yaml")


def load(words: Sequence[str]) -> Config:
    """Compose a cell.

    Args:
        words: of a command line without sweeps, as ``task=vit quant=diffq penalty=5``.
    """
    overrides = {o.key_or_group: o for o in parse(words) if not names(o.key_or_group, *SWEEP, "hydra")}
    task, method = (str(overrides[group].value()) if group in overrides else default(group) for group in CELL)
    base = files(task=task, quant=method)
    typed = {_by_knob(base, key): o for key, o in overrides.items() if key not in CELL}
    try:
        found = _layered(base, method, {key: o.value() for key, o in typed.items()})
        plain = OmegaConf.to_container(found, resolve=True)
    except OmegaConfBaseException as error:
        raise BitfrontError(f"task={task} quant={method} cannot be resolved: {first_line(error)}") from None
    assert isinstance(plain, dict)
    values = {str(key): value for key, value in plain.items() if key not in (*BLOCKS, *SWEEP)}
    for group, name in zip(CELL, (task, method), strict=True):
        if not isinstance(values.get(group), dict) or values[group].pop("_target_", None) is None:
            raise BitfrontError(f"'{file(group, name)}' has no {group}._target_, the class of {group}={name}")
    return Config(task, method, values, _setting(task, method, typed, found))


def fingerprinted(config: Config) -> Config:
    """The configuration with what identifies the user's own data, and a network in a folder, if it is of such a task.

    Raises:
        BitfrontError: no data is given, or there is none.
    """
    values = config.values
    data, network = values["task"].get("data"), str(values["task"].get("network"))
    if FINGERPRINT in values["task"] and data != "generated":
        if str(data).startswith("<"):
            raise BitfrontError(f"task={config.task} needs data={data}")
        places = [find(str(data), values["data_root"])]
        if training := values["task"].get("train_data"):
            places.append(first(training, values["data_root"], "task.train_data="))
        if network.startswith(FOLDER):
            name = network.removeprefix(FOLDER)
            try:
                places.append(find(name, values["data_root"], f"model={FOLDER}"))
            except BitfrontError as error:
                raise BitfrontError(f"{error}{'; ' * bool(told := fetched(name))}{told}") from None
        values["task"][FINGERPRINT] = "-".join(fingerprint(place, values["data_root"]) for place in places)
    return config


def fetched(place: str) -> str:
    """How trained weights that are missing are downloaded, if they can be."""
    name = place.partition("/")[0]
    return f"`{module('fetch')} {name}` downloads it" if name in NETWORKS else ""


def _setting(task: str, method: str, typed: Mapping[str, Override], found: DictConfig) -> str:
    usual = _usual(task, method, bool(found.smoke), *searchpath())
    of_method, of_task = knobs("quant", method), {knob for knob, _ in knobs("task", task)}
    told = [f"{knob}={found[knob]}" for n, (knob, value) in enumerate(of_method) if n == 0 or found[knob] != value]
    told = [word for word in told if not (found.max_size and word.startswith(("bits=", "penalty=")))]  # in their place
    for key, o in typed.items():
        shown = key in of_task or (key.startswith(SHOWN) and key != "trainer.accelerator")
        if shown and OmegaConf.select(usual, key) != OmegaConf.select(found, key):
            value = o.value()  # of which a sweep escapes some characters
            told.append(f"{key}={value if isinstance(value, str) else (o.input_line or '').partition('=')[2]}")
    return " ".join(told)


def parse(words: Sequence[str]) -> list[Override]:
    """What each word of a command line means; a name twice means what comes last. ``glob(*)`` is what it matches."""
    parser, found = OverridesParser.create(), {}
    for o in parser.parse_overrides(list(words)):
        value = o.value()
        if isinstance(value, Glob) and o.key_or_group in GROUPS:
            o = parser.parse_override(f"{o.key_or_group}={','.join(value.filter(options(o.key_or_group)))}")
        found[o.key_or_group] = o
    return list(found.values())


def quoted(word: str) -> str:
    """A word of a command line as Hydra's grammar has it, which keeps some characters for itself: places, and whatever
    it does not understand, are taken as they stand, places with the user's folder for ``~``."""
    key, given, value = word.partition("=")
    if not given or value[:1] in ("'", '"'):
        return word
    if key in PLACES:
        value = os.path.expanduser(value)
        word = f"{key}={value}"
    if PLAIN.fullmatch(value) if key in PLACES else _understood(word):
        return word
    inside = re.sub(r"(\\*)('|$)", lambda end: 2 * end[1] + ("\\'" if end[2] else ""), value)
    return text if _understood(text := f"{key}='{inside}'") else word


def _understood(word: str) -> bool:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def files(**choices: str) -> DictConfig:
    """The yaml files of some choices as Hydra composes them, not resolved and not to be changed; each once."""
    return _composed(*(f"{group}={name}" for group, name in sorted(choices.items())), *searchpath())


@functools.cache
def _composed(*words: str) -> DictConfig:
    try:
        if GlobalHydra.instance().is_initialized():  # inside a job of Hydra's
            return compose("config", list(words))
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("config", list(words))
    except MissingConfigException as error:
        if error.missing_cfg_file == "hydra/launcher/ray":
            raise BitfrontError(
                "cluster=ray needs two more packages: pip install 'hydra-ray-launcher==1.2.2' 'ray[default]==2.60.0'"
            ) from None
        raise BitfrontError(f"the yaml files of {' '.join(words)} build on one that there is not: {error}") from None
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, TypeError) as error:
        raise BitfrontError(f"the yaml files of {' '.join(words)} do not fit together: {error}") from None


def searchpath() -> list[str]:
    """The word by which Hydra finds the user's own folder, if there is one."""
    return [f"hydra.searchpath=['file://{own}']"] if (own := os.environ.get(OWN)) else []


def command(words: Sequence[str]) -> str:
    """The command line that runs a cell."""
    own = ["--config-dir", os.environ[OWN]] if os.environ.get(OWN) else []
    return f"{module('run')} {shlex.join([*own, *words])}"


def names(word: str, *keys: str) -> bool:
    """Whether an override is of one of these top-level keys or groups: ``trainer.devices=2`` is of ``trainer``."""
    return re.split(r"[=./]", word, maxsplit=1)[0] in keys


def knobs(group: str, name: str) -> list[tuple[str, Any]]:
    """The keys that a choice's yaml, or one that it builds on, declares at top level, with their defaults."""
    keys = _content(file(group, name))
    if group in SWEEP:
        return [(f"{group}.{key}", value) for key, value in keys[group].items()]
    own = {key: v for key, v in keys.items() if key not in (*GROUPS, *BLOCKS, "train", "init_from", "defaults")}
    parts = [part for part in keys.get("defaults", []) if isinstance(part, str) and part != "_self_"]
    bases = [str(Path(name).parent / part) for part in parts]
    inherited = {key: value for base in bases for key, value in knobs(group, base)}
    return [*own.items(), *((key, value) for key, value in inherited.items() if key not in own)]


@functools.cache
def _usual(task: str, method: str, smoke: bool, *_: str) -> DictConfig:
    """A cell without a word of its own."""
    return _layered(files(task=task, quant=method), method, {"smoke": smoke})


def _content(path: Path) -> dict[str, Any]:
    return _parsed(path, path.stat().st_mtime_ns)


@functools.cache
def _parsed(path: Path, _: int) -> dict[str, Any]:
    return yaml.safe_load(path.read_text()) or {}


def _layered(base: DictConfig, method: str, typed: Mapping[str, Any]) -> DictConfig:
    if typed.get("smoke", base.smoke):
        base = copy.deepcopy(base)
        _shrink(base, base.tiny or {})
    pair, words = base.methods.get(method) or {}, OmegaConf.create()
    for key, value in typed.items():
        OmegaConf.update(words, key, value, force_add=True)
    asked = OmegaConf.merge(base, pair, words)
    recipe = None
    if calibrated(base):
        recipe = base.calibration.train if asked.quant.sft else None
    elif asked.init_from is not None:
        recipe = base.finetune.train
    found = OmegaConf.merge(base, {"train": recipe or {}}, pair, words)
    assert isinstance(found, DictConfig)
    if found.smoke:
        _shrink(found, found.tiny or {})
    return found


def _shrink(config: DictConfig, limits: Any) -> None:
    """Lay ``tiny`` over a configuration: whole numbers are upper limits."""
    for key, limit in limits.items():
        if OmegaConf.is_dict(limit) and OmegaConf.is_dict(config.get(key)):
            _shrink(config[key], limit)
        elif type(limit) is int:
            config[key] = min(config[key], limit)
        else:
            config[key] = limit


def _by_knob(base: DictConfig, key: str) -> str:
    """``bits`` for ``quant.bits``, where a knob sets the key: one cell has one setting."""
    group, _, name = key.partition(".")
    raw: Any = OmegaConf.to_container(base[group], resolve=False) if group in CELL else {}
    knob = re.fullmatch(r"\$\{(\w+)\}", str(raw.get(name)))
    return knob[1] if knob else key
