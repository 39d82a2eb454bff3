"""A row of ``benchmarks.peers``: one package quantizes a network, in a process and an environment of its own.

    python -I benchmarks/peers_quantize.py '{"peer": "hqq", "bits": 2, ...}'      # the keys are those of ``Job``

Nothing of ours is imported but for our own rows.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

T = TypeVar("T")
Made = tuple[dict[str, float], dict[str, Tensor], int]  # what it cost, weights and norms by name, bytes of weights


@dataclass(frozen=True)
class Job:
    """What is to be done.

    Attributes:
        peer: a key of ``PEERS``.
        options: of its own.
        bits, group: of a weight; consecutive weights that share a grid.
        network: folder, as transformers saves it with its tokenizer.
        blocks: how many stay of it, all of which are quantized.
        tokens: safetensors file with ``tokens``, ``[windows, time]``, to calibrate on.
        out: folder; gets ``weights.safetensors``, the quantized weights as float32, with the norms where these are
            tuned, and ``cost.json``: what ``measured`` tells, ``bits_per_weight`` in the file, and the version of
            transformers.
    """

    peer: str
    options: dict[str, Any]
    bits: int
    group: int
    network: str
    blocks: int
    tokens: str
    out: str


def cpu_seconds() -> float:
    """Of this process and of all that it has started, ended or not."""
    parents, ticks = dict[int, int](), dict[int, int]()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            fields = stat.read_text().rpartition(")")[2].split()
            parents[int(stat.parent.name)], ticks[int(stat.parent.name)] = int(fields[1]), sum(map(int, fields[11:15]))
    mine = {os.getpid()}
    while more := {process for process, parent in parents.items() if parent in mine} - mine:
        mine |= more
    return sum(ticks[process] for process in mine) / os.sysconf("SC_CLK_TCK")


def measured(call: Callable[[], T]) -> tuple[T, dict[str, float]]:
    """Its result; seconds of all processors (``cpu``) and of the clock (``wall``), most bytes in memory (``peak``)."""
    Path("/proc/self/clear_refs").write_text("5")
    cpu, began = cpu_seconds(), time.perf_counter()
    result = call()
    wall, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    told = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()
    return result, {"cpu": cpu, "wall": wall, "peak": 1024 * int(told[0])}


def linear(network: nn.Module) -> dict[str, nn.Linear]:
    """The layers to quantize, by name."""
    return {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear) and n.startswith("model.layers.")}


def norms(network: nn.Module) -> dict[str, Tensor]:
    """The scales of the blocks' norms."""
    blocks = {n: p for n, p in network.named_parameters() if n.startswith("model.layers.")}
    return {name: p.detach().float() for name, p in blocks.items() if name.endswith("norm.weight")}


def weights(network: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """Copies of those of some layers."""
    state = network.state_dict()
    return {f"{name}.weight": state[f"{name}.weight"].detach().float().clone() for name in names}


def stored(folder: Path, names: Collection[str]) -> int:
    """Bytes that the tensors of some layers have in the files of a folder."""
    total = 0
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(file.get_tensor(key).nbytes for key in file.keys() if key.rpartition(".")[0] in names)
    return total


def hqq(network: nn.Module, tokens: Tensor, job: Job) -> Made:
    """Half-quadratic quantization, which needs no data; stored as its layers' state is."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    def quantized() -> dict[str, Any]:
        config = BaseQuantizeConfig(nbits=job.bits, group_size=job.group, axis=1)
        return {
            name: HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu")
            for name, layer in linear(network).items()
        }

    layers, cost = measured(quantized)
    found = {f"{name}.weight": layer.dequantize().detach().clone() for name, layer in layers.items()}
    states = [value for layer in layers.values() for value in layer.state_dict().values()]
    return cost, found, sum(value.nbytes for value in states if isinstance(value, Tensor))


def llmcompressor(network: nn.Module, tokens: Tensor, job: Job) -> Made:
    """Its GPTQ with static act-order; stored pack-quantized."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    names, out = list(linear(network)), Path(job.out) / "packed"
    grid = {"num_bits": job.bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": job.group}
    group = {"targets": ["Linear"], "weights": {**grid, "actorder": "static"}}
    recipe = GPTQModifier(config_groups={"group": group}, ignore=["lm_head"], dampening_frac=0.01)
    _, cost = measured(
        lambda: oneshot(
            model=network,
            dataset=Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": (0 * tokens + 1).tolist()}),
            recipe=recipe,
            tokenizer=AutoTokenizer.from_pretrained(job.network),
            max_seq_length=tokens.shape[1],
            num_calibration_samples=len(tokens),
            shuffle_calibration_samples=False,
        )
    )
    found = weights(network, names)
    network.save_pretrained(out, save_compressed=True)  # type: ignore[operator]
    return cost, found, stored(out, names)


def autoround(network: nn.Module, tokens: Tensor, job: Job) -> Made:
    """Rounding learned by signed gradient descent, ``iters`` steps for a block; stored in its own format."""
    from auto_round import AutoRound

    names, out = list(linear(network)), Path(job.out) / "packed"
    method = AutoRound(
        network,
        AutoTokenizer.from_pretrained(job.network),
        bits=job.bits,
        group_size=job.group,
        sym=False,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        batch_size=min(8, len(tokens)),
        dataset=[{"input_ids": window[None]} for window in tokens],
        device_map="cpu",
        **job.options,
    )
    (made, _), cost = measured(method.quantize)
    found = weights(made, names)
    method.save_quantized(str(out), format="auto_round")
    return cost, found, stored(out, names)


def bitfront(network: nn.Module, tokens: Tensor, job: Job) -> Made:
    """A ``method`` of ours; stored as its packed tensors are. Where its ``widths`` are "chosen", the file has the size
    that it has with AutoRound's weights."""
    import bitfront as ours

    options = {**job.options, "bits": job.bits, "group_size": job.group, "samples": len(tokens), "batch_size": 2}
    if options.pop("widths", "one") == "chosen":
        numbers = sum(layer.weight.numel() for layer in linear(network).values())
        rest = sum(p.numel() for p in network.parameters()) - numbers
        each = options.pop("bits") + (16 + job.bits) / job.group  # float16 scales, whole zeros
        options["max_size"] = (4 * rest + numbers * each / 8) / 2**20
    method = getattr(ours, options.pop("method"))(**options, exclude=["*embed_tokens*", "*norm*"])
    model, cost = measured(lambda: ours.quantize(network, method, tokens, inplace=True))
    packed = model.encode()
    found = {name: p.decode() for name, p in packed.items()}
    return cost, found | norms(network), sum(p.nbytes for p in packed.values())


PEERS: dict[str, Callable[[nn.Module, Tensor, Job], Made]] = {
    "hqq": hqq,
    "llmcompressor": llmcompressor,
    "autoround": autoround,
    "bitfront": bitfront,
}


def main(job: Job) -> None:
    """Do it."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_pretrained(job.network, dtype=torch.float32).eval()
    network.config.use_cache = False
    network.model.layers = network.model.layers[: job.blocks]
    network.config.num_hidden_layers = job.blocks
    numbers = sum(layer.weight.numel() for layer in linear(network).values())
    cost, found, size = PEERS[job.peer](network, load_file(job.tokens)["tokens"], job)
    save_file({name: w.contiguous() for name, w in found.items()}, Path(job.out) / "weights.safetensors")
    told = {**cost, "bits_per_weight": 8 * size / numbers}
    (Path(job.out) / "cost.json").write_text(json.dumps({**told, "transformers": transformers.__version__}))


if __name__ == "__main__":
    main(Job(**json.loads(sys.argv[1])))
