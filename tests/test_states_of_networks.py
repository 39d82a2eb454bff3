"""What networks hold beside plain parameters: it is stored and loaded as it is, or refused in one line before time is
spent."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitfront
from bitfront import GPTQ, LSQ, BitfrontError, Method
from bitfront.quant.storage.weights import load_weights

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


class Holding(nn.Module):
    """A network that also holds a tensor, and may use it."""

    def __init__(
        self, held: Tensor, use: Callable[[Tensor, Tensor], Tensor] | None = None, persistent: bool = True
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.use = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), use
        self.held: Tensor
        if isinstance(held, nn.Parameter):
            self.register_parameter("held", held)
        else:
            self.register_buffer("held", held, persistent)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.use(x, self.held) if self.use else x)


def complex_product(x: Tensor, held: Tensor) -> Tensor:
    return torch.view_as_real(x.to(held.dtype) @ held).sum(-1)


STORED: dict[str, Callable[[], Holding]] = {
    "complex parameter": lambda: Holding(nn.Parameter(torch.eye(8, dtype=torch.cfloat) * 2), complex_product),
    "complex buffer": lambda: Holding(torch.eye(8, dtype=torch.cfloat) * (1 + 2j), complex_product),
    "expanded parameter": lambda: Holding(nn.Parameter(torch.randn(1, 8).expand(32, 8)), lambda x, held: x + held[5]),
    "expanded buffer": lambda: Holding(torch.randn(1, 8).expand(5, 8), lambda x, held: x + held[3]),
    "transposed parameter": lambda: Holding(nn.Parameter(torch.randn(8, 8).t()), lambda x, held: x * held.sum()),
    "nothing": lambda: Holding(torch.zeros(0, 8), lambda x, held: x + held.sum()),
    "parameter of whole numbers": lambda: Holding(
        nn.Parameter(torch.arange(8).flip(0), requires_grad=False), lambda x, held: x[:, held]
    ),
    "flags": lambda: Holding(torch.arange(8) > 3, lambda x, held: x * held),
    "float8": lambda: Holding(torch.ones(8).to(torch.float8_e4m3fn), lambda x, held: x * held.float()),
    "sparse, not persistent": lambda: Holding(
        (2 * torch.eye(8)).to_sparse(), lambda x, held: torch.sparse.mm(held, x.t()).t(), persistent=False
    ),
}


@pytest.mark.parametrize("method", [GPTQ(bits=3, min_size=0.0), LSQ(bits=3, min_size=0.0)], ids=["GPTQ", "LSQ"])
@pytest.mark.parametrize("name", STORED)
def test_it_is_stored_and_loaded(name: str, method: Method, tmp_path: Path) -> None:
    network = STORED[name]()
    if isinstance(method, GPTQ):
        model = bitfront.quantize(network, method, X)
    else:
        model = bitfront.prepare(copy.deepcopy(network), method)
        optimizer = model.optimizer(torch.optim.SGD(model.parameters(), 0.01))
        for _ in range(2):
            optimizer.zero_grad()
            model.train()(X[:8]).square().mean().backward()
            optimizer.step()
        model.eval()
    model.save(tmp_path / "model.safetensors")
    again = STORED[name]()
    with torch.no_grad():
        again.net[0].weight.zero_()
    bitfront.load(tmp_path / "model.safetensors", into=again)
    torch.testing.assert_close(again(X[:8]), model(X[:8]))
    torch.save(again.state_dict(), tmp_path / "state.pth")
    plain = STORED[name]()
    load_weights(tmp_path / "state.pth", plain)
    torch.testing.assert_close(plain(X[:8]), again(X[:8]))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "sparse": (lambda: Holding(torch.eye(8).to_sparse()), r"'held' .* is torch.sparse_coo, which files have no place"),
    "quantized": (
        lambda: Holding(torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.quint8)),
        r"'held' .* is torch.quint8, which files have no place",
    ),
    "meta": (lambda: nn.Linear(8, 8).to("meta"), "'weight' is on the meta device.*load the network first"),
    "lazy": (lambda: nn.LazyLinear(8), "lazy modules without their weights yet; call it on a batch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_before_anything_is_computed(name: str) -> None:
    build, told = REFUSED[name]

    def forward(net: nn.Module, batch: Any) -> None:
        raise AssertionError

    with pytest.raises(BitfrontError, match=told):
        bitfront.quantize(build(), GPTQ(bits=3, min_size=0.0), X, forward=forward)
    with pytest.raises(BitfrontError, match=told):
        bitfront.prepare(build(), LSQ(bits=3, min_size=0.0))


def test_numbers_whose_squares_overflow_are_told() -> None:
    with pytest.raises(BitfrontError, match="whose squares overflow"):
        bitfront.quantize(nn.Linear(8, 8), GPTQ(bits=3, min_size=0.0), X * 1e20)
