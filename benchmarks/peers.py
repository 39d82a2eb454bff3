"""Our methods after training beside other packages: a language model at 2 and 3 bits in groups of 64.

    python -m src.fetch smollm2
    python -m benchmarks.peers                      # writes results/benchmarks/peers.md and peers.json; hours; Linux
    python -m benchmarks.peers only=gptq,hqq blocks=1 sequences=8 tokens=4096

The linear layers of the first ``blocks`` blocks of SmolLM2-135M are quantized, all else stays float; calibrated on
``sequences`` windows of ``data_root/books/train.txt``, measured on the first ``tokens`` tokens of
``data_root/wikitext2/test.txt``. Each row is a process of its own, one after the other, and each package has an
environment of its own below ``.peers``, which uv makes. A row that is in the file already, with the same settings, code
and packages, is not run again but with ``anew=true``; those with others leave the file. What a row that failed has
said is in ``.peers/<row>_<bits>.log``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

import bitfront
from benchmarks.peers_quantize import Job, linear, norms
from bitfront.cells.provenance import environment
from bitfront.commands.options import options
from bitfront.errors import BitfrontError
from bitfront.files import write_atomically
from bitfront.models import hf

OUT, ENVIRONMENTS = Path("results/benchmarks"), Path(".peers")
BITS, GROUP = (2, 3), 64
TIME, WINDOW = 512, 2048  # tokens of a window to calibrate on, and to measure on
CHARACTERS = 4_000_000  # of the text to calibrate on, in which the windows lie
OURS = "bitfront"
REQUIREMENTS = {"hqq": "hqq==0.2.8", "llmcompressor": "llmcompressor==0.14.0.1", "autoround": "auto-round==0.16.1"}


@dataclass(frozen=True)
class Row:
    """A line of the table: what it says, and what makes it (as in ``Job``)."""

    told: str
    peer: str = OURS
    options: dict[str, Any] = field(default_factory=dict)


def moving(epochs: int, widths: str = "one") -> Row:
    """decoupleQ with codes that move, with one width or those that ``max_size`` chooses, in a file no larger than
    AutoRound's."""
    options = {"moving": epochs, "momentum": 0.0, "damping": 1.0, "scale_bits": 6}
    told = "".join(f" {key}={value:g}" for key, value in options.items())
    size = " max_size=AutoRound's" if widths == "chosen" else ""
    return Row(
        f"ours, `decoupleq{size}{told} J=0` (bfloat16)",
        options={"method": "DecoupleQ", **options, "J": 0, "block_dtype": "bfloat16", "widths": widths},
    )


ROWS = {
    "rtn": Row("ours, round to nearest", options={"method": "RTN"}),
    "hqq": Row("HQQ (axis 1)", "hqq"),
    "llmcompressor": Row("llm-compressor, GPTQ (static act-order, damping 0.01)", "llmcompressor"),
    "autoround50": Row("AutoRound, 50 steps (bfloat16)", "autoround", {"iters": 50}),
    "autoround200": Row("AutoRound, 200 steps (bfloat16), its default", "autoround", {"iters": 200}),
    "gptq": Row("ours, `gptq`", options={"method": "GPTQ"}),
    "gptq_mse": Row("ours, `gptq grid=mse`", options={"method": "GPTQ", "grid": "mse"}),
    "decoupleq_j4": Row("ours, `decoupleq J=4`", options={"method": "DecoupleQ", "J": 4}),
    "decoupleq_damped4": moving(4),
    "decoupleq_damped8": moving(8),
    "decoupleq_sized3": moving(3, "chosen"),
    "decoupleq_sized4": moving(4, "chosen"),
    "gsq": Row("ours, `gsq moving=8` (bfloat16)", options={"method": "GSQ", "moving": 8, "block_dtype": "bfloat16"}),
}


@dataclass
class Options:
    """Of the command."""

    data_root: str = "data"
    blocks: int = 8
    sequences: int = 64
    tokens: int = 20480
    only: str = ""
    anew: bool = False

    def rows(self) -> list[str]:
        """The names of those to run.

        Raises:
            BitfrontError: there is no such row.
        """
        names = self.only.split(",") if self.only else list(ROWS)
        if unknown := [name for name in names if name not in ROWS]:
            raise BitfrontError(f"there is no row '{unknown[0]}'; only= takes some of {', '.join(ROWS)}")
        return names

    def settings(self, name: str) -> dict[str, Any]:
        """All that a row's numbers depend on."""
        sizes = {key: getattr(self, key) for key in ("blocks", "sequences", "tokens")}
        row, threads = ROWS[name], torch.get_num_threads()
        return {**sizes, "threads": threads, "options": row.options, "versions": versions(row.peer)}


def versions(peer: str) -> dict[str, str]:
    """What its numbers come of: packages, and of ours a digest of the code that quantizes."""
    common = {"torch": f"torch=={version('torch').partition('+')[0]}"}
    if peer != OURS:
        return {peer: REQUIREMENTS[peer], **common}
    code = hashlib.sha256()
    for path in sorted((Path(bitfront.__file__).parent / "quant").rglob("*.py")):
        code.update(path.read_bytes())
    return {OURS: code.hexdigest()[:10], **common}


class Bench:
    """The network, the tokens, and what the float network makes of them.

    Raises:
        BitfrontError: the network or a text is missing, or an option does not fit it.
    """

    def __init__(self, chosen: Options) -> None:
        root = Path(chosen.data_root)
        self.folder = root / "smollm2"
        texts = [root / "books/train.txt", root / "wikitext2/test.txt"]
        if not (self.folder / "tokenizer.json").is_file():
            raise BitfrontError(f"there is no '{self.folder}': python -m src.fetch smollm2 data_root={root}")
        if missing := [path for path in texts if not path.is_file()]:
            raise BitfrontError(f"there is no text in '{missing[0]}'; put it there, or give its folder as data_root=")
        self.network = hf.build(f"hf:{self.folder}", pretrained=True).eval()
        blocks = [*self.network.get_submodule("model.layers").children()]
        train, test = (self._tokens(path) for path in texts)
        sizes = {
            "blocks": (chosen.blocks, 1, len(blocks)),
            "sequences": (chosen.sequences, 1, len(train) // TIME),
            "tokens": (chosen.tokens, WINDOW, len(test)),
        }
        for key, (value, least, most) in sizes.items():
            if not least <= value <= most:
                raise BitfrontError(f"{key}={value} does not fit the network and the texts: {least}..{most}")
        starts = torch.randint(len(train) - TIME, (chosen.sequences,), generator=torch.Generator().manual_seed(0))
        self.calibration = torch.stack([train[start : start + TIME] for start in starts.tolist()])
        self.windows = test[: chosen.tokens // WINDOW * WINDOW].view(-1, WINDOW)
        self.blocks, self.last = len(blocks), blocks[chosen.blocks - 1]
        names = [name for name in linear(self.network) if int(name.split(".")[2]) < chosen.blocks]
        self.shapes = {f"{name}.weight": self.network.get_parameter(f"{name}.weight").shape for name in names}
        self.norms = {name: p.clone() for name, p in norms(self.network).items()}
        self.perplexity, self.outputs = self._run()

    def _tokens(self, path: Path) -> Tensor:
        rules = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        return torch.tensor(rules.encode(path.read_text()[:CHARACTERS], add_special_tokens=False).ids)

    @torch.no_grad()
    def _run(self) -> tuple[float, Tensor]:
        """Perplexity of the network as it is, and the last quantized block's output, ``[windows, time, width]``."""
        outputs: list[Tensor] = []
        hook = self.last.register_forward_hook(lambda *passed: outputs.append(passed[2]))
        losses = []
        for window in self.windows:
            logits = self.network(window[None], use_cache=False).logits[0, :-1]
            losses.append(nn.functional.cross_entropy(logits, window[1:]).item())
        hook.remove()
        return math.exp(sum(losses) / len(losses)), torch.cat(outputs)

    def measure(self, found: Mapping[str, Tensor], bits: int | None) -> dict[str, float]:
        """Perplexity with quantized weights, and norms if they are tuned, and the relative squared error of the last
        quantized block's output.

        Raises:
            BitfrontError: they are not of these layers, or a group has more values than so many bits, if that is given,
                can tell apart.
        """
        if not self.shapes.keys() <= found.keys() <= self.shapes.keys() | self.norms.keys():
            raise BitfrontError("it quantized other layers than it should")
        for name, shape in self.shapes.items():
            changes = found[name].reshape(-1, GROUP).sort(1).values.diff(dim=1) != 0
            if found[name].shape != shape or (bits and int(changes.sum(1).max()) >= 2**bits):
                raise BitfrontError(f"'{name}' is not of {bits} bits in groups of {GROUP}")
        for name, x in (self.norms | dict(found)).items():
            self.network.get_parameter(name).data.copy_(x)
        perplexity, outputs = self._run()
        error = (outputs - self.outputs).double().square().sum() / self.outputs.double().square().sum()
        return {"perplexity": perplexity, "error": error.item()}


def interpreter(peer: str) -> list[str]:
    """The words that start Python with a package in it; its environment is made where it is not there.

    Raises:
        BitfrontError: there is no uv, or it could not install the package.
    """
    if peer == OURS:
        return [sys.executable, "-P"]
    wanted, folder = list(versions(peer).values()), (ENVIRONMENTS / peer).absolute()
    python, made = str(folder / "bin" / "python"), folder / "made"
    if not made.is_file() or made.read_text().split() != wanted:
        if find_spec("uv") is None:
            raise BitfrontError("uv is missing, which makes environments: pip install uv")
        for words in (
            ["venv", "--clear", "--python", sys.executable, str(folder)],
            ["pip", "install", "--python", python, *wanted],
        ):
            done = subprocess.run([sys.executable, "-m", "uv", "-q", *words], capture_output=True, text=True)
            if done.returncode:
                why = " ".join(done.stderr.split())
                raise BitfrontError(f"could not install {wanted[0]}, which needs a network and room: {why[:300]}")
        made.write_text("\n".join(wanted))
    return [python, "-I"]


def run(bench: Bench, name: str, bits: int, blocks: int) -> dict[str, Any]:
    """A row's numbers, from a process of its own.

    Raises:
        BitfrontError: it could not be installed, or failed.
    """
    row, log = ROWS[name], ENVIRONMENTS / f"{name}_{bits}.log"
    python = interpreter(row.peer)
    with TemporaryDirectory() as scratch, log.open("w") as said:
        tokens, out = Path(scratch) / "tokens.safetensors", Path(scratch) / "out"
        out.mkdir()
        save_file({"tokens": bench.calibration}, tokens)
        job = Job(row.peer, row.options, bits, GROUP, str(bench.folder.absolute()), blocks, str(tokens), str(out))
        script = str(Path(__file__).with_name("peers_quantize.py"))
        nothing_kept = {"HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/compiled"}
        done = subprocess.run(
            [*python, script, json.dumps(asdict(job))],
            stdout=said, stderr=said, env=os.environ | nothing_kept,
        )  # fmt: skip
        if done.returncode:
            last = (log.read_text(errors="replace").strip().splitlines() or ["nothing said"])[-1]
            raise BitfrontError(f"ended with {done.returncode} ({last[:200]}); see {log}")
        each = None if row.options.get("widths") == "chosen" else bits
        return json.loads((out / "cost.json").read_text()) | bench.measure(load_file(out / "weights.safetensors"), each)


def page(found: Mapping[str, Any]) -> str:
    """The markdown."""
    sizes, where = found["settings"], found["environment"]
    lines = [
        "# Beside other packages",
        "",
        f"Made by `python -m benchmarks.peers{found['words']}`; numbers from [peers.json](peers.json).",
        "",
        f"SmolLM2-135M, whose float weights are 4-bit values to begin with: the {found['layers']} linear layers of its "
        f"first blocks ({sizes['blocks']} of {found['blocks']}) in groups of {GROUP}, all else float; calibrated on "
        f"{sizes['sequences']} × {TIME} tokens of novels, in batches of 2 (ours) and 8 (AutoRound); perplexity of the "
        f"first {sizes['tokens']:,} tokens of WikiText-2's test text in windows of {WINDOW:,}; float: "
        f"{found['float']:.2f}. Norms are as a method leaves them (ours tunes them with `J` and `moving`). The "
        "error is that of the last quantized block's output there, squared, relative to the "
        "float network's. Seconds and peak memory (all that the process holds) are of the call that quantizes, with "
        "what AutoRound compiles, and widths that are chosen, with `max_size`, for the size of its file; bits per "
        "weight are those of the quantized layers' tensors in the file, HQQ's of its layers' state; "
        "scales have the type that each package gives them.",
    ]
    for bits in sorted({row["bits"] for row in found["rows"]}):
        lines += [
            "",
            f"| {bits} bits | perplexity | error | CPU s | wall s | peak GiB | bits per weight |",
            "|---|---|---|---|---|---|---|",
        ]
        rows = {row["name"]: row for row in found["rows"] if row["bits"] == bits}
        lines += [line(ROWS[name].told, rows[name]) for name in ROWS if name in rows]
    peers = {ROWS[row["name"]].peer: row for row in found["rows"] if "perplexity" in row}
    told = [f"{REQUIREMENTS[p]} (transformers {peers[p]['transformers']})" for p in REQUIREMENTS if p in peers]
    packages = f"torch {where['packages']['torch']}, transformers {version('transformers')}"
    lines += ["", f"{where['machine']}, threads: {sizes['threads']}, {', '.join([packages, *told])}.", ""]
    return "\n".join(lines)


def line(told: str, row: Mapping[str, Any]) -> str:
    """A row of the table."""
    if "failed" in row:
        return f"| {told} | {row['failed'].replace('|', '/')} | | | | | |"
    return (
        f"| {told} | {row['perplexity']:,.2f} | {row['error']:.3g} | {row['cpu']:,.1f} | {row['wall']:,.1f} "
        f"| {row['peak'] / 2**30:.2f} | {row['bits_per_weight']:.3f} |"
    )


def main(words: list[str]) -> None:
    """Run what is not there yet, and write the results after each row."""
    chosen = options(Options, words)
    names = chosen.rows()
    OUT.mkdir(parents=True, exist_ok=True)
    ENVIRONMENTS.mkdir(exist_ok=True)
    place = OUT / "peers.json"
    known = json.loads(place.read_text())["rows"] if place.is_file() else []
    known = [row for row in known if row["name"] in ROWS]
    rows = {(r["name"], r["bits"]): r for r in known if r["settings"] == chosen.settings(r["name"])}
    bench = Bench(chosen)
    found: dict[str, Any] = {
        "words": "".join(f" {word}" for word in words if word.partition("=")[0] in ("blocks", "sequences", "tokens")),
        "settings": chosen.settings("rtn"),
        "environment": environment(),
        "blocks": bench.blocks,
        "layers": len(bench.shapes),
        "float": bench.perplexity,
    }
    for bits, name in product(BITS, names):
        if chosen.anew or "perplexity" not in rows.get((name, bits), {}):
            rows[name, bits] = {"name": name, "bits": bits, "settings": chosen.settings(name)}
            try:
                rows[name, bits] |= run(bench, name, bits, chosen.blocks)
            except BitfrontError as error:
                rows[name, bits]["failed"] = str(error)
            sys.stdout.write(line(f"{bits} bits, {name}", rows[name, bits]) + "\n")
            sys.stdout.flush()
        write(place, found | {"rows": list(rows.values())})


def write(place: Path, found: Mapping[str, Any]) -> None:
    """Both files."""
    write_atomically(place, json.dumps(found, indent=1) + "\n")
    place.with_suffix(".md").write_text(page(found))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(sys.argv[1:])
    except BitfrontError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on with this row")
