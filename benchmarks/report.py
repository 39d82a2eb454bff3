"""The report of many runs: time until its tables are printed, until all is written, and the page in a browser.

    python -m benchmarks.report              # 1,000 records; writes results/benchmarks/report.json and report.md

The records are copies of the published ones with other ids, values and seeds or settings. The browser is
chromium, or what BITFRONT_BROWSER names.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bitfront.cells.provenance import environment
from bitfront.cells.record import read_all, text_of

OUT = Path("results/benchmarks")
RECORDS = 1000
REPEATS = 5


def synthetic(folder: Path) -> None:
    """Write the records: every second copy is another seed, the others are other settings."""
    random.seed(0)
    published = read_all(Path("results/records"))
    for n, original in zip(range(RECORDS), itertools.cycle(r.as_json() for r in published), strict=False):
        copy = varied(original) | {"id": hashlib.sha1(str(n).encode()).hexdigest()[:10]}
        copy["primary"]["value"] = copy["metrics"]["test"][copy["primary"]["name"]]
        which = n // len(published)
        copy["config"], copy["sizes"] = original["config"], original["sizes"]
        if which % 2:
            copy["seed"] = copy["config"]["seed"] = original["seed"] + 10 * which
        else:
            copy["setting"] = f"{original['setting']} quant.samples={which}".strip()
            copy["config"] = original["config"] | {"quant": original["config"]["quant"] | {"samples": which}}
            copy["sizes"] = original["sizes"] | {"file": original["sizes"]["file"] + 1000 * which}
        path = folder / copy["task"] / copy["method"] / copy["id"] / "record.json"
        path.parent.mkdir(parents=True)
        path.write_text(text_of("finished", copy))


def varied(value: Any) -> Any:
    """The same with every number that is not whole a little off."""
    if isinstance(value, float):
        return value * random.gauss(1, 1e-3)
    if isinstance(value, list):
        return [varied(item) for item in value]
    return {key: varied(item) for key, item in value.items()} if isinstance(value, dict) else value


def report(folder: Path) -> dict[str, float]:
    """Seconds of one report: until the last table is printed, and until it ends."""
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "120"}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "src.report", str(folder)], stdout=subprocess.PIPE, text=True, env=variables
    )
    assert process.stdout is not None
    printed = began
    for line in process.stdout:
        if line.startswith("tables and figures"):
            break
        printed = time.perf_counter()
    if process.wait():
        sys.exit("error: the report failed")
    return {"tables printed, s": printed - began, "all written, s": time.perf_counter() - began}


def browse(page: Path, run: str, settings: str) -> dict[str, float]:
    """Seconds until the page shows its overview, the largest table, and a run."""
    from playwright.sync_api import sync_playwright

    browser = os.environ.get("BITFRONT_BROWSER") or shutil.which("chromium")
    if browser is None:
        sys.exit("error: no browser; install chromium or set BITFRONT_BROWSER")
    seconds = {}
    with sync_playwright() as playwright:
        window = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        for what, place, shown in (
            ("page opened, s", "", ".card.task"),
            ("largest task opened, s", f"#{settings}", ".lines"),
            ("first run opened, s", f"#run/{run}", ".tiles"),
        ):
            tab = window.new_page()
            began = time.perf_counter()
            tab.goto(page.resolve().as_uri() + place)
            tab.locator(shown).first.wait_for()
            seconds[what] = time.perf_counter() - began
            tab.close()
        window.close()
    return seconds


def main() -> None:
    """Measure, and write the results."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthetic(folder)
        records = read_all(folder)
        largest = statistics.mode(r.task for r in records)
        page = folder / "report" / "report.html"
        repeats = [report(folder) | browse(page, records[0].id, largest) for _ in range(REPEATS)]
        figures = {what: statistics.median(repeat[what] for repeat in repeats) for what in repeats[0]}
        figures["page, MiB"] = page.stat().st_size / 2**20
        figures["records, MiB"] = sum(path.stat().st_size for path in folder.rglob("record.json")) / 2**20
    made_with = environment()
    lines = [f"| {len(records):,} records | |", "|---|---|", *(f"| {what} | {n:.2f} |" for what, n in figures.items())]
    lines += ["", f"Medians of {REPEATS}. `python -m benchmarks.report`, {made_with['machine']}."]
    (OUT / "report.md").write_text("\n".join(lines) + "\n")
    (OUT / "report.json").write_text(json.dumps({"figures": figures, "environment": made_with}, indent=1) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
