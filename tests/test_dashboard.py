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
from conftest import REPOSITORY, command, wandb_run

from src import dashboard, record
from src.run import run_cell

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


def made(records: list[dict[str, Any]]) -> dict[str, Any]:
    return dashboard.view(records, "bitfront")._to_model().model_dump(by_alias=True, exclude_none=True)


@pytest.mark.parametrize(
    ("task", "methods"),
    [("vit", ["diffq", "rtn"]), ("lm", ["lsq"]), ("separation", ["ste"]), ("asr", ["diffq"]), ("resnet", ["float"])],
)
def test_every_key_of_a_view_is_logged_by_a_run(task: str, methods: list[str], tmp_path: Path) -> None:
    shared = [f"task={task}", "smoke=true", f"root={tmp_path}", "trainer.accelerator=cpu", "wandb=offline"]
    records = [run_cell([*shared, f"quant={method}", "init_from=null"]) for method in methods if method != "rtn"]
    if "rtn" in methods:
        records.append(run_cell([*shared, "quant=rtn", f"init_from={records[0]['artifact']}"]))
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
    records = [each for each in record.read_all(RECORDS) if each["task"] == "vit"]
    trained = {"Bits over time", "Histograms of bits over time", "Training"}
    assert trained < sections(made(records)).keys()
    assert not trained & sections(made([each for each in records if not each["history"]])).keys()
    assert trained & sections(made([r for r in records if r["method"] == "float"])).keys() == {"Training"}


@pytest.mark.parametrize(("task", "line"), [("vit", "showMaxYAxisLine"), ("lm", "showMinYAxisLine")])
def test_the_front_is_of_the_better_direction(task: str, line: str) -> None:
    spec = made([each for each in record.read_all(RECORDS) if each["task"] == task])
    for panel in sections(spec)["Metric against size"]:
        assert panel["viewType"] == "Scatter Plot"
        assert [key for key in panel["config"] if key.startswith("show") and panel["config"][key]] == [line]


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["dashboard", *arguments])
    dashboard.main()


def test_the_dry_run_prints_every_panel_of_every_task(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(str(RECORDS), "dry_run=true", monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    for view in dashboard.views(RECORDS, "", "bitfront"):
        spec = view._to_model().model_dump(by_alias=True, exclude_none=True)
        assert spec["displayName"] in printed
        assert all(word in printed for panels in sections(spec).values() for p in panels for word in words(p["config"]))


def test_mistakes_have_remedies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"`wandb login`.*dry_run=true"):
        run(str(RECORDS), "task=vit", monkeypatch=monkeypatch)
    with pytest.raises(SystemExit, match=r"no finished runs in .*; make one: python -m src\.run"):
        run(str(tmp_path), "dry_run=true", monkeypatch=monkeypatch)
    with pytest.raises(SystemExit, match=r"no finished runs of task=vti.*task=asr"):
        run(str(RECORDS), "task=vti", "dry_run=true", monkeypatch=monkeypatch)
    with pytest.raises(SystemExit, match="dry_run takes true or false, got 'yes'"):
        run(str(RECORDS), "dry_run=yes", monkeypatch=monkeypatch)


def test_a_missing_library_is_named_as_the_project_pins_it() -> None:
    code = "import sys; sys.modules['wandb_workspaces'] = None; from src import dashboard; dashboard.main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "dry_run=true"], capture_output=True, text=True, cwd=REPOSITORY
    )
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
    result = command("src.dashboard", str(RECORDS), "task=vit")
    assert result.returncode == 0, result.stderr
    (view,) = server.saved
    assert (view["entityName"], view["projectName"]) == ("someone", "bitfront")
    assert re.search(r"http://127\.0\.0\.1:\d+/someone/bitfront\?nw=\w+", result.stdout)
    dry = command("src.dashboard", str(RECORDS), "task=vit", "dry_run=true").stdout
    assert dashboard.outline(view | {"project": view["projectName"], "spec": json.loads(view["spec"])}) == dry.rstrip()


def test_a_refusal_of_the_server_is_one_message(server: type[Server]) -> None:
    result = command("src.dashboard", str(RECORDS), "task=vit", "project=elsewhere", "entity=team")
    assert result.returncode == 1 and not server.saved
    assert "Traceback" not in result.stderr and "project not found" in result.stderr
    assert "wandb sync runs/*/*/*/wandb/offline-run-*" in result.stderr
