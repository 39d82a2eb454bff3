"""Identity: an id is of what determines the result, and of nothing else; every committed record has its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, cli

from bitfront.cells import compose, identity, runs
from bitfront.cells.cell import Cell
from bitfront.cells.identity import FINGERPRINT
from bitfront.cells.record import FILE, Record, read_all, text_of
from bitfront.cells.runs import Origin

RESULTS = REPOSITORY / "results"
COMMITTED = [*read_all(RESULTS / "records"), *read_all(RESULTS / "tuning"), *read_all(RESULTS / "floats")]
SMOKE = ["task=vit", "smoke=true", "wandb=disabled", "trainer.accelerator=cpu"]


def of(*words: str, init: str | None = None) -> str:
    config = compose.load(words)
    return identity.identity(config.task, config.method, config.values, init)


def test_it_is_of_values_however_they_are_typed() -> None:
    base = of("quant=diffq", "penalty=5")
    for word in ("penalty=5.0", "quant.penalty=5", "task=vit", "train.lr=1e-3", "train.clip=0.0"):
        assert of("quant=diffq", "penalty=5", word) == base, word
    assert of("quant=diffq", "penalty=5", init="abc") != base
    layers = ("quant.layers={a*: {bits: 2}, b*: {bits: 3}}", "quant.layers={b*: {bits: 3}, a*: {bits: 2}}")
    assert of("quant=ste", layers[0]) != of("quant=ste", layers[1])  # where both match, the later counts


ELSEWHERE = {"root", "data_root", "offload", "wandb", "trainer.accelerator"}  # below, with a run of each
BY_CONTENT = {"init_from"}  # the hash of the file counts


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def other(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    return {int: 7, float: 0.77, list: ["x"]}.get(type(value), "x")


@pytest.mark.parametrize("method", compose.options("quant"))
def test_every_option_counts_or_is_named_as_a_place(method: str) -> None:
    more = {"rtn": "quant.sft=true", "lsq": "max_size=0.5", "ste": "max_size=0.5"}
    more |= dict.fromkeys(("gptq", "decoupleq", "gsq"), more["rtn"])
    config = compose.load([f"quant={method}", *([more[method]] if method in more else [])])
    knobs = {knob for group, name in (("task", "vit"), ("quant", method)) for knob, _ in compose.knobs(group, name)}
    base = identity.identity("vit", method, config.values, None)
    counted = set()
    for key, value in leaves(config.values).items():
        changed = yaml.safe_load(yaml.safe_dump(config.values))
        *path, last = key.split(".")
        node = changed
        for part in path:
            node = node[part]
        node[last] = {"x": {"bits": 2}} if last == "layers" else other(value)
        if identity.identity("vit", method, changed, None) != base:
            counted.add(key)
    # A knob, and a size, is told again by the key that it sets.
    assert leaves(config.values).keys() - counted == ELSEWHERE | BY_CONTENT | knobs | {"max_size", "raw_dtype"}


def run(root: Path, *words: str) -> Record:
    assert cli("run", *SMOKE, f"root={root}", *words).returncode == 0
    (record,) = read_all(root)
    return record


def test_places_do_not_change_the_result(tmp_path: Path) -> None:
    records = [
        run(tmp_path / "a", "quant=diffq", "init_from=null"),
        run(tmp_path / "b", "quant=diffq", "init_from=null", "data_root=/nowhere", "wandb=offline"),
        run(tmp_path / "c", "quant=diffq", "init_from=null", "trainer.accelerator=auto"),
    ]
    assert len({record.id for record in records}) == len({record.artifact_sha256 for record in records}) == 1


def test_parts_of_a_batch_make_another_cell(tmp_path: Path) -> None:
    """Batch norms see the parts, so that another network comes out."""
    words = ("task=resnet", "quant=float")
    whole, parts = run(tmp_path / "a", *words), run(tmp_path / "b", *words, "trainer.accumulate_grad_batches=4")
    assert whole.artifact_sha256 != parts.artifact_sha256 and whole.id != parts.id
    assert parts.setting == "trainer.accumulate_grad_batches=4"


def test_where_nothing_is_trained_the_recipe_does_not_count(tmp_path: Path) -> None:
    first = run(tmp_path / "a", "quant=float")
    words = ("quant=rtn", f"init_from={first.artifact}")
    record = run(tmp_path / "b", *words)
    config = yaml.safe_load(yaml.safe_dump(record.config))
    config["train"]["lr"] = 5.0
    assert identity.identity("vit", "rtn", config, record.init_sha256) == record.id
    config["quant"]["sft"] = True
    assert identity.identity("vit", "rtn", config, record.init_sha256) != record.id


def test_but_for_what_batch_norms_are_measured_on(tmp_path: Path) -> None:
    start = run(tmp_path / "a", "task=resnet", "quant=float")
    words = ("task=resnet", "quant=rtn", f"init_from={start.artifact}", "quant.reestimate_bn=true")
    record = run(tmp_path / "b", *words)
    for key, counts in (("batch_size", True), ("repeats", True), ("lr", False), ("epochs", False)):
        config = yaml.safe_load(yaml.safe_dump(record.config))
        config["train"][key] = 7
        assert (identity.identity("resnet", "rtn", config, record.init_sha256) != record.id) == counts, key


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The id of a cell of a configuration that is changed in some files."""
    conf = tmp_path / "conf"
    shutil.copytree(compose.CONF, conf)
    monkeypatch.setattr(compose, "CONF", conf)

    def forget() -> None:
        for cached in (compose._composed, compose._usual):
            cached.cache_clear()

    def changed(file: str, *replacements: tuple[str, str], words: tuple[str, ...] = ("quant=diffq",)) -> str:
        text = (compose.CONF / file).read_text()
        for old, new in replacements:
            assert old in text
            (compose.CONF / file).write_text(text.replace(old, new))
        forget()
        found = of(*words)
        (compose.CONF / file).write_text(text)
        forget()
        return found

    return changed


def test_what_an_id_promises(own: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that comes later and is off, and a class that moves, keep all ids; a default that changes, changes the
    ids of the cells that have it.
    """
    before = {method: of(f"quant={method}") for method in compose.options("quant")}
    file, words = "quant/diffq.yaml", ("quant=diffq",)
    assert own(file, ("  extra_bits: 0\n", "  extra_bits: 0\n  dither: false\n")) != before["diffq"]
    monkeypatch.setitem(identity.BORN, "quant.dither", False)
    assert own(file, ("  extra_bits: 0\n", "  extra_bits: 0\n  dither: false\n")) == before["diffq"]
    assert own(file, ("  extra_bits: 0\n", "  extra_bits: 0\n  dither: true\n")) != before["diffq"]
    assert own(file, ("bitfront.quant.methods.diffq.DiffQ", "bitfront.moved.Renamed")) == before["diffq"]
    assert own("task/vit.yaml", ("bitfront.tasks.vision.Vision", "elsewhere.Other")) == before["diffq"]
    assert own(file, ("max_bits: 15", "max_bits: 12")) != before["diffq"]
    assert own(file, ("max_bits: 15", "max_bits: 12"), words=(*words, "quant.max_bits=15")) == before["diffq"]
    for method in before.keys() - {"diffq"}:
        assert own(file, ("max_bits: 15", "max_bits: 12"), words=(f"quant={method}",)) == before[method]


def test_every_record_has_its_own_id() -> None:
    assert len(COMMITTED) > 500
    assert [record.id for record in COMMITTED if record.identity() != record.id] == []
    stems = [path.stem for folder in ("records", "tuning") for path in (RESULTS / folder).rglob("*.json")]
    stems += [path.parent.name for path in (RESULTS / "floats").rglob("record.json")]
    assert sorted(stems) == sorted(record.id for record in COMMITTED)


def put(record: Record, path: Path) -> None:
    """A run directory as if the run had been there."""
    path.mkdir(parents=True, exist_ok=True)
    with open(path / "model.safetensors", "ab") as file:
        file.truncate(record.sizes.file)
    (path / FILE).write_text(text_of("finished", record.as_json()))


def begun_from(cell: Cell, record: Record) -> Cell:
    """With the file that it starts from as its record has it, where that is not here."""
    place = cell.config.values["init_from"]
    if place not in (None, "float") and not Path(place).exists():
        cell._origin = Origin(place, str(record.init_sha256))
    return cell


def test_every_records_command_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(RESULTS / "floats", "runs")  # some start from these by their path
    starts = {(record.task, record.artifact_sha256): record for record in COMMITTED}
    known: dict[tuple[str, ...], Cell] = {}

    def as_recorded(config: compose.Config) -> compose.Config:
        """Of data, and networks, that are not here."""
        if FINGERPRINT in config.values["task"]:
            config.values["task"][FINGERPRINT] = record.config["task"][FINGERPRINT]
        return config

    monkeypatch.setattr(compose, "fingerprinted", as_recorded)
    # Their files are not here, either, and what stands for them has another hash.
    monkeypatch.setattr(runs, "sha256", lambda path: json.loads((path.parent / FILE).read_text())["artifact_sha256"])
    for record in COMMITTED:
        cell = begun_from(Cell([*record.overrides, "root=runs", "wandb=disabled"]), record)
        path = Path("runs") / record.task / record.method / record.id
        if not path.is_dir():
            put(record, path)
        if begin := cell.start:
            cell.start = known.setdefault(tuple(begin.words), begin)  # many have the same
            # where the start itself is not committed, one of its hash stands for it
            start = starts.get((record.task, str(record.init_sha256)), record)
            run = begun_from(cell.start, start).run()
            assert run is not None
            put(replace(start, artifact_sha256=str(record.init_sha256)), run.path)
        cell.execute()
        said = capsys.readouterr().out
        assert "finished before" in said and record.id in said, record.command
