"""Networks that we did not write: what their forwards do to inputs, caches, buffers and modes, how they use weights,
and how users' writes meet a quantized model. Each against a calculation that knows nothing of ours."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import TiedGPT
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.data import DataLoader, TensorDataset

import bitfront
from bitfront import GPTQ, LSQ, RTN, STE, BitfrontError, DecoupleQ, DiffQ, Packed
from bitfront.quant.engine.frozen import Frozen
from bitfront.quant.engine.plan import blocks
from bitfront.quant.layers.inputs import Moments

EVERY = {"min_size": 0.0005}  # MB, so that small layers are quantized


def batches(n: int = 6, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(shape[-1], shape[-1], generator=generator)  # so that inputs are correlated
    return [torch.randn(8, *shape, generator=generator) @ mixing for _ in range(n)]


def losses(model: bitfront.QuantizedModel) -> dict[str, float]:
    return {entry["name"]: entry["loss"] for entry in model.log["layers"] if "loss" in entry}


def codes(model: bitfront.QuantizedModel) -> dict[str, Tensor]:
    return {name: packed.codes for name, packed in model.encode().items()}


def error(w: Tensor, quantized: Tensor, x: Tensor) -> float:
    """Relative power of the error of a linear layer's output on inputs ``[..., columns]``."""
    exact, wrong = (x.double() @ v.double().T for v in (w, quantized))
    return ((wrong - exact).square().sum() / exact.square().sum()).item()


class Stack(nn.Module):
    """Blocks that are called one after the other, each with whatever else they share."""

    def __init__(self, block: Callable[[], nn.Module], n: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(block() for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Cached(nn.Module):
    """A decoder whose layers append to a live cache among their arguments, which is no container that pytorch knows."""

    class Cache:
        def __init__(self) -> None:
            self.keys: dict[int, Tensor] = {}

        def update(self, n: int, k: Tensor) -> Tensor:
            self.keys[n] = torch.cat([self.keys[n], k], 1) if n in self.keys else k
            return self.keys[n]

    class Layer(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.n, self.q, self.k, self.o = n, nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor, cache: Any = None) -> Tensor:
            k = self.k(x)
            k = k if cache is None else cache.update(self.n, k)
            return x + self.o(F.softmax(self.q(x) @ k.transpose(1, 2) / 4, -1) @ k)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Cached.Layer(n) for n in range(2))

    def forward(self, x: Tensor, use_cache: bool = True) -> Tensor:
        cache = Cached.Cache() if use_cache else None
        for layer in self.layers:
            x = layer(x, cache=cache)
        return x


@pytest.mark.parametrize("method", [GPTQ(bits=3, **EVERY), DecoupleQ(bits=2, J=2, **EVERY)])
def test_a_live_cache_among_the_arguments_makes_no_difference(method: Any) -> None:
    data, network = batches(6, 5, 16), Cached()
    found = [
        codes(bitfront.quantize(network, method, data, forward=lambda net, x, use=use: net(x, use_cache=use)))
        for use in (True, False)
    ]
    assert len(found[0]) == 6 and all(torch.equal(found[0][name], found[1][name]) for name in found[1])


def test_a_network_that_writes_into_its_input_changes_neither_data_nor_result() -> None:
    class Writes(nn.Module):
        def __init__(self, clones: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.clones, self.first, self.second = clones, nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone() if self.clones else x
            x.mul_(0.5).add_(1)
            return self.second(torch.relu_(self.first(x)))

    data = batches(4, 16)
    before = copy.deepcopy(data)
    found = [bitfront.quantize(Writes(clones), GPTQ(bits=3, **EVERY), data) for clones in (False, True)]
    assert all(torch.equal(a, b) for a, b in zip(data, before, strict=True))
    assert losses(found[0]) == losses(found[1])
    seen = torch.cat(before) * 0.5 + 1
    quantized = found[0].encode()["first.weight"].decode()
    assert losses(found[0])["first.weight"] == pytest.approx(
        error(Writes(True).first.weight, quantized, seen), rel=1e-3
    )


def test_a_network_that_pops_from_its_batch_gets_it_whole_each_time() -> None:
    class Pops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2)])

        def forward(self, batch: dict[str, Any]) -> Tensor:
            x = batch.pop("x") + batch.pop("shift", 100.0)
            for layer in self.layers:
                x = layer(x)
            return x

    data = [{"x": x, "shift": 0.5, "label": 3} for x in batches(4, 16)]
    model = bitfront.quantize(Pops(), GPTQ(bits=3, **EVERY), data)
    assert all(batch.keys() == {"x", "shift", "label"} for batch in data)
    seen = torch.cat([batch["x"] + 0.5 for batch in data])
    quantized = model.encode()["layers.0.0.weight"].decode()
    assert losses(model)["layers.0.0.weight"] == pytest.approx(
        error(Pops().layers[0][0].weight, quantized, seen), rel=1e-3
    )


class LowRank(nn.Module):
    """LoRA, written as a parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(2, 16)), nn.Parameter(torch.randn(16, 2))

    def forward(self, w: Tensor) -> Tensor:
        return w + self.up @ self.down


def parametrized_layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    layer = lambda: nn.Linear(16, 16)  # noqa: E731
    lora = layer()
    parametrize.register_parametrization(lora, "weight", LowRank())
    return {
        "weight_norm": parametrizations.weight_norm(layer()),
        "spectral_norm": parametrizations.spectral_norm(layer()),
        "orthogonal": parametrizations.orthogonal(layer()),
        "lora": lora,
        "old weight_norm": nn.utils.weight_norm(layer()),
        "old spectral_norm": nn.utils.spectral_norm(layer()),
        "pruned": prune.l1_unstructured(layer(), "weight", 0.3),
    }


@pytest.mark.parametrize("name", parametrized_layers())
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_computed_weights_are_resolved(name: str, tmp_path: Path) -> None:
    """The composed weight is quantized, the user's network stays, and the file goes into a network of either kind."""
    network = nn.Sequential(parametrized_layers()[name], nn.ReLU(), nn.Linear(16, 16)).train()
    data = batches(4, 16)
    network(data[0])  # after which old norms hold a weight that is no leaf
    composed, state = network.eval()[0].weight.detach().clone(), copy.deepcopy(network.state_dict())
    with pytest.raises(BitfrontError, match="resolve"):
        RTN(**EVERY).attach(network)
    model = bitfront.quantize(network, GPTQ(bits=8, **EVERY), data)
    assert model.names == ["0.weight", "2.weight"]
    quantized = model.encode()["0.weight"].decode()
    assert (quantized - composed).abs().max() < 0.02 * composed.abs().max()
    assert losses(model)["0.weight"] == pytest.approx(error(composed, quantized, torch.cat(data)), rel=1e-2)
    assert all(torch.equal(network.state_dict()[key], value) for key, value in state.items())
    model.save(tmp_path / "net.safetensors")
    same = nn.Sequential(parametrized_layers()[name], nn.ReLU(), nn.Linear(16, 16)).eval()
    plain = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    for into in (same, plain):
        assert torch.equal(bitfront.load(tmp_path / "net.safetensors", into=into)(data[0]), model(data[0]))
    trained = bitfront.prepare(network, LSQ(**EVERY))
    assert trained.names == ["0.weight", "2.weight"]


class Uses(nn.Module):
    """One weight, used as told."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.use, self.weight, self.last = use, nn.Parameter(torch.randn(16, 16)), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.use(x, self.weight))


BLIND: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda x, w: x @ (w @ w),
    "contiguous": lambda x, w: x @ w.T.contiguous(),
    "einsum": lambda x, w: x * torch.einsum("bi,oi->b", x, w)[:, None],
    "add": lambda x, w: F.linear(x, w + torch.eye(16)),
    "sparse_mm": lambda x, w: torch.sparse.mm(x.to_sparse(), w),
    "tensordot": lambda x, w: torch.tensordot(x, w, 1),
    "getitem": lambda x, w: torch.bmm(x[:, None], w[torch.zeros(8, dtype=torch.long)][:, :, None].expand(-1, -1, 16))[
        :, 0
    ],
    "mul": lambda x, w: F.linear(x, 2 * w),
    "to": lambda x, w: F.linear(x.double(), w.to(torch.float64)).float(),
    "conv_transpose1d": lambda x, w: F.conv_transpose1d(x[:, :, None], w[:, :, None])[:, :, 0],
    "linear": lambda x, w: F.linear(w[:8], x)[:, :1].expand(-1, 16),
}


@pytest.mark.parametrize("name", BLIND)
def test_uses_that_are_not_understood_are_said(name: str) -> None:
    model = bitfront.quantize(Uses(BLIND[name]), GPTQ(bits=3, **EVERY), batches(2, 16))
    entry = next(entry for entry in model.log["layers"] if entry["name"] == "weight")
    assert entry["inputs"] == 0 and name in entry["unseen"] and "loss" not in entry
    assert model.log["blind"] == pytest.approx(1 / 2)
    line = next(line for line in model.summary().splitlines() if line.startswith("rounded blind"))
    size = model.encode()["weight"].nbytes
    assert f"1 tensors, {size:,} bytes" in line and f"weight ({', '.join(entry['unseen'])})" in line


def test_a_weight_with_one_use_more_is_calibrated_on_the_others_and_that_is_said() -> None:
    model = bitfront.quantize(Uses(lambda x, w: F.linear(x, w) + x @ w), GPTQ(bits=3, **EVERY), batches(2, 16))
    entry = next(entry for entry in model.log["layers"] if entry["name"] == "weight")
    assert entry["inputs"] == 16 and entry["unseen"] == ["matmul"]
    assert "calibrated on a part of their uses: 1 tensors" in model.summary()


@pytest.mark.parametrize("use", [lambda x, w: F.linear(x, w), lambda x, w: F.linear(x, w.to(x.dtype).contiguous())])
def test_what_only_looks_at_a_weight_is_no_use(use: Callable[[Tensor, Tensor], Tensor]) -> None:
    def looks(x: Tensor, w: Tensor) -> Tensor:
        assert w.shape[0] == 16 and w.dtype == x.dtype and w.numel() and w.requires_grad
        return use(x, w)

    model = bitfront.quantize(Uses(looks), GPTQ(bits=3, **EVERY), batches(2, 16))
    assert not any("unseen" in entry for entry in model.log["layers"]) and len(losses(model)) == 2
    assert "blind" not in model.summary()


def test_a_block_called_more_often_on_later_batches_sees_all_its_inputs() -> None:
    class Repeats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Tanh())])

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(len(x)):
                x = self.layers[0](x)
            return x

    data = [x[:n] for n, x in enumerate(batches(4, 16), 1)]  # called once, twice, ... on 1, 2, ... samples
    model = bitfront.quantize(Repeats(), GPTQ(bits=3, **EVERY), data)
    assert model.log["layers"][0]["inputs"] == 1 + 4 + 9 + 16


def test_a_branch_that_the_first_batch_leaves_out_is_seen() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.never = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) if x.mean() > 0 else self.right(x)

    data = [x.abs() * sign for x, sign in zip(batches(4, 16), (1, 1, -1, -1), strict=True)]
    model = bitfront.quantize(Branches(), GPTQ(bits=3, **EVERY), data)
    assert losses(model).keys() == {"left.weight", "right.weight"}
    assert "never.weight (not used on these data)" in model.summary()


@pytest.mark.parametrize("size", [{"bits": 3}, {"max_size": 0.004}], ids=["bits", "max_size"])
@pytest.mark.parametrize(
    "kind", [GPTQ, partial(GPTQ, hessian="fisher"), DecoupleQ], ids=["gptq", "fisher", "decoupleq"]
)
def test_an_expert_that_is_called_with_no_token_is_rounded_and_told(
    kind: Any, size: dict[str, Any], tmp_path: Path
) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            chosen = (x[:, 0] > 0).long()
            return torch.cat([expert(x[chosen == n]) for n, expert in enumerate(self.experts)])

    model = bitfront.quantize(Experts(), kind(**size, **EVERY), batches(4, 16))
    assert losses(model).keys() == {"experts.0.weight", "experts.1.weight"}
    assert "experts.2.weight (not used on these data)" in model.summary()
    assert model.log["blind"] == pytest.approx(1 / 3)
    assert not {"hessian", "loss"} & model.log["layers"][-1].keys()
    assert model.save(tmp_path / "net") <= size.get("max_size", 1) * 2**20


def test_rows_that_are_looked_up_alone_are_not_blind() -> None:
    """An output layer that is the embedding, of which no position is asked for."""

    class Nothing(TiedGPT):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.hidden(self.embedding(x)))[:0])

    model = bitfront.quantize(Nothing(), GPTQ(bits=3, **EVERY), [torch.arange(40).view(4, 10)])
    assert model.log["blind"] == 0 and "embedding.weight" in model.encode()


def test_a_list_of_one_block_is_a_list_of_blocks() -> None:
    block = lambda: nn.Sequential(nn.Linear(16, 16), nn.Tanh())  # noqa: E731
    assert blocks(Stack(block, 1)) == ["layers.0"] and blocks(Stack(block, 2)) == ["layers.0", "layers.1"]
    assert blocks(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())) == ["0", "1"]


class Counts(nn.Module):
    """Has buffers that each forward changes: in place, anew, and those of a batch norm that is kept in training."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(16, 16), nn.BatchNorm1d(16)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return F.batch_norm(self.linear(x), self.norm.running_mean, self.norm.running_var, training=True)


@pytest.mark.parametrize("method", [GPTQ(bits=3, **EVERY), DecoupleQ(J=1, **EVERY)])
def test_buffers_and_modes_are_as_before(method: Any) -> None:
    network = Stack(Counts).train()
    network.layers[0].eval()
    before = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    calibrated = copy.deepcopy(network)
    method.attach(calibrated, bitfront.Calibration(batches(3, 16), lambda net, x: net(x)))
    assert [module.training for module in calibrated.modules()] == modes
    buffers = dict(network.named_buffers())
    assert all(torch.equal(calibrated.state_dict()[name], before[name]) for name in buffers) and len(buffers) == 10
    bitfront.quantize(network, method, batches(3, 16))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [module.training for module in network.modules()] == modes


WRITES: dict[str, Callable[[nn.Module], Any]] = {
    "data": lambda net: net[0].weight.data.mul_(2),
    "data of a slice": lambda net: net[0].weight.data[3, 3].add_(1),
    "vector_to_parameters": lambda net: nn.utils.vector_to_parameters(
        2 * nn.utils.parameters_to_vector(net.parameters()), net.parameters()
    ),
    "assigned state": lambda net: net.load_state_dict({k: 2 * v for k, v in net.state_dict().items()}, assign=True),
    "new parameter": lambda net: setattr(net[0], "weight", nn.Parameter(2 * net[0].weight.detach())),
    "numpy": lambda net: net[0].weight.detach().numpy().__imul__(2),
}


@pytest.mark.parametrize("write", WRITES)
def test_weights_written_behind_the_cache_are_noticed(write: str) -> None:
    torch.manual_seed(0)
    model = bitfront.prepare(nn.Sequential(nn.Linear(16, 16)), STE(bits=4, **EVERY)).eval()
    x = batches(1, 16)[0]
    with torch.no_grad():
        before = model(x)
        assert model.weights() is model.weights()  # computed once
        WRITES[write](model.network)
        wanted = F.linear(x, model.encode()["0.weight"].decode(), model.network[0].bias)
        assert torch.equal(model(x), wanted) and not torch.equal(wanted, before)


def test_a_first_forward_in_inference_mode_spoils_no_later_one() -> None:
    model = bitfront.prepare(nn.Sequential(nn.Linear(16, 16)), LSQ(**EVERY)).eval()
    with torch.inference_mode():
        model(torch.randn(2, 16))
    x = torch.randn(2, 16, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (LSQ(bits=4, **EVERY), LSQ(bits=2, **EVERY)),
        (STE(bits=4, **EVERY), STE(bits=2, **EVERY)),
        (STE(bits=4, **EVERY), LSQ(bits=4, **EVERY)),
        (DiffQ(max_bits=15, **EVERY), DiffQ(max_bits=9, **EVERY)),
        (DiffQ(**EVERY), DiffQ(range="absmax", **EVERY)),
    ],
)
def test_a_state_of_other_settings_is_refused(ours: Any, theirs: Any) -> None:
    network = nn.Sequential(nn.Linear(16, 16))
    state = bitfront.prepare(copy.deepcopy(network), theirs).state_dict()
    with pytest.raises((BitfrontError, RuntimeError), match=r"other settings|Missing|Unexpected"):
        bitfront.prepare(copy.deepcopy(network), ours).load_state_dict(state)
    bitfront.prepare(copy.deepcopy(network), theirs).load_state_dict(state)


def test_a_calibrated_state_of_other_bits_is_refused() -> None:
    network, data = nn.Sequential(nn.Linear(16, 16)), batches(2, 16)
    two, four = (bitfront.quantize(network, GPTQ(bits=bits, **EVERY), data) for bits in (2, 4))
    with pytest.raises(BitfrontError, match="bits=2 there, 4 here"):
        four.load_state_dict(two.state_dict())


@pytest.mark.parametrize("method", [GPTQ, DecoupleQ])
@pytest.mark.parametrize(("columns", "size"), [(20, 8), (21, 4), (9, 8), (7, 8), (33, 32)])
def test_the_last_group_of_a_row_may_be_shorter(method: Any, columns: int, size: int, tmp_path: Path) -> None:
    """Exactly counted in the file, its loss measured, each group of each row on a grid of its own."""
    torch.manual_seed(0)
    network, data = nn.Sequential(nn.Linear(columns, 12)), batches(8, columns)
    model = bitfront.quantize(network, method(bits=3, group_size=size, min_size=0.0, exclude=["bias"]), data)
    packed = model.encode()["0.weight"]
    groups = -(-columns // size)
    assert packed.nbytes == 3 * -(-12 * columns // 8) + 12 * groups * 2 * 2
    assert packed.to_bytes().numel() == packed.nbytes
    again = Packed.from_bytes(packed.to_bytes(), packed.layout())
    assert torch.equal(again.decode(), packed.decode())
    w = packed.decode()
    for row in w:
        assert all(len(part.unique()) <= 8 for part in row.split(size))
    assert losses(model)["0.weight"] == pytest.approx(error(network[0].weight, w, torch.cat(data)), rel=1e-3)
    assert model.log["layers"][0]["dead_inputs"] == 0  # the padding is none
    model.save(tmp_path / "net.safetensors")
    into = bitfront.load(tmp_path / "net.safetensors", into=copy.deepcopy(network))
    assert torch.equal(into(data[0]), model(data[0]))


def by_the_paper(w: Tensor, H: Tensor, bits: int, size: int, damping: float) -> Tensor:
    """GPTQ (arXiv 2210.17323, algorithm 1), column after column, on the grids of the original weights' groups."""
    w, levels = w.double().clone(), 2**bits - 1
    grids = [torch.aminmax(part, dim=1) for part in w.float().split(size, dim=1)]
    upper = torch.linalg.cholesky(torch.linalg.inv(H + damping * H.diagonal().mean() * torch.eye(len(H))), upper=True)
    for j in range(len(H)):
        low, high = (x.double() for x in grids[j // size])
        step = (high - low) / levels
        rounded = low + step * ((w[:, j] - low) / step).round().clamp(0, levels)
        w[:, j + 1 :] -= ((w[:, j] - rounded) / upper[j, j])[:, None] * upper[j, j + 1 :]
        w[:, j] = rounded
    return w


@pytest.mark.parametrize(("columns", "size"), [(20, 8), (16, 5), (16, 8)])
def test_shorter_groups_are_solved_as_the_paper_says(columns: int, size: int) -> None:
    torch.manual_seed(0)
    network, data = nn.Sequential(nn.Linear(columns, 32)), batches(8, columns)
    method = GPTQ(bits=3, group_size=size, act_order=False, damping=0.01, scale_dtype="float32", **EVERY)
    found = bitfront.quantize(network, method, data).encode()["0.weight"].decode()
    x = torch.cat(data).double()
    wanted = by_the_paper(network[0].weight.detach(), x.T @ x / len(x), 3, size, 0.01)
    assert ((found - wanted).abs() > 1e-5).double().mean() < 0.01  # but for ties


def test_any_kind_of_data_is_calibrated_on() -> None:
    torch.manual_seed(0)
    network: nn.Module = nn.Sequential(nn.Linear(16, 16))
    x = torch.cat(batches(8, 16))
    labelled = TensorDataset(x, torch.zeros(len(x), dtype=torch.long))

    def generated() -> Iterator[Tensor]:
        yield from x.split(8)

    method = GPTQ(bits=3, batch_size=8, **EVERY)
    kinds = {
        "list": list(x.split(8)),
        "loader": DataLoader(labelled, batch_size=8),
        "generator": generated(),
        "tensor": x,
        "dicts": [{"input": part, "labels": 3} for part in x.split(8)],
    }
    found = {name: codes(bitfront.quantize(network, method, data))["0.weight"] for name, data in kinds.items()}
    assert [name for name in kinds if not torch.equal(found[name], found["list"])] == []
    shuffled = DataLoader(labelled, batch_size=8, shuffle=True)  # another order each time it is asked
    model = bitfront.quantize(
        Stack(lambda: nn.Sequential(nn.Linear(16, 16), nn.Tanh())), DecoupleQ(J=2, **EVERY), shuffled
    )
    assert all(block["held_out"][0] < 0.5 for block in model.log["blocks"])  # of unrelated outputs it is 2


def test_only_so_many_samples_are_drawn() -> None:
    drawn = 0

    def endless() -> Iterator[Tensor]:
        nonlocal drawn
        while True:
            drawn += 1
            yield torch.randn(8, 16)

    model = bitfront.quantize(nn.Sequential(nn.Linear(16, 16)), GPTQ(samples=20, **EVERY), endless())
    assert drawn == 3 and model.log["layers"][0]["inputs"] == 24


def test_round_to_nearest_needs_no_data_and_no_forward() -> None:
    def never(net: nn.Module, batch: Any) -> Any:
        raise AssertionError

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 16))
    without = bitfront.quantize(network, RTN(bits=3, **EVERY))
    with_data = bitfront.quantize(network, RTN(bits=3, **EVERY), batches(2, 16), forward=never)
    assert torch.equal(codes(without)["0.weight"], codes(with_data)["0.weight"])
    with pytest.raises(BitfrontError, match="GPTQ needs calibration data"):
        bitfront.quantize(network, GPTQ())


@pytest.mark.parametrize("left", [False, True])
def test_padding_by_an_attention_mask_counts_nowhere(left: bool) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.pooler = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.pooler(self.linear(x)[:, 0])

    mask = torch.arange(5) < torch.tensor([3, 5, 1, 4, 5, 2, 2, 5])[:, None]
    if left:
        mask = mask.flip(1)
    x = batches(1, 5, 16)[0]
    found = [
        bitfront.quantize(Masked(), GPTQ(bits=3, **EVERY), [{"x": y, "attention_mask": mask.long()}])
        for y in (x, x + 100 * ~mask[:, :, None])
    ]
    assert [entry["inputs"] for entry in found[0].log["layers"]] == [int(mask.sum()), 8]
    assert "on padding, too" not in found[0].summary()
    assert torch.equal(codes(found[0])["linear.weight"], codes(found[1])["linear.weight"])


def test_where_an_attention_mask_does_not_fit_that_is_said() -> None:
    class Experts(nn.Module):
        """Some tokens, in no order, go into a layer."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.expert = nn.Linear(16, 16)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.expert(x.flatten(0, 1)[::3])

    mask = torch.arange(5) < torch.tensor([3, 5, 1, 4, 5, 2, 2, 5])[:, None]
    model = bitfront.quantize(Experts(), GPTQ(bits=3, **EVERY), [{"x": batches(1, 5, 16)[0], "attention_mask": mask}])
    assert model.log["layers"][0]["inputs"] == 14
    assert re.search(r"on padding, too.*: 1 tensors, .* bytes, .* %: expert\.weight\n?$", model.summary())
    with_decoder = {"attention_mask": mask, "decoder_input_ids": torch.zeros(8, 5, dtype=torch.long)}
    causal, additive = torch.ones(5, 5).tril(), torch.where(mask, 0.0, -1e9)
    for batch in (with_decoder, {"attention_mask": causal}, {"attention_mask": additive}):
        assert bitfront.library.not_padded(batch) is None  # whose steps are others, or that is another mask


class Repeated(nn.Module):
    """One module under two names, with a weight, a norm and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))
        self.again = self.first
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.again(self.first(x)))


@pytest.mark.parametrize(
    "method", [bitfront.LSQ(bits=3, raw_dtype="float16", **EVERY), DiffQ(raw_dtype="float16", **EVERY)]
)
def test_a_module_of_two_names_is_left_as_it_was(method: Any) -> None:
    torch.manual_seed(0)
    network, x = Repeated(), torch.randn(8, 16)
    before = {name: t.clone() for name, t in network.state_dict().items()}
    model = bitfront.prepare(network, method)
    model(x).square().sum().backward()
    assert isinstance(network.first[0].weight, nn.Parameter) and network.first[0].weight.grad is not None
    assert not torch.equal(network.first[1].running_mean, before["first.1.running_mean"])  # as training does
    before = {name: t.clone() for name, t in network.state_dict().items()}
    seen = model.eval()(x)
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    weights = model.weights()
    wanted = Repeated().eval()
    wanted.load_state_dict(before | weights | {name.replace("first", "again"): w for name, w in weights.items()})
    assert torch.equal(seen, wanted(x))


def test_blocks_of_two_names_are_tuned_and_left_as_they_were() -> None:
    torch.manual_seed(0)
    network, data = nn.Sequential(Repeated(), Repeated()).eval(), batches(8, 16)
    network[1] = nn.Sequential(nn.Linear(4, 16), Repeated()).eval()
    model = bitfront.quantize(network, DecoupleQ(bits=3, J=2, **EVERY), data)
    assert isinstance(model.network[0].first[0].weight, nn.Parameter)
    names = dict(model.network.named_parameters())
    assert all(torch.equal(names[name], packed.decode()) for name, packed in model.encode().items())


def test_a_state_of_other_scales_is_refused_and_those_from_before_are_taken() -> None:
    torch.manual_seed(0)
    network, data = nn.Sequential(nn.Linear(128, 16)), batches(4, 128)
    states = [
        bitfront.quantize(network, GPTQ(bits=3, group_size=32, **options, **EVERY), data)
        for options in ({"scale_dtype": "float32"}, {"scale_bits": 6}, {})
    ]
    for into, out in itertools.permutations(states, 2):
        with pytest.raises(BitfrontError, match=r"scale_dtype|scale_bits"):
            into.load_state_dict(out.state_dict())
    old = bitfront.prepare(copy.deepcopy(network), bitfront.LSQ(bits=3, **EVERY))
    state = old.state_dict()
    key = next(name for name in state if name.endswith("_extra_state"))
    told = json.loads(bytes(state[key].tolist()))
    del told["scale_dtype"]
    state[key] = torch.frombuffer(bytearray(json.dumps(told).encode()), dtype=torch.uint8)
    bitfront.prepare(copy.deepcopy(network), bitfront.LSQ(bits=3, **EVERY)).load_state_dict(state)
    other = bitfront.prepare(copy.deepcopy(network), bitfront.LSQ(bits=3, scale_dtype="float16", **EVERY))
    with pytest.raises(BitfrontError, match="scale_dtype=float32 there, float16 here"):
        other.load_state_dict(state)


def test_lsq_trains_what_it_stores_also_with_narrow_scales() -> None:
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Linear(64, 32)), torch.rand(16, 64)
    model = bitfront.prepare(network, bitfront.LSQ(bits=8, group_size=-1, scale_dtype="float16", **EVERY))
    seen = model.train()(x)
    seen.square().sum().backward()
    assert torch.equal(seen, model.eval()(x))
    exact = bitfront.prepare(copy.deepcopy(network), bitfront.LSQ(bits=8, group_size=-1, **EVERY))
    exact.train()(x).square().sum().backward()
    ours, theirs = (next(iter(m.quantizers.parameters())).grad for m in (model, exact))
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item())


def test_grids_of_one_value_are_learned_in_the_unit_of_the_others() -> None:
    w = torch.randn(4, 64)
    w[0], w[1, :32] = 0.5, 0.25
    packed, _ = GPTQ(bits=3, group_size=32).solve(w, Moments(torch.eye(64).double()[None], 10))
    frozen = Frozen(packed, True)
    unit = frozen.get_buffer("unit")
    distance = packed.span.float() / 7
    assert (distance[:3] == 0).all() and torch.equal(unit[3:], distance[3:])
    assert torch.allclose(unit[:3], distance[3:].mean())


def test_modules_that_come_after_the_wrapping_are_called() -> None:
    network, x = nn.Sequential(nn.Linear(32, 32)), torch.randn(4, 32)
    model = bitfront.prepare(network, bitfront.LSQ(bits=4, raw_dtype="float16", **EVERY)).eval()
    model(x)
    network.append(nn.Linear(32, 2))
    assert model(x).shape == (4, 2)
