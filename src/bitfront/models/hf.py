"""Networks as transformers saves them, ``hf:<folder>``; or a causal language model in a file, ``hf:<file.gguf>``."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitfront.errors import BitfrontError, first_line
from bitfront.theirs import FOLDER, GGUF, MADE, saved

READERS = ("gguf", "accelerate")  # with which transformers reads such files
DAMAGED = (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError, struct.error)  # of a reader


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except DAMAGED as error:
        raise BitfrontError(
            f"could not read model={name} ({type(error).__name__}: {first_line(error)}); get it anew, or give another"
        ) from None


def library(what: str) -> Any:
    """The package transformers, silenced.

    Args:
        what: needs it, for the message.

    Raises:
        BitfrontError: it is missing.
    """
    try:
        import transformers
    except ImportError as error:
        raise BitfrontError(f"{what} needs {error.name}: pip install {error.name}") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def kind(name: str) -> Any:
    """The class of transformers that a network in a folder is of.

    Raises:
        BitfrontError: there is none, or a package is missing.
    """
    place = Path(name.removeprefix(FOLDER))
    gguf = place.suffix == GGUF
    wanted = "AutoModelForCausalLM" if gguf else _architecture(name, place)
    transformers = library(f"model={name}")
    if gguf and (missing := [package for package in READERS if find_spec(package) is None]):
        raise BitfrontError(f"model={name} needs {missing[0]}: pip install {' '.join(missing)}")
    if (found := getattr(transformers, wanted, None)) is None:
        raise BitfrontError(f"model={name}: transformers has no {wanted}; give {MADE} for your own")
    return found


def _architecture(name: str, folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text())["architectures"][0])
    except (OSError, ValueError, LookupError, TypeError):
        raise BitfrontError(
            f"model={name}: '{folder}/config.json' is not there or names no architecture; give a folder that "
            f"save_pretrained has written, or a *{GGUF} file"
        ) from None


def settings(name: str) -> dict[str, Any]:
    """Its config.json, or what the file says likewise."""
    folder, file = saved(name)
    with _reading(name):
        told = _config(name).to_dict() if file else json.loads((folder / "config.json").read_text())
        return told | (told.get("text_config") or {})


def beside(name: str, file: str) -> dict[str, Any]:
    """What a json file in its folder says; empty if there is none.

    Raises:
        BitfrontError: it is damaged.
    """
    place = saved(name)[0] / file
    try:
        found = json.loads(place.read_text()) if place.is_file() else {}
    except (OSError, ValueError) as error:
        raise BitfrontError(f"'{place}' is damaged ({error}); get it anew") from None
    if not isinstance(found, dict):
        raise BitfrontError(f"'{place}' is damaged; get it anew")
    return found


def tokenizer(name: str) -> str:
    """The rules of its tokenizer, as in a tokenizer.json.

    Raises:
        BitfrontError: it has none, or is damaged.
    """
    import transformers

    folder, file = saved(name)
    place = folder / "tokenizer.json"
    if not file and not place.is_file():
        raise BitfrontError(f"model={name} has no tokenizer.json; save its fast tokenizer there")
    with _reading(name):
        if not file:
            return place.read_bytes().decode()
        found = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, **file)
        return str(found.backend_tokenizer.to_str())


def stored_dtype(name: str) -> torch.dtype:
    """In which its weights were saved; float32 where that is not told."""
    told = settings(name)
    found = getattr(torch, str(told.get("dtype") or told.get("torch_dtype")), None)
    return found if isinstance(found, torch.dtype) else torch.float32


def build(name: str, pretrained: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A network in training mode.

    Args:
        name: of it.
        pretrained: with its weights; else fresh, and the caller seeds.
        dtype: of its parameters.

    Raises:
        BitfrontError: it is damaged, or weights are missing.
    """
    made, (folder, file) = kind(name), saved(name)
    options: dict[str, Any] = {"output_loading_info": True, "local_files_only": True, "dtype": dtype}
    with _reading(name):
        if not pretrained:
            return _fresh(made, _config(name), dtype)
        network, told = made.from_pretrained(folder, **options, **file)
    if told["missing_keys"]:
        raise BitfrontError(f"model={name}: its weights lack {', '.join(sorted(told['missing_keys'])[:5])}")
    if not file:
        return network.train()
    plain = _fresh(made, _config(name), dtype)  # without what transformers notes of how the file was packed
    plain.load_state_dict(network.state_dict())
    return plain.train()


def _config(name: str) -> Any:
    import transformers

    folder, file = saved(name)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **file)
    if file:
        config = copy.deepcopy(config)
        config.__dict__.pop("quantization_config", None)
    return config


def _fresh(made: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # no larger copy of it beforehand
    try:
        network: nn.Module = made.from_config(config, dtype=dtype) if hasattr(made, "from_config") else made(config)
    finally:
        torch.set_default_dtype(usual)
    return network
