"""Files that are wrong: mutated artifacts, records and states must be refused, or be what they were.

    python -m benchmarks.faults              # 100,000 mutants; writes results/benchmarks/faults.json and faults.md

A mutant has bytes changed, cut off, moved or doubled; or is wrong on purpose: values of its JSON are others, as absurd
as they come, under checksums that fit. Whatever is no ``BitfrontError`` then, takes seconds or much memory, or is taken
for the file while it holds other numbers, is a fault.
"""

from __future__ import annotations

import io
import json
import random
import resource
import signal
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn

import bitfront
from bitfront.cells.provenance import environment
from bitfront.cells.record import Record, read, read_all
from bitfront.errors import BitfrontError
from bitfront.quant.storage.artifact import Artifact, sealed
from bitfront.reports import page, tables
from bitfront.reports.papers import published
from bitfront.reports.rows import rows
from bitfront.saved import load_saved

OUT = Path("results/benchmarks")
MUTANTS = {"artifacts": 60_000, "records": 30_000, "states": 10_000}
LIMIT = 2.0  # seconds of one
MEMORY = 128 << 20  # bytes beyond those of the start
PAGES = 200  # of as many records, one is shown on a page

DEEP: Any = []
for _ in range(400):
    DEEP = [DEEP]
ABSURD: list[Any] = [None, True, -1, 0, 1, 3, 2**31, 2**63, 10**30, 1e300, 0.5, float("nan"), float("-inf")]
ABSURD += ["", "x", "x" * 5000, "../../x", "__class__", "<script>", "=1+1", "\\", "\0"]
ABSURD += [[], {}, [[]], [-1], [1] * 100, DEEP]


@contextmanager
def within(seconds: float) -> Iterator[None]:
    def late(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def changed(data: bytes, rng: random.Random) -> bytes:
    """Bytes that have suffered."""
    at, n = rng.randrange(len(data)), rng.choice((1, 2, 8, 100))
    kind = rng.randrange(6)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + rng.randbytes(n) + data[at + n :]
    if kind == 3:
        return data[:at] + data[at + n :]
    if kind == 4:
        return data[:at] + data[at : at + n] + data[at:]
    return data + data[:at]


def absurd(value: Any, rng: random.Random) -> Any:
    """JSON of which one value is another, one key is missing, or one is new."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.2:
            return {
                rng.choice(["", "x", "../x", "__init__", key + "x"]) if k == key else k: v for k, v in value.items()
            }
        return {**value, key: absurd(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], absurd(value[at], rng), *value[at + 1 :]]
    return rng.choice(ABSURD)


class Network(nn.Module):
    """Of layers that are stored in all ways there are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 24)
        self.rows, self.padded, self.table = nn.Linear(24, 24), nn.Linear(24, 20), nn.Linear(24, 32)
        self.up = nn.ConvTranspose1d(4, 8, 3)
        self.norm = nn.BatchNorm1d(24)
        self.head = nn.Linear(24, 20, bias=False)
        self.head.weight = self.embedding.weight


def artifacts() -> list[bytes]:
    """Files of networks."""
    every: dict[str, Any] = {"min_size": 1e-4}
    kinds: list[bitfront.Method] = [
        bitfront.RTN(
            bits=3, layers={"padded.*": {"group_size": 10}, "table.*": {"group_size": 8, "scale_bits": 6}}, **every
        ),
        bitfront.RTN(bits=12, raw_dtype="float16", group_size=0, **every),
        bitfront.DiffQ(**every),
        bitfront.DiffQLSQ(**every),
    ]
    files = []
    for method in kinds:
        network = Network()
        if isinstance(method, bitfront.PostTraining):
            model = bitfront.quantize(network, method)
        else:
            model = bitfront.prepare(network, method, steps=10).eval()
            for quantizer in model.quantizers:
                cast(Any, quantizer).logits.data.normal_()
        files.append(model.artifact({"task": "vit", "config": {"task": {"dim": 32}}}).to_bytes())
    return files


def mutated_artifact(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    """A file, and whether its checksums fit."""
    if rng.random() < 0.4:
        return changed(data, rng), False
    tensors = safetensors.torch.load(data)
    text = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["bitfront"])
    header = {key: value for key, value in text.items() if "crc32" not in key}
    if rng.random() < 0.7:
        header = absurd(header, rng)
    else:
        name = rng.choice(list(tensors))
        t = tensors[name]
        content = changed(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() or b"\0", rng)
        tensors[name] = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.zeros(0)
    return safetensors.torch.save(tensors, {"bitfront": sealed(json.dumps(header), tensors)}), True


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


class Faults:
    """Mutants, and what became of them.

    Attributes:
        counts: by kind of file and outcome.
        found: some of the faults, with what they are.
    """

    def __init__(self, seed: int) -> None:
        self.rng, self.counts, self.found = random.Random(seed), Counter[tuple[str, str]](), list[str]()

    def count(self, kind: str, check: Callable[[], str]) -> None:
        """One mutant; ``check`` says what became of it."""
        try:
            with within(LIMIT):
                outcome = check()
        except BitfrontError:
            outcome = "refused"
        except TimeoutError:
            outcome = "fault: too slow"
        except Exception as error:  # which one it is, is what is asked
            outcome = f"fault: {type(error).__name__}"
        self.counts[kind, outcome] += 1
        if outcome.startswith("fault") and len(self.found) < 20:
            self.found.append(f"{kind}, {outcome}")

    def artifacts(self, n: int, folder: Path) -> None:
        files = artifacts()
        states = []
        for number, data in enumerate(files):
            (folder / str(number)).write_bytes(data)
            states.append(Artifact.load(folder / str(number)).state())
        path = folder / "mutant"
        for _ in range(n):
            number = self.rng.randrange(len(files))
            data, fits = mutated_artifact(files[number], self.rng)
            path.write_bytes(data)

            def check(number: int = number, fits: bool = fits) -> str:
                network = Network()
                bitfront.load(path, network)
                if fits:
                    return "read, as its checksums fit"
                return "harmless" if same(network.state_dict(), states[number]) else "fault: other weights"

            self.count("artifacts", check)

    def records(self, n: int, folder: Path) -> None:
        known = read_all(Path("results/records"))
        papers, path = published(), folder / "record.json"
        for number in range(n):
            record = self.rng.choice(known)
            text = json.dumps({"schema": "bitfront/record/2", "status": "finished"} | record.as_json())
            if self.rng.random() < 0.2:
                path.write_bytes(changed(text.encode(), self.rng))
            else:
                path.write_text(json.dumps(absurd(json.loads(text), self.rng)))

            def check(record: Record = record, number: int = number) -> str:
                mutant = read(path)
                if mutant is None:
                    return "refused"
                beside = [record, mutant]
                table = rows(beside, papers)
                for write in (tables.as_csv, tables.markdown, tables.latex):
                    write(table)
                if number % PAGES == 0:
                    page.html({table[0].task: table}, papers)
                return "shown"

            self.count("records", check)

    def states(self, n: int, folder: Path) -> None:
        path, wanted = folder / "state.pt", {"a": torch.arange(500.0), "b": torch.ones(3, 5).half()}
        content = {"tensors": wanted, "n": 3, "names": ["a", "b"]}
        torch.save(content, path)
        data = path.read_bytes()
        for _ in range(n):
            fits = self.rng.random() < 0.4
            path.write_bytes(self.rezipped(data) if fits else changed(data, self.rng))

            def check(fits: bool = fits) -> str:
                state = load_saved(path)
                if fits:
                    return "read, as its checksums fit"
                whole = same(state["tensors"], wanted) and (state["n"], state["names"]) == (3, ["a", "b"])
                return "harmless" if whole else "fault: other numbers"

            self.count("states", check)

    def rezipped(self, data: bytes) -> bytes:
        """With an entry that has suffered, under a checksum that fits."""
        new = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(new, "w", zipfile.ZIP_STORED) as file:
            names = old.namelist()
            one = self.rng.choice(names)
            for name in names:
                entry = old.read(name)
                file.writestr(name, changed(entry, self.rng) if name == one and entry else entry)
        return new.getvalue()


def run(mutants: Mapping[str, int], seed: int = 0) -> tuple[Faults, int]:
    """All kinds of files, and by how many bytes the process has grown."""
    faults = Faults(seed)
    with tempfile.TemporaryDirectory() as folder:
        for kind in mutants:  # once, as libraries are loaded
            getattr(faults, kind)(1, Path(folder))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for kind, n in mutants.items():
            getattr(faults, kind)(n - 1, Path(folder))
    return faults, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def main() -> None:
    faults, grown = run(MUTANTS)
    counts = {kind: {o: n for (k, o), n in sorted(faults.counts.items()) if k == kind} for kind in MUTANTS}
    told = {"counts": counts, "grown": grown, "environment": environment()}
    (OUT / "faults.json").write_text(json.dumps(told, indent=1) + "\n")
    lines = ["| files | outcome | mutants |", "|---|---|---|"]
    lines += [f"| {kind} | {outcome} | {n:,} |" for kind, some in counts.items() for outcome, n in some.items()]
    lines += ["", f"The process grew by {grown / 2**20:.0f} MiB. `python -m benchmarks.faults`."]
    (OUT / "faults.md").write_text("\n".join(lines) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")
    if faults.found or grown > MEMORY:
        sys.exit("\n".join(["error: there are faults", *faults.found]))


if __name__ == "__main__":
    main()
