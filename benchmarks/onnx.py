"""Files and times of networks in ONNX, on a CPU, against the same network in ONNX with float weights.

    python -m benchmarks.onnx              # writes results/benchmarks/onnx.md and onnx.json

Of the laptop tasks with fresh weights, on which neither sizes nor times depend, and of linear layers of 2,048
columns. Times are of one sample, the best of many in turn with the float network's, relative to that.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime
import torch
from torch import nn

from bitfront.cells import compose, flow
from bitfront.cells.provenance import environment
from bitfront.exports.onnx.examples import SAMPLES, Example
from bitfront.exports.onnx.network import Exported, export
from bitfront.library import call, prepare, quantize
from bitfront.quant.methods.diffq import DiffQ
from bitfront.quant.methods.gptq import GPTQ
from bitfront.quant.methods.rtn import RTN
from bitfront.quant.storage.artifact import Artifact

OUT = Path("results/benchmarks")
TASKS = {"vit": [], "resnet": [], "lm": ["task.data=generated"], "asr": ["task.data=tones"]}
WIDTHS = range(2, 9)
PRODUCTS = ("rtn 2", "rtn 4", "rtn 8")  # of which linear layers are computed with the codes, too
REPEATS = 30
LEVELS: dict[str, int | None] = {"weights": None, "matmul_nbits": 4, "matmul_nbits exact": 0}
Network = tuple[nn.Module, list[Any], Callable[[nn.Module, Any], Any]]


def laptop(name: str, words: Sequence[str]) -> Network:
    """A task's network, batches and how it is called."""
    task = flow.build_task(compose.load([f"task={name}", "quant=float", *words]))
    torch.manual_seed(0)
    network = task.model().eval()
    with torch.no_grad():
        for p in network.parameters():
            if not p.any():  # as a last layer's, of which nothing would come
                p.normal_(0, 0.1)
    return network, task.calibration(2 * SAMPLES, SAMPLES), task.use


def linears() -> Network:
    """Layers as wide as a large transformer's."""
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.LayerNorm(2048), nn.Linear(2048, 2048), nn.GELU()) for _ in range(3)]
    return nn.Sequential(*parts).eval(), [torch.randn(SAMPLES, 2048)], call


def artifacts(network: nn.Module, batches: list[Any], run: Callable[..., Any]) -> dict[str, Artifact]:
    """The network in float, and quantized."""
    made = {"float": Artifact.of(network, {}, {})}
    for bits in WIDTHS:
        made[f"rtn {bits}"] = quantize(network, RTN(bits=bits)).artifact()
    grouped = GPTQ(bits=2, group_size=64, scale_bits=6)
    made["gptq 2, groups of 64"] = quantize(network, grouped, batches, forward=run).artifact()
    mixed = prepare(network, DiffQ()).eval()
    with torch.no_grad():
        for p in mixed.quantizers.parameters():
            p.normal_(-1, 1)
    return made | {"diffq, mixed": mixed.artifact()}


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def relative(path: Path, exact: Path, example: Example) -> float:
    """Time of one sample in units of the float network's."""
    best = {path: float("inf"), exact: float("inf")}
    sessions = {p: session(p) for p in best}
    for _ in range(REPEATS):
        for p, s in sessions.items():
            fed = {x.name: t.numpy() for x, t in zip(s.get_inputs(), example.first(1).tensors, strict=True)}
            began = time.perf_counter()
            s.run(None, fed)
            best[p] = min(best[p], time.perf_counter() - began)
    return best[path] / best[exact]


def measure(name: str, given: Network, folder: Path) -> list[dict[str, Any]]:
    """A row for each file."""
    network, batches, run = given
    examples = Example.some(network, run, batches)
    rows: list[dict[str, Any]] = []
    exact = folder / f"{name}.onnx"
    for method, artifact in artifacts(network, batches, run).items():
        for kind, level in LEVELS.items():
            if method not in PRODUCTS and level is not None:
                continue
            path = exact if method == "float" else folder / "packed.onnx"
            told: Exported = export(network, artifact, examples, path, level)
            if level is not None and not told.products:
                continue
            row = {"network": name, "method": method, "as": kind, "ours": len(artifact.to_bytes()), "onnx": told.size}
            row |= {"difference": told.difference, "time": relative(path, exact, examples[0])}
            rows.append(row)
            sys.stderr.write(f"{row}\n")
    return rows


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """In Markdown."""
    lines = ["| network | weights | as | our file, bytes | ONNX, bytes | largest difference | time, 1 sample |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        sizes = f"{row['ours']:,} | {row['onnx']:,} | {row['difference']:.1e} | {row['time']:.2f}"
        lines.append(f"| {row['network']} | {row['method']} | {row['as']} | {sizes} |")
    return lines


def main() -> None:
    """Measure, and write the results."""
    chosen = sys.argv[1:] or [*TASKS, "linears"]
    with TemporaryDirectory() as name:
        rows = [
            row
            for network in chosen
            for row in measure(network, laptop(network, TASKS[network]) if network in TASKS else linears(), Path(name))
        ]
    made_with = environment()
    lines = [
        *table(rows),
        "",
        "The largest difference is of the outputs in onnxruntime from those of the decoded network, over the largest "
        "output; the time of one sample is relative to that of the float ONNX in the same run. `weights` are decoded "
        "when the file is loaded; `matmul_nbits` keeps them packed (with inputs of 8 bits, or exact).",
        "",
        f"`python -m benchmarks.onnx`, {made_with['machine']}, onnxruntime {onnxruntime.__version__}.",
    ]
    (OUT / "onnx.md").write_text("\n".join(lines) + "\n")
    (OUT / "onnx.json").write_text(json.dumps({"rows": rows, "environment": made_with}, indent=1) + "\n")


if __name__ == "__main__":
    main()
