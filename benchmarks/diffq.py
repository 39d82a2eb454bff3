"""Ours against the official DiffQ package: packing, training step, evaluation, file, and equality of the weights.

    pip install --no-deps diffq==0.2.4         # needs a C compiler
    python -m benchmarks.diffq                 # writes results/benchmarks/diffq.json and diffq.md
    python -m benchmarks.diffq device=cuda     # steps and evaluations on a GPU, diffq_cuda.json and diffq_cuda.md

Both sides run in turn in one process, and what counts is the ratio of the medians.
"""

from __future__ import annotations

import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from bitfront.cells import provenance
from bitfront.quant.methods.diffq import DiffQ
from bitfront.quant.model import QuantizedModel
from bitfront.quant.storage.packed import pack, unpack

OUT = Path("results/benchmarks")
CODES = 8_000_000
deit = partial(timm.create_model, "deit_base_patch16_224")


def in_turn(sides: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each side, run one after the other in every repeat, after one warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            began = time.perf_counter()
            side()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def packing(official: Any) -> dict[str, dict[str, float]]:
    """Packing and unpacking of random codes, by width."""
    rows = {}
    for width in (2, 3, 4, 8, 12):
        codes = np.random.default_rng(0).integers(0, 2**width, CODES).astype(np.uint8 if width <= 8 else np.uint16)
        tensor = torch.from_numpy(codes.astype(np.int16))
        planes, blocks = pack(codes, width), official.bitpack.pack(tensor, width)
        rows[f"pack {width} bits"] = in_turn(
            {"ours": partial(pack, codes, width), "official": partial(official.bitpack.pack, tensor, width)}, 5
        )
        rows[f"unpack {width} bits"] = in_turn(
            {
                "ours": partial(unpack, planes, width, CODES),
                "official": partial(official.bitpack.unpack, blocks, CODES),
            },
            5,
        )
    return rows


def networks(device: str) -> dict[str, tuple[Callable[[], nn.Module], Tensor]]:
    """Networks of a size that a training step takes a fraction of a second."""
    vit = partial(VisionTransformer, img_size=32, patch_size=8, embed_dim=192, depth=6, num_heads=6, num_classes=10)
    small: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
        "ViT 192 x 6": (vit, torch.randn(64, 3, 32, 32)),
        "ResNet-18": (partial(torchvision.models.resnet18, num_classes=10), torch.randn(32, 3, 64, 64)),
    }
    return small if device == "cpu" else small | {"DeiT-B": (deit, torch.randn(64, 3, 224, 224))}


def both(make: Callable[[], nn.Module], official: Any, device: str = "cpu") -> tuple[QuantizedModel, nn.Module, Any]:
    """The same network under our DiffQ and under the official one, with equal weights and equal random widths."""
    torch.manual_seed(0)
    network = make().to(device)
    theirs = make().to(device)
    theirs.load_state_dict(network.state_dict())
    model = DiffQ(group_size=8).attach(network).to(device)
    quantizer = official.DiffQuantizer(theirs, group_size=8)
    quantizer.setup_optimizer(torch.optim.Adam([{"params": []}]))
    for mine, qparam in zip(model.quantizers.parameters(), quantizer._qparams, strict=True):
        with torch.no_grad():
            mine.normal_(-1.0, 1.0)
            qparam.logit.copy_(mine.view_as(qparam.logit))
    return model, theirs, quantizer


def training(official: Any, device: str) -> dict[str, dict[str, float]]:
    """One forward and backward with penalty, and one evaluation forward."""
    rows = {}
    for name, (make, images) in networks(device).items():
        x = images.to(device)
        model, theirs, quantizer = both(make, official, device)
        sides: dict[str, tuple[nn.Module, Callable[[], Any]]] = {
            "ours": (model, model.megabytes),
            "official": (theirs, quantizer.model_size),
            "float": (make().to(device), lambda: 0.0),
        }
        rows[f"training step, {name}"] = in_turn({k: partial(step, *side, x) for k, side in sides.items()}, 15)
        with torch.no_grad():
            evaluations = {k: partial(net.eval(), x[:4]) for k, (net, _) in sides.items()}
            rows[f"evaluation of 4 images, {name}"] = in_turn(evaluations, 15)
    return rows


def step(net: nn.Module, size: Callable[[], Any], x: Tensor) -> None:
    """Forward and backward of a loss with a size penalty."""
    (net.train()(x).square().mean() + 1e-3 * size()).backward()


def files(official: Any) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Writing DeiT-B with mixed widths; bytes of both, and how far the evaluated weights differ."""
    model, theirs, quantizer = both(deit, official)
    model.eval(), theirs.eval()

    def official_file() -> bytes:
        buffer = io.BytesIO()
        torch.save(quantizer.get_quantized_state(), buffer)
        return buffer.getvalue()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        seconds = in_turn({"ours": lambda: model.save(path, {}), "official": official_file}, 3)
        facts = {
            "bytes, ours": float(path.stat().st_size),
            "bytes, official": float(len(official_file())),
            "bytes by the paper's rule": quantizer.true_model_size() * 2**20,
        }
    weights = model.weights()
    with torch.no_grad(), quantizer.enter_quantize():
        theirs_now = dict(theirs.named_parameters())
        ranges = {name: (w.max() - w.min()).clamp_min(1e-12) for name, w in weights.items()}
        differ = sum(int(((w - theirs_now[n]).abs() > 1e-5 * ranges[n]).sum()) for n, w in weights.items())
        facts["share of weights on another level (ties within float32 rounding)"] = differ / sum(
            w.numel() for w in weights.values()
        )
    return {"write DeiT-B": seconds}, facts


def main() -> None:
    """Run everything, or what a GPU takes part in on one, and write the results."""
    device = {(): "cpu", ("device=cuda",): "cuda"}.get(tuple(sys.argv[1:]))
    if device is None or (device == "cuda" and not torch.cuda.is_available()):
        sys.exit("error: the one option is device=cuda, which needs a GPU")
    try:
        import diffq as official
        import diffq.bitpack
    except ImportError:
        sys.exit("error: the official package is missing: pip install --no-deps diffq==0.2.4 (it needs a C compiler)")
    OUT.mkdir(parents=True, exist_ok=True)
    rows, facts = training(official, device), dict[str, float]()
    if device == "cpu":
        written, facts = files(official)
        rows = packing(official) | rows | written
    environment = provenance.environment()
    lines = ["| what | ours, ms | official, ms | official / ours | ours / float |", "|---|---|---|---|---|"]
    for what, times in rows.items():
        share = f"{times['ours'] / times['float']:.2f}" if "float" in times else ""
        milliseconds = f"{1e3 * times['ours']:.1f} | {1e3 * times['official']:.1f}"
        lines.append(f"| {what} | {milliseconds} | {times['official'] / times['ours']:.2f} | {share} |")
    if facts:
        lines += ["", "| DeiT-B, mixed widths | |", "|---|---|"]
        lines += [f"| {k} | {v:,.0f} |" if v > 1 else f"| {k} | {v:.2g} |" for k, v in facts.items()]
    place, name = environment["machine"], "diffq"
    if device == "cuda":
        place, name = torch.cuda.get_device_name(), "diffq_cuda"
    words = " ".join(["python -m benchmarks.diffq", *sys.argv[1:]])
    lines += ["", f"`{words}`, {place}, torch {torch.__version__}."]
    (OUT / f"{name}.md").write_text("\n".join(lines) + "\n")
    (OUT / f"{name}.json").write_text(
        json.dumps({"rows": rows, "facts": facts, "environment": environment, "device": place}, indent=1) + "\n"
    )
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
