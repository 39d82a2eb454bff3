"""Where a language model loses its bits: on tokens that its training text hardly has, or on the others.

    python -m benchmarks.rare_tokens runs/lm_wikitext2/{float,lsq}/*      # writes results/benchmarks/rare_tokens.*

A test text of another kind has characters that the network never saw, on which nothing in training has a hold.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from bitfront.cells.compose import Config
from bitfront.cells.flow import build_task
from bitfront.cells.provenance import environment
from bitfront.cells.runs import Run
from bitfront.errors import BitfrontError
from bitfront.quant.storage.artifact import Artifact
from bitfront.tasks.language import Language

OUT = Path("results/benchmarks")
RARE = 10  # a token that the training text has less often


@torch.no_grad()
def split_bits(task: Language, artifact: Path) -> dict[str, float]:
    """Bits per byte of the test text, and the parts of them that rare tokens and all others have."""
    counts = torch.bincount(task.corpus.streams["train"][1:], minlength=task.vocabulary)
    network = task.model()
    Artifact.load(artifact).load_into(network)
    network.eval()
    parts = []
    for windows, new in task.loader("test"):
        parts.append((network(windows[:, :-1], windows[:, 1:])[new], windows[:, 1:][new]))
    losses, tokens = (torch.cat(part) for part in zip(*parts, strict=True))
    bits = losses.double() / (math.log(2) * task.corpus.sizes[tokens].sum().item())
    rare = counts[tokens] < RARE
    return {
        "bpb": bits.sum().item(),
        "rare": bits[rare].sum().item(),
        "others": bits[~rare].sum().item(),
        "share": rare.double().mean().item(),
    }


def measured(folder: Path) -> dict[str, Any]:
    """A finished run's row.

    Raises:
        BitfrontError: it is none of a language model.
    """
    run = Run(folder)
    record = run.finished()
    if record is None:
        raise BitfrontError(f"'{folder}' is not the directory of a finished run")
    task = build_task(Config(record.task, record.method, record.config, record.setting))
    if not isinstance(task, Language):
        raise BitfrontError(f"'{folder}' is a run of task={record.task}, which predicts no tokens")
    about = {name: getattr(record, name) for name in ("id", "method", "setting", "seed")}
    return about | split_bits(task, run.artifact)


def main() -> None:
    """Measure the runs of the command line, and write the results."""
    try:
        rows = [measured(Path(word)) for word in sys.argv[1:]]
    except BitfrontError as error:
        sys.exit(f"error: {error}")
    if not rows:
        sys.exit("error: give directories of runs, as runs/lm_wikitext2/float/<id>")
    lines = ["| run | method | setting | seed | test bpb | rare tokens | others |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        numbers = " | ".join(f"{row[name]:.3f}" for name in ("bpb", "rare", "others"))
        lines.append(f"| {row['id']} | {row['method']} | {row['setting']} | {row['seed']} | {numbers} |")
    share = f"{100 * rows[0]['share']:.1f} % of the tokens"
    lines += [
        "",
        f"Rare: less than {RARE} times in the training text, {share}. `python -m benchmarks.rare_tokens <runs>`.",
    ]
    (OUT / "rare_tokens.md").write_text("\n".join(lines) + "\n")
    result = {"rows": rows, "environment": environment()}
    (OUT / "rare_tokens.json").write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
