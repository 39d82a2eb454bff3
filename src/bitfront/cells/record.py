"""The record of a run: ``record.json``, one schema, read by report, page and dashboard."""

from __future__ import annotations

import builtins
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from bitfront.cells.compose import command
from bitfront.cells.identity import identity
from bitfront.errors import first_line
from bitfront.quant.log import UNTUNED, blind, untuned

SCHEMA = "bitfront/record/2"
FILE = "record.json"


@dataclass(frozen=True)
class Primary:
    """The headline metric, on the test split."""

    name: str
    higher_is_better: bool
    value: float

    def better(self, value: float) -> float:
        """A value of the metric such that more is better."""
        return value if self.higher_is_better else -value


@dataclass(frozen=True)
class Sizes:
    """Sizes of a run's network.

    Attributes:
        file: bytes of the artifact, the size that counts.
        payload: bytes of its tensors.
        float: bytes of the float network's tensors.
        rule_mb: MB by the papers' rule.
        parameters: number of parameters.
    """

    file: int
    payload: int
    float: int
    rule_mb: builtins.float
    parameters: int


@dataclass(frozen=True, kw_only=True)
class Head:
    """What is known of a run before it has begun.

    Attributes:
        id: ``identity`` of the cell.
        task, method, setting: as ``compose.Config`` has them.
        seed: of the cell.
        overrides: the words of its command line.
        config: the values of ``compose.Config``.
        init_sha256: hash of the artifact that it starts from, or None.
        environment: code revision, versions and machine.
    """

    id: str
    task: str
    method: str
    setting: str
    seed: int
    overrides: list[str]
    config: dict[str, Any]
    init_sha256: str | None
    environment: dict[str, Any]

    @property
    def smoke(self) -> bool:
        """Whether it is of a tiny network on generated data."""
        return bool(self.config["smoke"])

    @property
    def command(self) -> str:
        """The command line that makes the run again."""
        return command(self.overrides)

    def identity(self) -> str:
        """The id by what the record says."""
        return identity(self.task, self.method, self.config, self.init_sha256)


@dataclass(frozen=True, kw_only=True)
class Record(Head):
    """A finished run.

    Attributes:
        primary: name and value of the headline metric.
        metrics: by split, by name.
        sizes: of the file and the network.
        widths: by quantized tensor, how many of its weights have 0, 1, 2, ... bits.
        stages: by name, ``seconds``, ``peak_memory`` and ``peak_gpu_memory`` in bytes.
        history: numbers of each epoch.
        artifact, artifact_sha256: path and hash of the file.
        device: "cpu", or a GPU by its name.
        processes: that trained together.
        calibration: of each layer and block, how a method after training fared, and which share of the weights it had
            to round ``blind`` (not in older records).
        samples: by split, how many the metrics are of; none in older records.
    """

    primary: Primary
    metrics: dict[str, dict[str, float]]
    sizes: Sizes
    widths: dict[str, list[int]]
    stages: dict[str, dict[str, float]]
    history: list[dict[str, float]]
    artifact: str
    artifact_sha256: str
    device: str = "cpu"
    processes: int = 1
    calibration: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Of calibration and training; evaluation does not count."""
        return sum(stage["seconds"] for name, stage in self.stages.items() if name != "evaluate")

    def metric(self, split: str) -> float | None:
        """The headline metric on a split."""
        return self.metrics.get(split, {}).get(self.primary.name)

    def summary(self) -> str:
        """One line: metric, size, ratio, what is float or was rounded blind, file."""
        cell = f"{self.task} {self.method} {self.setting}".strip()
        return (
            f"{cell}: {self.primary.name} {self.primary.value:.4g}, {self.sizes.file:,} bytes, "
            f"{self.sizes.float / self.sizes.file:.2f}x smaller than float{self._remarks()}  {self.artifact}"
        )

    def _remarks(self) -> str:
        if not self.widths:
            return ""
        size = {name: sum(counts) for name, counts in self.widths.items()}
        unquantized = 4 * (self.sizes.parameters - sum(size.values()))
        told = f", {100 * unquantized / self.sizes.file:.0f} % of it float"
        if unseen := blind(self.calibration.get("layers", [])):
            share = 100 * sum(size[name] for name in unseen) / sum(size.values())
            told += f", {share:.2g} % of the weights rounded blind ({', '.join(dict.fromkeys(unseen.values()))})"
        return told + self._at_an_end() + (f", {UNTUNED}" if untuned(self.calibration) else "")

    def _at_an_end(self) -> str:
        """Whether learned widths have all come to the smallest or the largest, where the metric has no say in them."""
        for key, end in (("min_bits", "smallest"), ("max_bits", "largest")):
            bits = self.config["quant"].get(key)
            if bits is not None and all(not any(n for b, n in enumerate(c) if b != bits) for c in self.widths.values()):
                return f", all weights at the {end} width ({bits} bits)"
        return ""

    def as_json(self) -> dict[str, Any]:
        """The content of its file."""
        content = asdict(self)
        return {key: value for key, value in content.items() if key not in ("calibration", "samples") or value}

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Self:
        """From the content of its file.

        Raises:
            ValueError: a key is missing, unknown, or of another type.
        """
        known = {f.name: f for f in fields(cls)}
        if unknown := content.keys() - known.keys():
            raise ValueError(f"unknown {', '.join(sorted(unknown))}")
        required = {name for name, f in known.items() if f.default is f.default_factory is MISSING}
        if missing := required - content.keys():
            raise ValueError(f"no {', '.join(sorted(missing))}")
        for name, value in content.items():
            if not isinstance(value, _KINDS.get(str(known[name].type).partition("[")[0], object)):
                raise ValueError(f"{name} is {type(value).__name__}")
        if wrong := [name for name in ("id", "task", "method") if not re.fullmatch(r"\w[\w.-]*", content[name])]:
            raise ValueError(f"{wrong[0]} is no name: {content[wrong[0]]!r}")  # files are named by it
        try:
            primary, sizes = Primary(**content["primary"]), Sizes(**content["sizes"])
            _check_nested(content, primary, sizes)
            record = cls(**{**content, "primary": primary, "sizes": sizes})
            record.identity(), record.command, record.seconds, record.summary()  # as readers do
        except (TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None
        return record


def _check_nested(content: Mapping[str, Any], primary: Primary, sizes: Sizes) -> None:
    """Fail on numbers that are none, and on what readers need and is not there."""
    numbers = [primary.value, *vars(sizes).values()]
    numbers += [
        value for part in (*content["metrics"].values(), *content["stages"].values()) for value in part.values()
    ]
    numbers += [count for counts in content["widths"].values() for count in counts]
    numbers += content.get("samples", {}).values()
    if not all(isinstance(value, (int, float)) for value in numbers):
        raise ValueError("a number is none")
    if min(sizes.file, sizes.float, sizes.parameters) <= 0:
        raise ValueError("a size is none")
    config = content["config"]
    if not {"smoke", "seed", "init_from"} <= config.keys():
        raise ValueError("config lacks a part")
    if not all(isinstance(config[part], Mapping) for part in ("task", "train", "quant", "trainer")):
        raise ValueError("a part of config is none")
    content["environment"]["dirty"], content["metrics"]["test"][primary.name]


_KINDS: dict[str, Any] = {
    **{"str": str, "int": int, "list": list, "dict": Mapping, "Primary": Mapping, "Sizes": Mapping},
    "str | None": (str, type(None)),
}


def read(path: Path) -> Record | None:
    """A finished record, or None if the file is missing, cut off or no such record."""
    try:
        return _finished(path)
    except (OSError, ValueError):
        return None


def read_all(root: Path, skipped: dict[Path, str] | None = None) -> list[Record]:
    """Every finished record below a folder: run directories, or copies of their records under any name.

    Args:
        root: the folder.
        skipped: gets those that should be records and cannot be read as such, and why.
    """
    found: list[Record] = []
    for path in sorted(root.rglob("*.json")):
        if "wandb" in path.relative_to(root).parts:  # W&B's own files
            continue
        try:
            found += filter(None, [_finished(path)])
        except (OSError, ValueError) as error:
            if skipped is not None:
                skipped[path] = first_line(error)
    return found


def _finished(path: Path) -> Record | None:
    """A record; None of a run that is not finished, and of other JSON.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or of another version.
    """
    try:
        content = json.loads(path.read_text())
    except RecursionError:
        raise ValueError("nested too deeply") from None
    schema = content.pop("schema", None) if isinstance(content, dict) else None
    if not isinstance(schema, str) or not schema.startswith(SCHEMA.rpartition("/")[0]):
        return None
    if content.pop("status", None) != "finished":
        return None
    if schema != SCHEMA:
        raise ValueError(f"of version {schema}, not {SCHEMA}")
    return Record.of(content)


def text_of(status: str, content: Mapping[str, Any]) -> str:
    """The text of a record's file."""
    return json.dumps({"schema": SCHEMA, "status": status} | dict(content), indent=1) + "\n"


def numbers(records: Sequence[Record]) -> set[str]:
    """The names of all that their epochs have logged."""
    return {name for record in records for epoch in record.history for name in epoch} - {"epoch"}
