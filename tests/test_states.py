"""States of an interrupted calibration: taken only where they are of the same network, forward, data and settings."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bitfront
from bitfront import GPTQ, BitfrontError
from bitfront.quant.engine.states import fingerprint

METHOD = GPTQ(bits=3, min_size=0.0, exclude=["bias"])
MIXING = torch.diag(torch.linspace(0.01, 5, 16)) @ torch.randn(16, 16, generator=torch.Generator().manual_seed(0))


class Twice(nn.Sequential):
    """A stack with the same state, and another architecture."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


def stack(kind: type[nn.Sequential] = nn.Sequential) -> nn.Module:
    torch.manual_seed(0)
    return kind(nn.Linear(16, 16), nn.Tanh())


def weights(model: bitfront.QuantizedModel) -> Tensor:
    return model.encode()["0.weight"].decode()


CHANGES: dict[str, Callable[[list[Any]], dict[str, Any]]] = {
    "forward": lambda data: {"forward": lambda net, x: net(x @ MIXING)},
    "valid": lambda data: {"valid": lambda x: torch.linspace(0.2, 1, len(x))},
    "architecture": lambda data: {"network": stack(Twice)},
    "data": lambda data: {"data": [x @ MIXING for x in data]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_another_call_has_left_is_not_taken(change: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    data: list[Any] = [torch.randn(8, 5, 16) for _ in range(3)]

    def quantized(**other: Any) -> bitfront.QuantizedModel:
        call = {"network": stack(), "data": data} | other
        return bitfront.quantize(call.pop("network"), METHOD, call.pop("data"), **call)

    before = quantized(states=tmp_path)
    found, wanted = (quantized(**CHANGES[change](data), **kept) for kept in ({"states": tmp_path}, {}))
    assert torch.equal(weights(found), weights(wanted)) and not torch.equal(weights(found), weights(before))


def test_an_interrupted_call_goes_on_from_its_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = [torch.randn(8, 16)]
    first = bitfront.quantize(stack(), METHOD, data, states=tmp_path)

    def never(*_: Any) -> Any:
        raise AssertionError("solved again")

    monkeypatch.setattr(GPTQ, "solve", never)
    again = bitfront.quantize(stack(), METHOD, [data[0].clone()], states=tmp_path)
    assert torch.equal(weights(again), weights(first))


Pair = namedtuple("Pair", "a b")


class Slots:
    __slots__ = ("x",)

    def __init__(self, x: Any) -> None:
        self.x = x


class Batch:
    def __init__(self, x: Any) -> None:
        self.x, self.itself = x, self


BATCHES: dict[str, Callable[[float], Any]] = {
    "long array": lambda v: np.where(np.arange(10_000) == 5000, v, 0.0),  # whose repr is abbreviated
    "array of objects": lambda v: np.array([None, "x", v], dtype=object),
    "in one another": lambda v: {"a": [(torch.zeros(2), np.full(3, v))]},
    "ordered": lambda v: OrderedDict(a=torch.full((2,), v)),
    "named": lambda v: Pair(1, torch.full((2,), v)),
    "queue": lambda v: deque([torch.full((2,), v)]),
    "slots": lambda v: Slots(torch.full((2,), v)),
    "object": lambda v: Batch(np.full(3, v)),
    "sparse": lambda v: torch.full((2, 2), v).to_sparse(),
    "complex": lambda v: torch.full((2,), v, dtype=torch.complex64),
    "nested": lambda v: torch.nested.nested_tensor([torch.full((n,), v) for n in (2, 3)]),
    "conjugate": lambda v: torch.full((2,), v * 1j).conj(),
    "bytes": lambda v: bytes(5000) + str(v).encode(),
    "set": lambda v: {v},
}


@pytest.mark.parametrize("kind", BATCHES)
def test_a_fingerprint_tells_batches_apart(kind: str) -> None:
    one, same, other = (fingerprint([BATCHES[kind](v)]) for v in (1.0, 1.0, 2.0))
    assert one == same != other


def test_what_is_in_a_batch_twice_counts_twice() -> None:
    a, b = Batch(1), Batch(2)
    assert fingerprint([a, b, a]) != fingerprint([a, b, b]) != fingerprint([a, a, b])
    assert fingerprint([b"x", b"bytesy"]) != fingerprint([b"xbytes", b"y"])
    endless: list[Any] = [1]
    endless.append(endless)
    assert fingerprint(endless) == fingerprint(endless)


def test_another_process_and_other_random_numbers_find_the_same(tmp_path: Path) -> None:
    batch = [{"a", "b", "c", "d", "e"}, {"x": 1}]
    code = f"from bitfront.quant.engine.states import fingerprint; print(fingerprint({batch}))"
    seeded = os.environ | {"PYTHONHASHSEED": "7"}
    found = subprocess.run([sys.executable, "-c", code], env=seeded, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == fingerprint(batch)
    data = [torch.randn(8, 16)]
    for seed in (0, 1):
        torch.manual_seed(seed)
        bitfront.quantize(stack(), METHOD, data, forward=lambda net, x: net(x + torch.randn_like(x)), states=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_what_tells_nothing_is_refused() -> None:
    with pytest.raises(BitfrontError, match="generator"):
        fingerprint([(x for x in range(3))])
