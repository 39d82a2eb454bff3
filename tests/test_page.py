"""The report's page in a real browser, from a file without a network: it sorts, filters, opens runs, fits a phone."""

from __future__ import annotations

import base64
import copy
import gzip
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from playwright.sync_api import expect, sync_playwright
from test_report import number

from bitfront.cells.record import Primary, Record, read_all
from bitfront.reports.page import html
from bitfront.reports.rows import MIB, Row, rows

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = os.environ.get("BITFRONT_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = (
    "no-sandbox",
    "disable-gpu",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "no-first-run",
)
HOSTILE = "bits=3 note=</script><script>document.title='hacked'</script><img src=x onerror=alert(1)>"
PAPERS = [
    number(95.5, task="resnet", method="diffq", setting="penalty=1.0", size=0.2 * MIB, certainty="recalled"),
    number(96.0, task="resnet", method="omniquant", setting=HOSTILE, size=0.3 * MIB, note=HOSTILE),
]
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser: install chromium, or set BITFRONT_BROWSER; looked for {', '.join(NAMES)}"
)


@cache
def records() -> list[Record]:
    """The committed ones, one of them of an author of strange settings."""
    found = read_all(REPOSITORY / "results" / "records")
    one = next(r for r in found if r.task == "resnet" and r.method == "decoupleq")
    strange = changed(one, id="0123456789", setting=HOSTILE, overrides=["a=<b>", HOSTILE])
    strange.config["<i>"], strange.config["quant"]["bits"] = HOSTILE, 3
    for name in list(strange.widths):
        strange.widths[HOSTILE + name] = strange.widths.pop(name)
    diverged = changed(one, id="9876543210", setting="bits=1", task="diverged", primary=valued(one, math.nan))
    diverged.metrics["test"]["top1"] = math.nan
    diverged.history[:] = [{"epoch": 1, "train/loss": math.nan}]
    far = []
    for bits, value in ((2, 12.5), (3, 80.0), (4, 81.0)):
        metrics = {split: {**some, one.primary.name: value} for split, some in one.metrics.items()}
        told = {"id": f"{bits}" * 10, "setting": f"bits={bits}", "task": "far", "metrics": metrics}
        far.append(changed(one, **told, primary=valued(one, value)))
        far[-1].config["quant"]["bits"] = bits
    return [*found, strange, diverged, *far]


def changed(record: Record, **values: Any) -> Record:
    """A copy that shares nothing with it."""
    return replace(copy.deepcopy(record), **values)


def valued(record: Record, value: float) -> Primary:
    """Its headline metric with another value."""
    return replace(record.primary, value=value)


@cache
def tables() -> dict[str, list[Row]]:
    table = rows(records(), PAPERS)
    return {task: [row for row in table if row.task == task] for task in sorted({row.task for row in table})}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html(tables(), PAPERS))
    return path.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=[f"--{flag}" for flag in FLAGS])
        yield browser
        browser.close()


@pytest.fixture(params=[(1366, 768), (390, 844)], ids=["laptop", "phone"])
def page(request: pytest.FixtureRequest, browser: Any, address: str) -> Iterator[Any]:
    """The page; any error, and any request but for the file, fails the test."""
    width, height = request.param
    context = browser.new_context(viewport={"width": width, "height": height}, has_touch=width < 500)
    wrong: list[str] = []
    page = context.new_page()
    page.set_default_timeout(10_000)
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda sent: sent.url.partition("#")[0] != address and wrong.append(sent.url))
    page.goto(address)
    page.address = address
    yield page
    assert not wrong
    context.close()


def visit(page: Any, place: str, heading: str) -> None:
    page.goto(f"{page.address}#{place}")
    expect(page.locator("h1")).to_contain_text(heading)


def column(page: Any, heading: str) -> list[str]:
    """A column of the table of settings, as shown."""
    heads = [text.strip("↕▲▼ \n") for text in page.locator("thead").first.locator("th").all_inner_texts()]
    place = heads.index(heading)
    lines = page.locator("tbody").first.locator("tr")
    return [lines.nth(n).locator("th,td").nth(place).inner_text().strip() for n in range(lines.count())]


def no_sideways(page: Any) -> bool:
    """Whether the page itself is as wide as its window."""
    return page.evaluate(
        "document.documentElement.scrollWidth <= innerWidth && document.body.scrollWidth <= innerWidth"
    )


@needs_browser
def test_the_overview_has_every_task(page: Any) -> None:
    there = sorted({record.task for record in records()} - {"diverged"})  # which has no number to show
    assert page.locator(".card.task h2").count() == len(there) == page.locator("nav a").count() - 1
    expect(page.locator(".card.task svg path.solid")).to_have_count(sum(map(len, tables().values())) - 1)
    assert no_sideways(page)
    page.get_by_role("searchbox").fill("separation lsq")
    fitting = [
        task for task, part in tables().items() if "separation" in task and "lsq" in {row.method for row in part}
    ]
    assert [text.split()[0] for text in page.locator(".card.task h2").all_inner_texts()] == fitting != there
    page.get_by_role("searchbox").fill("no such thing")
    assert page.get_by_text("No row fits the filters").is_visible()
    page.get_by_role("button", name="Reset").click()
    assert page.locator(".card.task").count() == len(there)
    page.locator(".card.task", has_text="separation_mir1k").click()
    expect(page.locator("h1")).to_have_text("separation_mir1k")


@needs_browser
def test_it_sorts_by_its_headings(page: Any) -> None:
    visit(page, "vit", "vit")
    sizes = [float(text) for text in column(page, "MiB")]
    assert len(sizes) == len(tables()["vit"]) and sizes == sorted(sizes)
    for heading in ("MiB", "top1 ↑", "ratio"):
        button = page.locator("thead button", has_text=heading)
        button.click()
        first = [float(text.split()[0]) for text in column(page, heading)]
        assert first == sorted(first, reverse=heading == "MiB")  # it was sorted by size before
        button.press("Enter")
        assert [float(text.split()[0]) for text in column(page, heading)] == sorted(first, reverse=heading != "MiB")
    sorted_by = page.locator("th[aria-sort=descending]")
    assert sorted_by.count() == 1 and "ratio" in sorted_by.inner_text() and no_sideways(page)


@needs_browser
def test_it_filters_rows_and_points(page: Any) -> None:
    visit(page, "vit", "vit")
    table = tables()["vit"]
    every = page.locator("tbody").first.locator("tr")
    page.get_by_label("Maximum size in MiB").fill("0.2")
    small = [row for row in table if row.size <= 0.2 * MIB]
    assert every.count() == len(small) < len(table)
    expect(page.locator(".point")).to_have_count(len(small))
    page.get_by_role("button", name="diffq", exact=True).click()
    assert page.get_by_role("button", name="diffq", exact=True).get_attribute("aria-pressed") == "false"
    left = [row for row in small if row.method != "diffq"]
    assert every.count() == len(left) < len(small)
    page.get_by_role("searchbox").fill("bits=2 LSQ")
    assert [text.split() for text in column(page, "method")] == [["lsq", "bits=2"]]
    page.get_by_role("button", name="Reset").click()
    page.get_by_label("Pareto front only").check()
    assert every.count() == sum(row.best for row in table) == page.locator("tr.best").count()
    page.locator("nav a", has_text=re.compile("^lm$")).click()  # filters stay
    expect(every).to_have_count(sum(row.best for row in tables()["lm"]))


@needs_browser
def test_a_point_tells_its_run_and_command(page: Any) -> None:
    visit(page, "resnet", "resnet")
    row = next(row for row in tables()["resnet"] if (row.method, row.setting) == ("lsq", "bits=4"))
    point, tip = page.locator(f".point[data-run='{row.runs[0]}']"), page.locator(".tip:visible")
    point.scroll_into_view_if_needed()
    box = point.locator(".target").bounding_box()
    place = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(*place) if page.viewport_size["width"] > 500 else page.touchscreen.tap(*place)
    tip.wait_for()
    text = tip.inner_text()
    assert "lsq" in text and "bits=4" in text and f"{row.size / MIB:.3f} MiB" in text and f"{row.value:.2f}" in text
    assert "python -m src.run task=resnet quant=lsq" in text
    tip.get_by_role("button", name="Copy").click()
    tip.get_by_role("button", name=re.compile("Copied|Selected")).wait_for()
    page.keyboard.press("Escape")
    expect(tip).to_have_count(0)
    point.focus()
    tip.wait_for()
    page.keyboard.press("Enter")
    assert no_sideways(page)
    tip.get_by_role("link", name=row.runs[0]).click()
    expect(page.locator("h1")).to_contain_text("lsq bits=4")


@needs_browser
def test_a_run_shows_its_whole_record_and_leads_back(page: Any) -> None:
    visit(page, "separation", "separation")
    record = next(r for r in records() if (r.task, r.method) == ("separation", "diffq"))
    page.get_by_role("searchbox").fill("diffq")
    page.locator("td a.run", has_text=record.id).click()
    expect(page.locator("h1")).to_contain_text("diffq penalty=0.1")
    text = page.locator("main").inner_text()
    assert "python -m src.run task=separation quant=diffq" in text and record.artifact_sha256 in text
    for key, value in (*record.config["quant"].items(), *record.environment["packages"].items()):
        shown = "" if isinstance(value, (list, type(None))) else str(value).lower()
        assert key in text and shown in text.lower(), key
    for name in record.widths:
        assert name.removesuffix(".weight") in text
    shown = {figure.get_attribute("aria-label") for figure in page.locator(".figure").all()}
    assert {"valid nsdr", "train, valid loss", "size, MB", "Weights by bits", "mean bits per weight"} <= shown
    expect(page.locator(".figure svg .line path").nth(4)).to_be_attached()
    assert page.locator("rect.bar").count() >= 2
    assert no_sideways(page)
    page.go_back()
    expect(page.locator("h1")).to_have_text("separation")
    assert page.get_by_role("searchbox").input_value() == "diffq"
    visit(page, f"run/{record.id}", "diffq penalty=0.1")  # by its own address, too
    page.locator(".back a").click()
    expect(page.locator("h1")).to_have_text("separation")


@needs_browser
def test_layers_of_methods_after_training(page: Any) -> None:
    visit(page, "lm", "lm")
    chart = page.get_by_role("group", name="relative loss of the layer's output")
    chart.locator("svg.lines").wait_for()
    layers = [row.records[0].calibration.get("layers", []) for row in tables()["lm"]]
    settings = sum(any("loss" in layer for layer in of) for of in layers)
    expect(chart.locator("svg .line")).to_have_count(settings)
    chart.locator("svg.lines").focus()
    page.keyboard.press("ArrowRight")
    assert "python -m src.run" in chart.locator(".tip").inner_text()
    record = next(r for r in records() if (r.task, r.method) == ("lm", "decoupleq") and "bits=2" in r.setting)
    visit(page, f"run/{record.id}", f"decoupleq {record.setting}")
    table = page.get_by_role("region", name="Layers in the network's order")
    table.wait_for()
    assert table.locator("tbody tr").count() == len(record.widths)
    assert "gptq" in table.inner_text() and "stored" in table.inner_text()
    assert page.get_by_role("region", name="Blocks, tuned").locator("tbody tr").count() == len(
        record.calibration["blocks"]
    )
    assert no_sideways(page)


@needs_browser
def test_published_numbers_are_hollow_points_and_marked_cells(page: Any) -> None:
    visit(page, "resnet", "resnet")
    expect(page.locator("path.hollow")).to_have_count(2)
    shown = dict(zip(column(page, "method"), column(page, "paper"), strict=True))
    assert [text for text in shown.values() if text] == ["95.50‡"]
    assert "‡ recalled" in page.locator("main").inner_text()
    listed = page.get_by_role("region", name="Published numbers of resnet").locator("tbody tr")
    assert listed.count() == len(PAPERS) and "95.50‡" in listed.first.inner_text() and no_sideways(page)
    page.locator(".point", has=page.locator("path.hollow")).last.focus()
    assert HOSTILE in page.locator(".tip:visible").inner_text()


@needs_browser
def test_text_of_records_stays_text(page: Any) -> None:
    visit(page, "resnet", "resnet")
    assert any(HOSTILE in " ".join(text.split()) for text in column(page, "method"))
    visit(page, "run/0123456789", "<script>")
    assert page.locator("main img, main script, main i").count() == 0 and page.title().startswith("decoupleq bits=3")
    assert no_sideways(page)


@needs_browser
def test_a_row_far_off_lies_on_the_edge_with_its_value(page: Any) -> None:
    visit(page, "far", "far")
    expect(page.locator(".point text")).to_have_text(["12.50"])
    ticks = [float(text) for text in page.locator(".canvas").first.locator(".grid ~ .tick").all_text_contents()]
    assert len([tick for tick in ticks if 70 < tick < 82]) > 2
    page.get_by_role("searchbox").fill("bits=2")  # alone it is a point as any other
    expect(page.locator(".point text")).to_have_count(0)
    expect(page.locator(".point")).to_have_count(1)


@needs_browser
def test_a_run_that_diverged_is_shown_as_such(page: Any) -> None:
    visit(page, "diverged", "diverged")
    assert column(page, "top1 ↑") == ["not finite"] and page.get_by_text("No point").is_visible()
    visit(page, "run/9876543210", "decoupleq bits=1")
    assert "not finite" in page.locator(".tiles").inner_text()


def test_the_page_is_one_small_file_with_all_records() -> None:
    text = html(tables(), PAPERS)
    assert text == html(tables(), PAPERS)
    assert len(text) < sum(len(json.dumps(record.as_json())) for record in records()) / 5
    assert not re.search(r"<link[^>]+href=\"(?!data:,)|<script[^>]+src=|@import|url\(", text) and "hacked" in text
    assert text.count("</script>") == 3  # none of a record's
    packed = re.search(r'id="runs">([^<]+)<', text)
    assert packed
    kept = json.loads(gzip.decompress(base64.b64decode(packed[1])))
    for record in records():
        assert kept[record.id]["config"] == record.config
        assert kept[record.id]["widths"] == record.widths
        for shown, epoch in zip(kept[record.id]["history"], record.history, strict=True):
            finite = {key: value for key, value in epoch.items() if math.isfinite(value)}
            assert {key: value for key, value in shown.items() if value is not None} == pytest.approx(finite, rel=1e-5)
