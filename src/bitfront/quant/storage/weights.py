"""Weights of a network from any file that is usual: our artifact, safetensors, or a state dict that torch has saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from bitfront.errors import ArtifactError, BitfrontError
from bitfront.quant.storage.artifact import Artifact, give_own_memory
from bitfront.saved import DamagedError, load_saved

NESTED = ("state_dict", "model_state_dict", "model", "module", "network", "net", "weights", "ema", "model_ema")
PREFIXES = ("module.", "model.", "_orig_mod.", "network.", "net.")  # of DDP, averages, Lightning and torch.compile
COUNTS = "num_batches_tracked"  # of batch norms; nothing depends on it
AVERAGED = "n_averaged"  # of torch's AveragedModel, beside the network


def load_weights(path: Path, network: nn.Module) -> None:
    """Write the weights of a file into a network of the same architecture; exactly the same names and shapes.

    Args:
        path: our artifact; safetensors; or what ``torch.save`` has made of a state dict, alone or in a checkpoint,
            under one of ``NESTED``. ``PREFIXES`` are taken off where the names then match.
        network: on any device; keeps the types of its tensors.

    Raises:
        BitfrontError: the file is missing or damaged or holds more than tensors, or names or shapes differ; the network
            is left as it was.
    """
    if ours(path):
        Artifact.load(path).load_into(network)
        return
    content = _unpickled(path) if _pickled(path) else safetensors.torch.load_file(path)
    wanted = network.state_dict(keep_vars=True)
    found: tuple[dict[str, Tensor], list[str]] | None = None
    for state in _states(content):
        problems = _problems(state, wanted)
        if found is None or len(problems) < len(found[1]):
            found = state, problems
    if found is None:
        raise BitfrontError(f"'{path}' holds no state dict; save one with torch.save(net.state_dict(), '{path.name}')")
    state, problems = found
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise BitfrontError(
            f"'{path}' is not of this network: {'; '.join(problems[:5])}{more}; {_remedy(state, network, problems)}"
        )
    give_own_memory(network)
    network.load_state_dict(state | {name: t for name, t in wanted.items() if name not in state})


def ours(path: Path) -> bool:
    """Whether a file is an artifact, or is to be told about as one.

    Raises:
        ArtifactError: there is none.
    """
    if not path.is_file():
        raise ArtifactError(f"there is no file '{path}'")
    return not _pickled(path) and not _plain(path)


def _pickled(path: Path) -> bool:
    """Whether torch has written a file; safetensors have a mapping after eight bytes of length."""
    with open(path, "rb") as file:
        begun = file.read(9)
    return begun[8:] != b"{" and begun.startswith((b"PK", b"\x80"))


def _unpickled(path: Path) -> Any:
    try:
        return load_saved(path)
    except DamagedError as error:
        raise BitfrontError(f"{error}; save the weights alone: torch.save(net.state_dict(), 'weights.pth')") from None


def _plain(path: Path) -> bool:
    """Whether it is safetensors, but none of ours; if it is damaged, the artifact's reader says so."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return "bitfront" not in (file.metadata() or {})
    except (safetensors.SafetensorError, OSError, ValueError):
        return False


def _states(content: Any, depth: int = 2) -> Iterator[dict[str, Tensor]]:
    """All state dicts in the content of a file, with and without prefixes."""
    if not isinstance(content, Mapping):
        return
    state = {name: t for name, t in content.items() if isinstance(name, str) and isinstance(t, Tensor)}
    if state:
        yield state
        state = {name: t for name, t in state.items() if name != AVERAGED}
        while state and (prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in state)), "")):
            state = {name.removeprefix(prefix): t for name, t in state.items()}
            yield state
    if depth:
        for key in NESTED:
            yield from _states(content.get(key), depth - 1)


def _remedy(state: Mapping[str, Tensor], network: nn.Module, problems: list[str]) -> str:
    """For problems of the two."""
    wanted = network.state_dict()
    differing = [n for n in wanted if n in state and state[n].shape != wanted[n].shape]
    owners = {name.rpartition(".")[0] for name in differing}
    outputs = {len(state[name]) for name in differing if state[name].dim()}
    alike = all(state[name].shape[1:] == wanted[name].shape[1:] for name in differing)
    one = alike and len(owners) == len(outputs) == 1 and len(differing) == len(problems)
    if one and isinstance(network.get_submodule(*owners), nn.Linear):
        (n,) = outputs
        return f"all but one layer fit: it is of {n} classes, so give their data, or classes={n}"
    return "it must have the same layers and as many outputs: give the model= that it was saved from"


def _problems(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Where a state differs from what a network wants, sorted; a tied tensor needs one of its names."""
    there = {id(wanted[name]) for name in state if name in wanted}
    missing = [n for n, t in wanted.items() if n not in state and id(t) not in there and not n.endswith(COUNTS)]
    problems = [f"'{name}' is missing" for name in missing]
    problems += [f"'{name}' is not in the network" for name in state if name not in wanted]
    first: dict[int, str] = {}
    for name in [name for name in wanted if name in state]:
        known = first.setdefault(id(wanted[name]), name)
        if state[name].shape != wanted[name].shape:
            problems.append(f"'{name}' is {list(state[name].shape)}, not {list(wanted[name].shape)}")
        elif state[name].is_floating_point() != wanted[name].is_floating_point():
            problems.append(f"'{name}' is {state[name].dtype}, not {wanted[name].dtype}")
        elif known != name and not torch.equal(state[known], state[name]):
            problems.append(f"'{name}' is not the same as '{known}', to which the network ties it")
    return sorted(problems)
