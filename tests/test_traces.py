"""What forwards leave in a network, and what quantizing leaves in it: modes, buffers, attributes, types, devices."""

from __future__ import annotations

import copy
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import bitfront
from bitfront import GPTQ, LSQ, RTN, STE, BitfrontError, Calibration, DecoupleQ, DiffQ
from bitfront.quant.forwards.captured import copied
from bitfront.quant.forwards.parametrized import duplicate

ALL: dict[str, Any] = {"min_size": 0.0, "exclude": ["bias"]}


class Recurrent(nn.Module):
    """Keeps a count, a list and a hidden state, which the next forward goes on from."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.head = nn.Linear(16, 16), nn.Linear(16, 16)
        self.hidden, self.count, self.seen = None, 0, [0]
        self._private, self.nested, self.queue = [], {"k": [torch.zeros(1)]}, deque([1])
        self.register_buffer("lazy", None)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.seen.append(len(x))
        self._private.append(x)
        self.nested["k"][0] += 1
        self.nested["k"].append(x)
        self.queue.append(x)
        self.lazy = torch.ones(3)
        if not hasattr(self, "later"):
            self.register_buffer("later", torch.ones(2))
        self.hidden = x if self.hidden is None else 0.9 * self.hidden + x
        self.last = self.linear(self.hidden)
        return self.head(self.last)


@pytest.mark.parametrize("blocks", [None, []])
def test_every_pass_starts_from_the_state_that_the_network_is_given_in(
    blocks: list[str] | None, tmp_path: Path
) -> None:
    data = [torch.randn(8, 16) for _ in range(4)]
    network = Recurrent()
    model = bitfront.quantize(network, GPTQ(bits=2, **ALL), data, blocks=blocks)
    kept = model.network
    assert (kept.count, kept.seen, kept.hidden, kept._private) == (0, [0], None, [])
    assert kept.nested == {"k": [torch.zeros(1)]} and kept.queue == deque([1])
    assert kept.lazy is None and not hasattr(kept, "last") and not hasattr(kept, "later")
    model.save(tmp_path / "net")
    bitfront.load(tmp_path / "net", into=Recurrent())
    again = bitfront.quantize(network, GPTQ(bits=2, **ALL), data, blocks=blocks, states=tmp_path)
    assert all(torch.equal(p.codes, again.encode()[name].codes) for name, p in model.encode().items())
    hidden, inputs = torch.zeros(8, 16), []
    for x in data:
        hidden = 0.9 * hidden + x
        inputs.append(hidden)
    for entry, seen in zip(model.log["layers"], (torch.cat(inputs), kept.linear(torch.cat(inputs))), strict=True):
        both = network.get_parameter(entry["name"]), model.encode()[entry["name"]].decode()
        exact, wrong = (seen @ w.T for w in both)
        wanted = ((wrong - exact).square().sum() / exact.square().sum()).item()
        assert entry["loss"] == pytest.approx(wanted, rel=1e-3), entry["name"]


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        whole = torch.arange(16.0)
        self.register_buffer("whole", whole)
        self.register_buffer("part", whole[:5])
        self.register_buffer("spread", torch.ones(1).expand(4))
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        self.part += 1
        return self.linear(x * self.whole)


def test_buffers_that_share_memory_still_do() -> None:
    network, x = Views(), torch.randn(8, 16)
    GPTQ(**ALL).attach(network, Calibration([x], lambda net, x: net(x)))
    assert torch.equal(network.whole, torch.arange(16.0))
    network.whole.fill_(3)
    assert torch.equal(network.part, torch.full((5,), 3.0))
    model = bitfront.quantize(Views(), RTN(bits=8, **ALL))
    with torch.no_grad():
        exact = Views()(x)
        assert (model(x) - exact).norm() < 0.02 * exact.norm()


def test_views_within_batches_stay_views() -> None:
    class Cache:
        def __init__(self) -> None:
            self.memory = torch.zeros(4, 3)
            self.slots = [self.memory[n] for n in range(4)]

    for place in (None, "cpu"):
        cache = copied({"cache": Cache()}, place)["cache"]
        cache.slots[2].fill_(7)
        assert torch.equal(cache.memory[2], torch.full((3,), 7.0))
    wide = copied(torch.arange(3.0)[None].expand(1000, 3))
    assert wide.untyped_storage().nbytes() == 12
    row = copied(torch.zeros(1000, 3)[5])  # of data that need not be copied with it
    assert row.untyped_storage().nbytes() == 12


def test_a_network_that_has_been_called_is_copied() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.state = nn.LSTM(16, 16, batch_first=True), None

        def forward(self, x: Tensor) -> Tensor:
            out, hidden = self.lstm(x)
            self.state = {"of": [hidden]}  # results, which torch does not copy
            return out

    network = Keeps()
    network(torch.randn(2, 3, 16))
    bitfront.quantize(network, RTN(**ALL))
    again = duplicate(network)
    for ours, theirs in zip(again.state["of"][0], network.state["of"][0], strict=True):
        assert torch.equal(ours, theirs) and ours is not theirs


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(16, 16)), nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.linear(x, self.weight))


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_resolving_a_weight_leaves_the_modes_of_what_lies_below(norm: Callable[[nn.Module], nn.Module]) -> None:
    network = nn.Sequential(norm(Normed()))
    network.train()[0].norm.eval()
    with torch.no_grad():
        wanted = copy.deepcopy(network).eval()[0].weight
    bitfront.resolve(network)
    assert network[0].training and not network[0].norm.training
    assert torch.equal(network[0].weight, wanted)  # no step of a power iteration was taken


def test_stored_numbers_keep_their_type_when_the_network_changes_its_own(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(16, 16))
    model = bitfront.quantize(network, RTN(bits=8, **ALL))
    before = model.encode()["0.weight"].decode()
    model.bfloat16()
    assert model.network[0].weight.dtype == torch.bfloat16
    assert torch.equal(model.encode()["0.weight"].decode(), before)
    model.save(tmp_path / "net")
    loaded = bitfront.load(tmp_path / "net", into=nn.Sequential(nn.Linear(16, 16)).bfloat16())
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(model(x), loaded(x))


def test_complex_parameters_stay_as_they_are(tmp_path: Path) -> None:
    class Filter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.filter = nn.Linear(16, 16), nn.Parameter(torch.randn(9, dtype=torch.cfloat))

        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.irfft(torch.fft.rfft(self.linear(x)) * self.filter, 16)

    network, x = Filter(), torch.randn(8, 16)
    model = bitfront.quantize(network, GPTQ(**ALL), [x])
    model.save(tmp_path / "net")
    assert "float, complex numbers: 1 tensors, 72 bytes" in model.summary()
    with torch.no_grad():
        assert torch.equal(bitfront.load(tmp_path / "net", into=Filter())(x), model(x))
        network.filter[3] = complex(1, float("nan"))
    with pytest.raises(BitfrontError, match="'filter' holds NaN"):
        bitfront.quantize(network, RTN(**ALL))


class Parts(nn.Module):
    """Computes a part by modules, by functions, or by methods of modules; again in the backward, if it is told so."""

    def __init__(self, kind: str, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.kind, self.reentrant = nn.Linear(16, 16), nn.Linear(16, 16), kind, reentrant

    def inner(self, x: Tensor) -> Tensor:
        if self.kind == "functions":
            return F.linear(torch.tanh(F.linear(x, self.first.weight)), self.second.weight)
        if self.kind == "methods":
            return self.second.forward(torch.tanh(self.first.forward(x)))
        return self.second(torch.tanh(self.first(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if self.reentrant is None else checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["modules", "functions", "methods"])
def test_recomputation_is_refused_within_a_model_and_right_around_it(kind: str, reentrant: bool) -> None:
    """Within, it would see the float weights, and gradients would be wrong without a word."""
    x = torch.randn(8, 16, requires_grad=True)
    with pytest.raises(BitfrontError, match="activation checkpointing"):
        bitfront.prepare(Parts(kind, reentrant), STE(bits=2, **ALL)).train()(x)
    gradients = []
    for around in (False, True):
        model = bitfront.prepare(Parts(kind, None), DiffQ(**ALL)).train()
        torch.manual_seed(1)
        y = checkpoint(model, x, use_reentrant=reentrant) if around else model(x)
        y.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0]["network.first.weight"] is not None
    for name, g in gradients[0].items():
        assert g is gradients[1][name] is None or torch.equal(g, gradients[1][name])


def test_other_uses_of_hooks_on_saved_tensors_are_right() -> None:
    model, x = bitfront.prepare(Parts("modules", None), STE(bits=2, **ALL)).train(), torch.randn(8, 16)
    with torch.autograd.graph.save_on_cpu():
        model(x).sum().backward()
    with torch.autograd.graph.save_on_cpu():  # are on again
        torch.tanh(x.requires_grad_()).sum().backward()


class Listed(nn.Module):
    """Reaches a weight past its module, in training."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.kept = [self.linear.weight]

    def forward(self, x: Tensor) -> Tensor:
        assert self.kept[0].shape == (16, 16) and self.kept[0].detach().norm() > 0  # a look is no use
        return F.linear(x, self.kept[0]) if self.training else self.linear(x)


def test_a_weight_that_is_reached_past_its_module_is_refused() -> None:
    model, x = bitfront.prepare(Listed(), LSQ(**ALL)), torch.randn(8, 16)
    model.eval()(x)  # a look at validation data comes first
    with pytest.raises(BitfrontError, match=r"'linear\.weight' from a list"):
        model.train()(x)


@pytest.mark.parametrize("write", [lambda w: w.detach().mul_(0.5), lambda w: setattr(w, "data", 0.5 * w.data)])
def test_a_forward_that_writes_to_a_weight_is_refused(write: Callable[[Tensor], Any]) -> None:
    class Momentum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.online, self.target = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                write(self.target.weight)
            return self.online(x) - self.target(x).detach()

    x = torch.randn(8, 16)
    with pytest.raises(BitfrontError, match=r"writes to 'target\.weight'"):
        bitfront.prepare(Momentum(), STE(**ALL)).train()(x)
    bitfront.prepare(Momentum(), STE(min_size=0.0, exclude=["bias", "target.*"])).train()(x)


def test_transforms_of_functions_go_through_a_prepared_model() -> None:
    model = bitfront.prepare(nn.Linear(16, 3), STE(bits=2, **ALL)).train()
    found = torch.func.vmap(torch.func.jacrev(model))(torch.randn(5, 16))
    assert torch.equal(found, model.encode()["weight"].decode().expand(5, 3, 16))


def test_a_prepared_network_is_itself_again_without_the_model() -> None:
    network = Parts("modules", True)
    bitfront.prepare(network, LSQ(**ALL))
    assert not any(module._forward_pre_hooks for module in network.modules())
    network.train()(torch.randn(8, 16, requires_grad=True)).sum().backward()


def test_a_quantizer_may_leave_the_weight_as_it_is() -> None:
    class Later(bitfront.Quantizer):
        def surrogate(self, w: Tensor) -> Tensor:
            return w

    network = nn.Linear(16, 16)
    model = bitfront.QuantizedModel(network, {"weight": Later()}).train()
    model(torch.randn(8, 16)).sum().backward()
    assert network.weight.grad is not None


def test_evaluation_takes_the_same_path_each_time() -> None:
    """Stock attention's fast path leaves zeros at padded positions, and a mode of torch functions switches it off."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    model = bitfront.prepare(encoder, STE(**ALL)).eval()
    mask = torch.arange(5) >= torch.tensor([3, 5])[:, None]
    with torch.no_grad():
        first, second = (model(torch.ones(2, 5, 16), src_key_padding_mask=mask) for _ in range(2))
    assert torch.equal(first, second)


def test_scripts_are_refused_where_their_weights_are_quantized_and_left_alone_elsewhere() -> None:
    network = nn.Sequential(torch.jit.script(nn.Linear(16, 16)), nn.Linear(16, 16))
    for quantized in (lambda: bitfront.quantize(network, RTN(**ALL)), lambda: bitfront.prepare(network, STE(**ALL))):
        with pytest.raises(BitfrontError, match="'0' is a TorchScript"):
            quantized()
    network = nn.Sequential(nn.Linear(16, 16), torch.jit.script(nn.Tanh()), nn.Linear(16, 16))
    model = bitfront.quantize(network, GPTQ(**ALL), [torch.randn(8, 16)])
    assert all(entry["inputs"] == 8 for entry in model.log["layers"])


Pair = namedtuple("Pair", "x y")


class Cache:
    def __init__(self) -> None:
        self.keys = [{"k": torch.zeros(2)}]


class Movable:
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: Any) -> Movable:
        return Movable(self.x.to(device))


def test_batches_of_any_make_are_moved_and_copied_to_the_networks_device() -> None:
    x = torch.zeros(2, 16)
    places: list[Any] = []

    class Looks(nn.Linear):
        def forward(self, batch: Any) -> Tensor:
            named, ordered, objects, packed = batch
            for t in (named.x, named.y[0], ordered["a"], objects[0].x, packed.data):
                places.append(t.device.type)
            return super().forward(named.x)

    packed = nn.utils.rnn.pack_sequence([torch.zeros(3, 2), torch.zeros(1, 2)])
    batch = (Pair(x, [x]), OrderedDict(a=x), [Movable(x)], packed)
    bitfront.library.call(Looks(16, 16, device="meta"), (batch,))
    assert places == ["meta"] * 5 and x.device.type == "cpu"
    assert copied(packed, "meta").data.device.type == "meta" and torch.equal(copied(packed).data, packed.data)
    assert copied(Cache(), "meta").keys[0]["k"].device.type == "meta"


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        ({"x": torch.zeros(4, 16), "class weights": torch.ones(1000)}, 4),
        (torch.zeros(3), 3),
        ([{"text": "a", "x": torch.zeros(5)}], 5),
        ("a", 1),
        (type("Graphs", (), {"num_graphs": 7, "x": torch.zeros(90)})(), 7),
        (type("Sized", (), {"batch_size": 6})(), 6),
    ],
)
def test_samples_of_a_batch(batch: Any, samples: int) -> None:
    drawn = bitfront.library.drawn((batch for _ in range(100)), 10 * samples, 1)
    assert len(drawn) == 10


def test_options_that_need_a_task_are_refused_by_the_library() -> None:
    network = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))
    for option, more in (("reestimate_bn", {}), ("distill", {"sft": True})):
        with pytest.raises(BitfrontError, match=option):
            bitfront.quantize(network, GPTQ(**{option: True}, **more, **ALL), [torch.randn(8, 16)])
        with pytest.raises(BitfrontError, match=option):
            bitfront.prepare(network, LSQ(**{option: True}, **ALL))
    with pytest.raises(BitfrontError, match="no module 'nope' to take as a block"):
        bitfront.quantize(network, GPTQ(**ALL), [torch.randn(8, 16)], blocks=["nope"])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor, project: nn.Module | None = None) -> Tensor:
        if x.shape[1] != 16:
            raise ValueError
        x = torch.tanh(self.linear(x))
        return x if project is None else project(x)


class Foreign(nn.Module):
    """A block is called with a layer that it does not own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.project = nn.ModuleList([Block(), Block()]), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x), self.project)


class Conditional(nn.Module):
    """The quantized network may call a block on other batches than the float network does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.calls = nn.ModuleList([Block(), Block()]), 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        return self.layers[1](x) if x.mean() > 0 else x


class Masked(nn.Module):
    """Blocks hand on a mask of minus infinity beside what they compute."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Block()

        def forward(self, both: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return self.inner(both[0]), both[1]

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(Masked.Layer(), Masked.Layer())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers((x, torch.full((8, 8), -torch.inf).triu(1)))[0]


@pytest.mark.parametrize("kind", [Foreign, Conditional, Masked])
def test_blocks_of_any_kind_are_tuned(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    data = [torch.randn(2, 16) for _ in range(40)]
    network = kind().eval()
    untuned, tuned = (bitfront.quantize(network, DecoupleQ(bits=1, J=n, patience=9, **ALL), data) for n in (0, 8))
    found = [(b["held_out"], b["best_epoch"]) for b in tuned.log["blocks"] if "held_out" in b]
    assert len(found) == 2 and all(torch.isfinite(torch.tensor(held)).all() for held, _ in found)
    assert all(held[best] <= held[0] for held, best in found) and any(best for _, best in found)
    with torch.no_grad():
        errors = [sum((model(x) - network(x)).square().sum().item() for x in data) for model in (untuned, tuned)]
    assert errors[1] < errors[0]


def test_a_block_that_raises_what_the_network_catches_is_left_again() -> None:
    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = nn.ModuleList([Block(), Block()]), nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            try:
                x = self.layers[0](x[:, :3])
            except ValueError:
                x = self.layers[1](x)
            return F.linear(x, self.head)

    model = bitfront.quantize(Catches(), GPTQ(**ALL), [torch.randn(8, 16)])
    blocks = {entry["name"]: entry["block"] for entry in model.log["layers"]}
    assert blocks["head"] == "" and blocks["layers.1.linear.weight"] == "layers.1"


def test_layers_that_are_called_norms_and_hold_matrices_are_no_norms() -> None:
    class NormedLinear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))

    class ScaleNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(16))

    found = bitfront.quant.engine.blockwise.norm_parameters(
        nn.ModuleDict({"a": NormedLinear(16, 4, bias=False), "b": ScaleNorm(), "c": nn.LayerNorm((4, 4))})
    )
    assert {name for name, _ in found} == {"b.scale", "c.weight", "c.bias"}


def test_options_of_functional_layers_come_in_any_form() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.w, self.v = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.conv2d(x, self.w, None, [2, 2], [1]).movedim(1, -1), self.v)

    class Layers(Functional):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.w, None, 2, 1).movedim(1, -1) @ self.v

    data = [torch.randn(2, 3, 8, 8)]
    found, wanted = (
        bitfront.quantize(kind(), GPTQ(bits=2, include=["v"], **ALL), data) for kind in (Functional, Layers)
    )
    assert torch.equal(found.encode()["w"].codes, wanted.encode()["w"].codes)
    assert "v (linear)" in found.summary() and "v (matmul)" in wanted.summary()
