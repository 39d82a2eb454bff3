"""What decides the course of a forward."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from bitfront.quant.engine.plan import Calibration, plan
from bitfront.quant.forwards.course import Course, signature

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
COUNTS = torch.tensor([2, 1, 0, 1])


def _written(x: torch.Tensor) -> torch.Tensor:
    x[1].add_(X[0])
    return x


BY_VALUES = {
    "item": lambda: X.sum().item(),
    "truth": lambda: X if X.sum() > 0 else -X,
    "int": lambda: int(COUNTS[0]),
    "range": lambda: [X for _ in range(COUNTS[0])],
    "tolist": lambda: COUNTS.tolist(),
    "numpy": lambda: X.numpy(),
    "mask": lambda: X[X > 0],
    "nonzero": lambda: X.nonzero(),
    "where": lambda: torch.where(X > 0),
    "selected": lambda: X.masked_select(X > 0),
    "unique": lambda: COUNTS.unique(),
    "repeated": lambda: X.repeat_interleave(COUNTS, 0),
    "equal": lambda: torch.equal(X, X),
    "close": lambda: torch.allclose(X, X),
    "random": lambda: torch.rand(3).tolist(),
    "written": lambda: torch.zeros(4, 6).copy_(X).sum().item(),
    "drawn in place": lambda: torch.zeros(3).uniform_().tolist(),
    "filled from elsewhere": lambda: torch.empty(3).tolist(),
    "of a higher order": lambda: torch.cond(X.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (X,)),
    "written through a view": lambda: _written(torch.zeros(4, 6)).sum().item(),
}
BY_FORM = {
    "product": lambda: X @ X.T,
    "shape": lambda: X.new_zeros(X.shape[0] * 2, len(X)),
    "taken": lambda: X[:, COUNTS],
    "sliced": lambda: X[1:, ::2],
    "looked up": lambda: F.embedding(COUNTS, X),
    "attention": lambda: F.scaled_dot_product_attention(X[None], X[None], X[None], is_causal=True),
    "where": lambda: torch.where(X > 0, X, 0.0),
    "convolution": lambda: F.conv1d(X[None], torch.ones(2, 4, 3)),
    "recurrent": lambda: nn.LSTM(6, 3)(X[:, None]),
    "loss": lambda: F.cross_entropy(X, COUNTS),
    "positions": lambda: (torch.arange(len(X))[None].diff() != 1).any().item(),
}


@pytest.mark.parametrize("what", BY_VALUES)
def test_values_decide(what: str) -> None:
    course = Course()
    with torch.no_grad(), course.watched():
        BY_VALUES[what]()
    assert course.open


@pytest.mark.parametrize("what", BY_FORM)
def test_values_do_not_decide(what: str) -> None:
    course = Course()
    with torch.no_grad(), course.watched():
        BY_FORM[what]()
        with course.aside():
            X.sum().item()
    assert not course.open


def test_a_signature_is_of_all_but_values() -> None:
    batch = {"x": X, "n": 3, "s": ("a", None)}
    same = {"x": X + 1, "n": 3, "s": ("a", None)}
    assert signature(batch) == signature(same)
    others = [{**batch, "x": X[:2]}, {**batch, "x": X.half()}, {**batch, "n": 4}, {**batch, "n": 3.0}, {"x": X}]
    assert all(signature(other) != signature(batch) for other in others)
    assert signature({"x": X, "other": object()}) is None


class Language(nn.Module):
    """Look-up and output are tied, and a layer may depend on a token."""

    def __init__(self, decides: bool) -> None:
        super().__init__()
        self.table, self.inner, self.rare = nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.decides, self.ends = decides, 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.inner(self.table(ids))
        if self.decides and (ids == 6).any():
            x = self.rare(x)
        self.ends += 1
        return x @ self.table.weight.T


@pytest.mark.parametrize("decides", [False, True])
def test_a_plan_needs_whole_forwards_only_where_values_decide(decides: bool) -> None:
    network = Language(decides)
    batches = [torch.tensor([0, 1, 1]), torch.tensor([2, 1, 6]), torch.tensor([3, 3])]
    weights = {name: p for name, p in network.named_parameters() if name.endswith("weight")}
    ran: list[bool] = []

    def run(net: nn.Module, batch: torch.Tensor) -> None:
        n = network.ends
        try:
            net(batch)
        finally:
            ran.append(network.ends > n)

    units = plan(network, weights, Calibration(batches, run=run))
    # The second is as the first; of it only what it looks up is needed. The last run is the links'.
    assert ran == ([True] * 4 if decides else [True, True, False, True])
    seen = {name for unit in units for name in unit.names if name not in (*unit.blind, *unit.unseen)}
    assert ("rare.weight" in seen) == decides
