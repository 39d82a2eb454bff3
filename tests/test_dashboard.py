"""The views for W&B: every key in them is one that runs log, and what is saved is what the dry run shows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from conftest import REPOSITORY, cli, wandb_run

from bitfront.cells.cell import Cell
from bitfront.cells.record import Record, read_all
from bitfront.reports import dashboard

RECORDS = REPOSITORY / "results" / "records"
TITLES = {"chartTitle", "diffOnly"}  # of a panel's settings, those that name no key


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no netrc"))


def sections(spec: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The panels of a view's model by section."""
    return {part["name"]: part["panels"] for part in spec["spec"]["section"]["panelBankConfig"]["sections"]}


def words(value: Any) -> list[str]:
    """Every text in a panel's settings, but titles."""
    if isinstance(value, dict):
        return [word for key, item in value.items() if key not in TITLES for word in words(item)]
    if isinstance(value, list):
        return [word for item in value for word in words(item)]
    return [value] if isinstance(value, str) else []


def made(records: list[Record]) -> dict[str, Any]:
    return dashboard.view(records, "bitfront")._to_model().model_dump(by_alias=True, exclude_none=True)


@pytest.mark.parametrize(
    ("task", "methods"),
    [("vit", ["diffq", "rtn"]), ("lm", ["lsq"]), ("separation", ["ste"]), ("asr", ["diffq"]), ("resnet", ["float"])],
)
def test_every_key_of_a_view_is_logged_by_a_run(task: str, methods: list[str], tmp_path: Path) -> None:
    shared = [f"task={task}", "smoke=true", f"root={tmp_path}", "trainer.accelerator=cpu", "wandb=offline"]
    records = [Cell([*shared, f"quant={method}", "init_from=null"]).execute() for method in methods if method != "rtn"]
    if "rtn" in methods:
        records.append(Cell([*shared, "quant=rtn", f"init_from={records[0].artifact}"]).execute())
    logged = [wandb_run(tmp_path / task / method) for method in methods]
    config = {name for run in logged for name in run["config"]}
    summary = {name for run in logged for name in run["summary"]}
    lines = [line["item"] for run in logged for line in run["lines"].get("history", [])]
    history = {re.sub(r"\.(_type|bins|values)$", "", name) for item in lines for name in item}

    spec = made(records)
    for panels in sections(spec).values():
        for panel in panels:
            over_time = panel["viewType"] == "Run History Line Plot"
            for word in words(panel["config"]):
                if word.startswith("summary:"):
                    assert word.removeprefix("summary:") in summary
                elif word.endswith(".value"):
                    assert word.removesuffix(".value") in config
                elif word.endswith("/.*"):
                    assert over_time and any(re.fullmatch(word, name) for name in history)
                elif word != "group":  # every run has one
                    assert word in (history if over_time else summary), panel
    (shown,) = spec["spec"]["section"]["runSets"]
    assert {each["key"]["name"] for each in shown["filters"]["filters"]} == {"task", "smoke"} <= config
    columns = set(shown["runFeed"]["columnOrder"]) - {"run:displayName"}
    assert {name.removeprefix("summary:") for name in columns} < summary
    assert shown["sort"]["keys"][0]["key"] == {"section": "summary", "name": "size/mib"}


def test_what_no_run_has_logged_is_not_in_a_view() -> None:
    records = [record for record in read_all(RECORDS) if record.task == "vit"]
    trained = {"Bits over time", "Histograms of bits over time", "Training"}
    assert trained < sections(made(records)).keys()
    assert not trained & sections(made([record for record in records if not record.history])).keys()
    assert trained & sections(made([record for record in records if record.method == "float"])).keys() == {"Training"}


@pytest.mark.parametrize(("task", "line"), [("vit", "showMaxYAxisLine"), ("lm", "showMinYAxisLine")])
def test_the_front_is_of_the_better_direction(task: str, line: str) -> None:
    spec = made([record for record in read_all(RECORDS) if record.task == task])
    for panel in sections(spec)["Metric against size"]:
        assert panel["viewType"] == "Scatter Plot"
        assert [key for key in panel["config"] if key.startswith("show") and panel["config"][key]] == [line]


def test_the_dry_run_prints_every_panel_of_every_task() -> None:
    printed = cli("dashboard", str(RECORDS), "dry_run=true").stdout
    for view in dashboard.views(RECORDS, "", "bitfront"):
        spec = view._to_model().model_dump(by_alias=True, exclude_none=True)
        assert spec["displayName"] in printed
        assert all(word in printed for panels in sections(spec).values() for p in panels for word in words(p["config"]))


@pytest.mark.parametrize(
    ("place", "more", "answer"),
    [
        (RECORDS, ["task=vit"], r"`wandb login`.*dry_run=true"),
        (Path("/nowhere"), ["dry_run=true"], r"no finished runs in .*; make one: python -m src\.run"),
        (RECORDS, ["task=vti", "dry_run=true"], r"no finished runs of task=vti.*task=asr"),
        (RECORDS, ["dry_run=maybe"], "dry_run takes true or false, got 'maybe'"),
    ],
)
def test_mistakes_have_remedies(place: Path, more: list[str], answer: str) -> None:
    result = cli("dashboard", str(place), *more)
    assert result.returncode == 1 and re.search(answer, result.stderr)


def test_a_missing_library_is_named_as_the_project_pins_it() -> None:
    code = "import sys; sys.modules['wandb_workspaces'] = None; from bitfront.commands import start; start('dashboard')"
    result = subprocess.run([sys.executable, "-c", code, "dry_run=true"], capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    requirement = result.stderr.rpartition("pip install ")[2].strip()
    assert f'"{requirement}"' in (REPOSITORY / "pyproject.toml").read_text()


class Server(BaseHTTPRequestHandler):
    """As much of W&B's server as saving a view needs."""

    saved: list[dict[str, Any]]
    project = "bitfront"

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            query = json.loads(sent)
            answer = {
                "data": {"viewer": {"id": "1", "entity": "someone", "username": "someone", "teams": {"edges": []}}}
            }
            if "upsertView" in query["query"]:
                answer = self.upsert(query["variables"])
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def upsert(self, view: dict[str, Any]) -> dict[str, Any]:
        if view["projectName"] != self.project:
            return {"errors": [{"message": "project not found"}], "data": {"upsertView": None}}
        self.saved.append(view)
        return {"data": {"upsertView": {"view": {"id": "1", "name": view["name"]}, "inserted": True}}}

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Server]]:
    """An imitation of W&B's server, to which a user is logged in."""
    handler = type("Handler", (Server,), {"saved": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        Thread(target=listening.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listening.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        yield handler
        listening.shutdown()


def test_saving_sends_what_the_dry_run_shows(server: type[Server]) -> None:
    result = cli("dashboard", str(RECORDS), "task=vit")
    assert result.returncode == 0, result.stderr
    (view,) = server.saved
    assert (view["entityName"], view["projectName"]) == ("someone", "bitfront")
    assert re.search(r"http://127\.0\.0\.1:\d+/someone/bitfront\?nw=\w+", result.stdout)
    dry = cli("dashboard", str(RECORDS), "task=vit", "dry_run=true").stdout
    assert dashboard.outline(view | {"project": view["projectName"], "spec": json.loads(view["spec"])}) == dry.rstrip()


def test_a_refusal_of_the_server_is_one_message(server: type[Server]) -> None:
    result = cli("dashboard", str(RECORDS), "task=vit", "project=elsewhere", "entity=team")
    assert result.returncode == 1 and not server.saved
    assert "Traceback" not in result.stderr and "project not found" in result.stderr
    assert "wandb sync runs/*/*/*/wandb/offline-run-*" in result.stderr
