"""Our layer solver against the official decoupleQ code, on layers as in trained transformers.

    python -m benchmarks.solver             # writes results/benchmarks/solver.json and solver.md

The loss is tr((W - Q) H (W - Q)ᵀ) / tr(W H Wᵀ), undamped, in float64, and given relative to what the official solver
reaches with its full procedure. The official numbers were measured with github.com/bytedance/decoupleQ, HEAD 252939b,
unmodified, on a CPU, with a float zero, act-order, damping 0.01; it took about 800-1,000 products per row and
2,000-2,600 in groups of 64. Time is in units of one float32 product ``W @ H`` of the case, measured in the same run.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfront.cells import provenance
from bitfront.quant.layers.inputs import Moments
from bitfront.quant.methods.decoupleq import DecoupleQ
from bitfront.quant.methods.gptq import GPTQ

OUT = Path("results/benchmarks")
SAMPLES = 3072
# (rows, columns, seed, bits, group size): relative loss of the official start by GPTQ, and of its full procedure.
OFFICIAL: dict[tuple[int, int, int, int, int], tuple[float, float]] = {
    (256, 512, 1, 2, -1): (0.015843, 0.006130),
    (256, 512, 2, 2, 64): (0.007037, 0.004937),
    (256, 512, 3, 3, -1): (0.0024457, 0.0014107),
    (384, 768, 4, 2, -1): (0.017979, 0.005948),
    (384, 768, 5, 4, 128): (0.00035178, 0.00030555),
    (768, 768, 6, 2, 64): (0.0064154, 0.0042414),
}
SIDES: dict[str, GPTQ] = {
    "gptq": GPTQ(),
    "decoupleq level=2 N=4": DecoupleQ(level=2, N=4),
    "decoupleq": DecoupleQ(),
    "decoupleq damping=0.003": DecoupleQ(damping=0.003),
    "decoupleq damping=0": DecoupleQ(damping=0.0),
}


def instance(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight ``[rows, columns]`` with heavy tails and ``H`` of correlated inputs, a few of them outliers; float32."""
    g = torch.Generator().manual_seed(seed)
    rank = columns // 3
    basis = torch.randn(columns, rank, generator=g) * torch.linspace(1.5, 0.05, rank)
    x = torch.randn(SAMPLES, rank, generator=g) @ basis.T + 0.3 * torch.randn(SAMPLES, columns, generator=g)
    gain = torch.exp(0.6 * torch.randn(columns, generator=g))
    gain[torch.randperm(columns, generator=g)[: columns // 64]] *= 8
    x = x * gain
    chi = torch.stack([torch.randn(rows, columns, generator=g) ** 2 for _ in range(6)]).sum(0) / 6
    w = torch.randn(rows, columns, generator=g) / chi.sqrt() / columns**0.5
    return w, (x.T.double() @ x.double() / SAMPLES).float()


def relative_loss(w: Tensor, q: Tensor, H: Tensor) -> float:
    """tr((W - Q) H (W - Q)ᵀ) / tr(W H Wᵀ) in float64."""
    error, w, H = (w - q).double(), w.double(), H.double()
    return (((error @ H) * error).sum() / ((w @ H) * w).sum()).item()


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median, after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def measure(case: tuple[int, int, int, int, int]) -> dict[str, dict[str, float]]:
    """Loss relative to the official procedure, and products, of every side on one case."""
    rows, columns, seed, bits, group_size = case
    w, H = instance(rows, columns, seed)
    found = {}
    for name, method in SIDES.items():
        side = replace(method, bits=bits, group_size=group_size)
        # A fresh Moments each time, so that the factorizations count.
        run = lambda side=side: side.solve(w, Moments(H.double()[None], SAMPLES))  # noqa: E731
        spent = seconds(run, 5)
        product = seconds(lambda: w @ H, 50)
        loss = relative_loss(w, run()[0].decode(), H)
        found[name] = {"loss": loss, "ratio": loss / OFFICIAL[case][1], "products": spent / product}
    return found


def mean(ratios: list[float]) -> float:
    """Geometric."""
    return math.exp(statistics.fmean(map(math.log, ratios)))


def main() -> None:
    """Run everything and write the results."""
    OUT.mkdir(parents=True, exist_ok=True)
    rows = {case: measure(case) for case in OFFICIAL}
    lines = [
        "| rows x columns | bits | group | official GPTQ |" + "".join(f" {name} |" for name in SIDES),
        "|---|---|---|---|" + "---|" * len(SIDES),
    ]
    for (r, c, _, bits, size), (gptq, full) in OFFICIAL.items():
        found = rows[(r, c, _, bits, size)].values()
        group = "row" if size < 0 else str(size)
        lines.append(
            f"| {r} x {c} | {bits} | {group} | {gptq / full:.2f} |"
            + "".join(f" {side['ratio']:.3f} ({side['products']:.0f}) |" for side in found)
        )
    means = [mean([row[name]["ratio"] for row in rows.values()]) for name in SIDES]
    official = mean([gptq / full for gptq, full in OFFICIAL.values()])
    lines.append(f"| geometric mean | | | {official:.2f} |" + "".join(f" {m:.3f} |" for m in means))
    environment = provenance.environment()
    lines += [
        "",
        "Loss relative to the official full procedure (1 = the same, lower is better); in parentheses the time in",
        "products `W @ H`. These losses are undamped; the methods minimise the damped one, which is the floor here.",
        "",
        f"`python -m benchmarks.solver`, {environment['machine']}, torch {torch.__version__}.",
    ]
    (OUT / "solver.md").write_text("\n".join(lines) + "\n")
    flat = [
        dict(zip(("rows", "columns", "seed", "bits", "group_size"), case, strict=True)) | rows[case] for case in rows
    ]
    (OUT / "solver.json").write_text(json.dumps({"cases": flat, "environment": environment}, indent=1) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
