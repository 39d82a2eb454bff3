"""Processes that die: killed at any moment, the same commands end with the same files, and redo no more than they must.

    python -m benchmarks.kills               # 108 kills; writes results/benchmarks/kills.json and kills.md

Half of the kills come at a random moment, half before or after one of the files is put in its place. What was saved by
then must be taken up, and the end be that of an undisturbed run: the artifact byte for byte, metrics, history, no file
that is left over.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from bitfront.cells.provenance import environment
from bitfront.cells.record import Record, read_all
from bitfront.cells.runs import Run
from bitfront.commands import start

OUT = Path("results/benchmarks")
SMOKE = ("task=vit", "smoke=true", "trainer.accelerator=cpu", "wandb=disabled")
CELLS = {
    "training, float": ("quant=float", "seed=1"),
    "training, LSQ": ("quant=lsq", "bits=3"),
    "training, DiffQ": ("quant=diffq",),
    "training, DiffQ-LSQ in a size": ("quant=diffq_lsq", "max_size=0.03"),
    "after training, GPTQ": ("quant=gptq", "bits=3"),
    "after training, decoupleQ": ("quant=decoupleq", "bits=2", "J=2"),
    "after training, decoupleQ fine-tuned": ("quant=decoupleq", "bits=2", "quant.sft=true"),
    "after training, GSQ": ("quant=gsq", "bits=2"),
}
SWEEP = ("-m", *SMOKE, "quant=rtn,lsq,gptq", "cluster=local", "cluster.workers=2")
EACH = 11  # kills of each cell; of a sweep and of a report, ten
OTHERS = multiprocessing.get_context("forkserver")


def there(log: Path, name: str, words: Sequence[str], at_write: int, after: bool, counted: Path | None) -> None:
    """A command in this process, which kills itself at its n-th file; -1 for none."""
    os.setsid()
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    calls, real = [0], os.replace

    def replace(*arguments: Any, **options: Any) -> None:
        calls[0] += 1
        if calls[0] == at_write and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*arguments, **options)
        if calls[0] == at_write and after:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace
    start(name, words)
    if counted:
        counted.write_text(str(calls[0]))


class Kills:
    """What was done, and what was lost."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.counts: Counter[tuple[str, str]] = Counter()
        self.lost: list[str] = []

    def process(
        self, log: Path, name: str, words: Sequence[str], at_write: int = -1, after: bool = False, counted: Any = None
    ) -> BaseProcess:
        process = OTHERS.Process(target=there, args=(log, name, words, at_write, after, counted))
        process.start()
        return process

    def whole(self, log: Path, name: str, words: Sequence[str], counted: Path | None = None) -> float:
        """Run a command to its end; seconds."""
        began = time.monotonic()
        process = self.process(log, name, words, counted=counted)
        process.join()
        if process.exitcode:
            raise RuntimeError(f"{words} ended with {process.exitcode}: {log.read_text()[-2000:]}")
        return time.monotonic() - began

    def killed(self, log: Path, name: str, words: Sequence[str], seconds: float, writes: int, n: int) -> bool:
        """Run a command and kill it; false if it was quicker."""
        if n % 2:
            process = self.process(log, name, words, self.rng.randint(1, writes), self.rng.random() < 0.5)
            process.join()
        else:
            process = self.process(log, name, words)
            process.join(self.rng.uniform(0.1, 1.0) * seconds)
            if process.exitcode is None:
                os.killpg(os.getpgid(process.pid or 0), signal.SIGKILL)
                process.join()
        return process.exitcode == -signal.SIGKILL

    def check(self, kind: str, holds: bool, fault: str) -> None:
        """Count what has to hold."""
        if not holds:
            self.lost.append(f"{kind}: {fault}")
        self.counts[kind, "as undisturbed" if holds else "lost"] += 1

    def cell(self, kind: str, options: Sequence[str], times: int) -> None:
        """Kill a cell that starts from a finished float network, if it starts from one."""
        base, own = self.folder / "base", self.folder / kind
        words = (*SMOKE, *options)
        shutil.copytree(base, own / "straight")
        log, counted = own / "log", own / "count"
        seconds = self.whole(log, "run", (*words, f"root={own}/straight"), counted)
        (wanted,) = new(own / "straight", base)
        n = done = 0
        while done < times:
            n += 1
            root = own / f"{n}"
            shutil.copytree(base, root)
            told, again = (*words, f"root={root}"), own / f"log{n}"
            if not self.killed(again, "run", told, seconds, int(counted.read_text()), n):
                continue
            done += 1
            path = root / Path(wanted.artifact).parent.relative_to(own / "straight")
            run = Run(path)
            begun = "" if run.finished() else run.begun()
            before = again.stat().st_size
            self.whole(again, "run", told)
            (record,) = new(root, base)
            text = again.read_bytes()[before:].decode()
            ends = [(r.artifact_sha256, r.metrics, r.history) for r in (record, wanted)]
            same, kept = ends[0] == ends[1], not begun or f"after {begun}" in text
            names = {p.name for p in path.iterdir()} == {p.name for p in Path(wanted.artifact).parent.iterdir()}
            self.check(kind, same and kept and names, f"kill {n}: same {same}, taken up {kept}, files {names}")
            shutil.rmtree(root)

    def sweep(self, times: int) -> None:
        """Kill a sweep on two workers."""
        kind, base = "sweep on two workers", self.folder / "base"
        straight, log, counted = self.folder / "sweep", self.folder / "sweep.log", self.folder / "sweep.count"
        shutil.copytree(base, straight)
        seconds = self.whole(log, "run", (*SWEEP, f"root={straight}"), counted)
        wanted = {r.id: r.artifact_sha256 for r in read_all(straight)}
        n = done = 0
        while done < times:
            n += 2  # at a moment: the workers write
            root = self.folder / f"sweep{n}"
            shutil.copytree(base, root)
            words = (*SWEEP, f"root={root}")
            if not self.killed(log, "run", words, seconds, 1, n):
                continue
            done += 1
            while any(Run(path).held() for path in root.glob("*/*/*")):  # workers end when they see that it has gone
                time.sleep(0.1)
            before = {r.id: Path(r.artifact).with_name("record.json").stat().st_mtime_ns for r in read_all(root)}
            self.whole(log, "run", words)
            found = read_all(root)
            after = {r.id: Path(r.artifact).with_name("record.json").stat().st_mtime_ns for r in found}
            same = {r.id: r.artifact_sha256 for r in found} == wanted
            kept = {i: after[i] for i in before} == before
            self.check(kind, same and kept, f"kill {n}: same {same}, finished cells kept {kept}")
            shutil.rmtree(root)

    def report(self, times: int) -> None:
        """Kill a report that is written over an older one."""
        kind, records = "report", Path("results/records").resolve()
        old, fresh, log, counted = (self.folder / f"report.{name}" for name in ("old", "new", "log", "count"))
        words = (str(records), "task=vit,resnet")
        self.whole(log, "report", (*words, "method=lsq,float", f"out={old}"))
        seconds = self.whole(log, "report", (*words, f"out={fresh}"), counted)
        before, wanted = contents(old), contents(fresh)
        n = done = 0
        while done < times:
            n += 1
            out = self.folder / f"report{n}"
            shutil.copytree(old, out)
            if not self.killed(log, "report", (*words, f"out={out}"), seconds, int(counted.read_text()), n):
                continue
            done += 1
            found = {name: content for name, content in contents(out).items() if not name.startswith(".")}
            whole = all(content in (before.get(name), wanted.get(name)) for name, content in found.items())
            for path in out.glob(".*"):
                os.utime(path, (0, 0))
            self.whole(log, "report", (*words, f"out={out}"))
            same = contents(out) == before | wanted
            self.check(kind, whole and same, f"kill {n}: old or new {whole}, same {same}")
            shutil.rmtree(out)


def new(root: Path, base: Path) -> list[Record]:
    """The records of a root that another one has not."""
    known = {r.id for r in read_all(base)}
    return [r for r in read_all(root) if r.id not in known]


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def main() -> None:
    OTHERS.set_forkserver_preload(["bitfront.cells.flow"])
    os.environ |= {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        kills = Kills(Path(folder))
        kills.whole(Path(folder) / "log", "run", (*SMOKE, "quant=float", f"root={folder}/base"))
        jobs: list[Callable[[], None]] = [partial(kills.cell, kind, words, EACH) for kind, words in CELLS.items()]
        jobs += [partial(kills.sweep, 10), partial(kills.report, 10)]
        for job in jobs:
            job()
            sys.stderr.write(f"{sum(kills.counts.values())} kills, {len(kills.lost)} lost\n")
    lines = ["| killed | outcome | kills |", "|---|---|---|"]
    lines += [f"| {kind} | {outcome} | {n} |" for (kind, outcome), n in sorted(kills.counts.items())]
    lines += ["", "`python -m benchmarks.kills`."]
    told = {"counts": sorted(map(list, kills.counts.items())), "environment": environment()}
    (OUT / "kills.json").write_text(json.dumps(told, indent=1) + "\n")
    (OUT / "kills.md").write_text("\n".join(lines) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")
    if kills.lost:
        sys.exit("\n".join(["error: something was lost", *kills.lost]))


if __name__ == "__main__":
    main()
