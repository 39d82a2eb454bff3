"""Memory of post-training quantization: what it is made of, and what a random Llama of 1B shape takes.

    python -m benchmarks.memory            # writes results/benchmarks/memory.md and memory.json; an hour on two cores
    python -m benchmarks.memory layers=2   # less of it

The network is quantized through the library's one call from a folder of its own, as a user's would be: loaded in
bfloat16, GPTQ with 2 bits in groups of 64 on the linear layers of its blocks, saved, and loaded again. First with
offload=disk, in a process that is killed after some blocks and started anew. Anonymous memory counts: files that are
mapped are the system's to keep or drop.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

import bitfront
from bitfront.cells.provenance import environment

OUT = Path("results/benchmarks")
SHAPE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}  # Llama 3.2 1B, of 16 layers
SHAPES = {"1B": (2048, 8192, 16, 1.24e9), "7B": (4096, 11008, 32, 6.74e9), "70B": (8192, 28672, 80, 69.0e9)}
SAMPLES, TOKENS = 4, 512  # that it is calibrated on here
USUAL = 128 * 2048  # tokens of the papers
KILLED_AFTER = 3  # blocks
SQUARES, ROWS = 7, 5  # of a layer that is solved: matrices of float64 of its inputs, and of float32 of its weight
GIB = 1 << 30


def held() -> dict[str, int]:
    """Bytes of this process by kind, as Linux counts them."""
    told = dict(re.findall(r"^(Rss\w+):\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE))
    return {kind: 1024 * int(told[f"Rss{kind}"]) for kind in ("Anon", "File", "Shmem")}


@contextmanager
def watched(stage: str, found: dict[str, Any]) -> Iterator[None]:
    """Seconds, and the most anonymous memory, and GPU memory, of what is within."""
    most, done = [held()["Anon"]], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            most[0] = max(most[0], held()["Anon"])

    thread, began = threading.Thread(target=watch), time.perf_counter()
    thread.start()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        yield
    finally:
        done.set()
        thread.join()
        found[stage] = {"seconds": time.perf_counter() - began, "anonymous": most[0]}
        if torch.cuda.is_available():
            found[stage]["gpu"] = torch.cuda.max_memory_allocated()


def made(folder: Path, layers: int) -> int:
    """Write the network; its number of parameters."""
    torch.manual_seed(0)
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=layers, **SHAPE)).bfloat16()
    network.save_pretrained(folder)
    return sum(p.numel() for p in network.parameters())


def quantized(folder: Path, offload: str) -> None:
    """Quantize, save and load; print what it took."""
    found: dict[str, Any] = {"start": {"anonymous": held()["Anon"]}}
    transformers.logging.disable_progress_bar()
    with watched("load", found):
        network = transformers.LlamaForCausalLM.from_pretrained(folder, dtype="auto")
    tokens = torch.randint(SHAPE["vocab_size"], (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))
    method = bitfront.GPTQ(bits=2, group_size=64, batch_size=1, samples=SAMPLES, exclude=["*embed_tokens*", "*norm*"])
    with watched("quantize", found):
        model = bitfront.quantize(
            network, method, tokens, offload=offload, inplace=True, states=folder / f"states{offload}"
        )
    with watched("save", found):
        found["file"] = model.save(folder / "quantized.safetensors")
    found["blocks"] = [block["seconds"] for block in model.log["blocks"]]
    del model
    with watched("reload", found):
        bitfront.load(folder / "quantized.safetensors", into=network)
    sys.stdout.write(json.dumps(found) + "\n")


def run(folder: Path, offload: str, killed_after: int = 0) -> dict[str, Any]:
    """The same in a process of its own, killed when so many blocks are kept."""
    command = [sys.executable, "-m", "benchmarks.memory", f"folder={folder}", f"offload={offload}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while killed_after and len([*folder.glob(f"states{offload}/*/*")]) < killed_after:
        if process.poll() is not None:
            raise RuntimeError("it ended before it could be killed")
        time.sleep(0.5)
    if killed_after:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return {}
    said = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(f"it ended with {process.returncode}")
    return dict(json.loads(said.splitlines()[-1]))


def model(shape: str) -> dict[str, float]:
    """Bytes by the formula of the page, for a network in 16 bits and the papers' calibration."""
    width, inner, layers, parameters = SHAPES[shape]
    activations = 2 * 2 * USUAL * width
    return {
        "weights": 2 * parameters,
        "codes": parameters,
        "activations": activations,
        "file at 2 bits, groups of 64": parameters * 2.5 / 8,
        "device": 2 * parameters / layers + SQUARES * 8 * inner**2 + ROWS * 4 * width * inner,
    }


def page(found: dict[str, Any]) -> str:
    """The markdown."""
    lines = [
        "# Memory of post-training quantization",
        "",
        "Made by `python -m benchmarks.memory`; numbers from [memory.json](memory.json).",
        "",
        "With `offload=cpu`, host memory holds weights (2 bytes each in 16 bits), codes (1 byte each), and the inputs",
        "and outputs of the block at work on all samples (twice that with `J>0`, which needs the float network's);",
        "with `offload=disk` all of these are files, which the system keeps in memory as far as there is room. On the",
        "device are the weights of one block, what one batch makes of them, and, for a layer of `c` inputs and `r`",
        f"rows, some {SQUARES} matrices of `8 c²` bytes and {ROWS} of `4 r c`. Without `offload=`, all the network.",
        "",
        "| network, 16 bits, 128 × 2048 tokens | weights | codes | activations, J=0 | file, all at 2 bits | device |",
        "|---|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        told = [f"{value / GIB:.1f} GiB" for value in model(shape).values()]
        lines.append(f"| Llama {shape} | {' | '.join(told)} |")
    where = found["environment"]["machine"]
    lines += [
        "",
        f"Measured on {where}: Llama of 1B shape with {found['layers']} layers ({found['parameters']:,} parameters, "
        f"{2 * found['parameters'] / GIB:.2f} GiB), {SAMPLES} × {TOKENS} tokens, GPTQ with 2 bits in groups of 64; "
        "anonymous memory above that of the interpreter with its packages, most at any time.",
        "",
        "| | load | quantize | save | load the file | minutes | seconds of a block |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, told in found["runs"].items():
        base = told["start"]["anonymous"]
        most = [f"{(told[s]['anonymous'] - base) / GIB:.2f} GiB" for s in ("load", "quantize", "save", "reload")]
        blocks = sorted(told["blocks"])
        minutes = told["quantize"]["seconds"] / 60
        lines.append(f"| {name} | {' | '.join(most)} | {minutes:.1f} | {blocks[len(blocks) // 2]:.0f} |")
    files = {told["file"] for told in found["runs"].values()}
    sizes = " and ".join(f"{size:,}" for size in sorted(files))
    lines += ["", f"The file has {sizes} bytes; in it, the embedding has 16 bits, as in the papers' protocol.", ""]
    return "\n".join(lines)


def main(words: list[str]) -> None:
    """As above; with ``folder=`` one run of it."""
    told = dict(word.split("=", 1) for word in words)
    if "folder" in told:
        quantized(Path(told["folder"]), told["offload"])
        return
    layers = int(told.get("layers", 16))
    with TemporaryDirectory(dir=told.get("scratch")) as scratch:
        folder = Path(scratch)
        found: dict[str, Any] = {"environment": environment(), "layers": layers, "parameters": made(folder, layers)}
        run(folder, "disk", KILLED_AFTER)
        found["runs"] = {f"offload=disk, after a kill at block {KILLED_AFTER}": run(folder, "disk")}
        found["runs"]["without"] = run(folder, "")
    (OUT / "memory.json").write_text(json.dumps(found, indent=1) + "\n")
    (OUT / "memory.md").write_text(page(found))


if __name__ == "__main__":
    main(sys.argv[1:])
