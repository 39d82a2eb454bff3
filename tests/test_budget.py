"""Widths for a size: the knapsack against exhaustive search and a bound, and files that stay below what was asked."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import cli
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bitfront
from bitfront import GPTQ, LSQ, RTN, STE, BitfrontError, Calibration, DecoupleQ, DiffQ
from bitfront.cells.record import read_all
from bitfront.quant.engine.budget import Option, allocate
from bitfront.quant.engine.sensitivity import error, gradients, price
from bitfront.quant.engine.sized import _tried, sized
from bitfront.quant.layers.inputs import Moments

MIB = 2**20
EVERY: dict[str, Any] = {"min_size": 0.0005, "exclude": ["bias"]}


def random_options(seed: int, tensors: int) -> list[list[Option]]:
    """Losses that fall by about four per bit, in tensors of any size, with tables of their own."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(tensors):
        weights, weight = int(2 ** rng.uniform(6, 16)), 10 ** rng.uniform(-3, 3)
        found.append([Option(b, weights * b // 8 + 40, weight * 4.0**-b * rng.uniform(0.5, 1.5)) for b in range(1, 9)])
    return found


def total(options: list[Option]) -> tuple[int, float]:
    return sum(o.nbytes for o in options), sum(o.loss for o in options)


@given(seed=st.integers(0, 10**6), tensors=st.integers(1, 5), share=st.floats(0, 1.1))
@settings(max_examples=60, deadline=None)
def test_the_choice_is_that_of_exhaustive_search(seed: int, tensors: int, share: float) -> None:
    options = random_options(seed, tensors)
    smallest, largest = (sum(choose(o.nbytes for o in some) for some in options) for choose in (min, max))
    limit = int(smallest + share * (largest - smallest))
    fitting = [loss for size, loss in map(total, map(list, itertools.product(*options))) if size <= limit]
    chosen = allocate(options, limit)
    assert chosen is not None and total(chosen)[0] <= limit
    assert total(chosen)[1] == pytest.approx(min(fitting), rel=1e-12)
    assert allocate(options, smallest - 1) is None


def bound(options: list[list[Option]], limit: int) -> float:
    """Below every choice that fits: the Lagrangian dual, by search of its multiplier."""

    def dual(log_price: float) -> float:
        price = math.exp(log_price)
        return sum(min(o.loss + price * o.nbytes for o in some) for some in options) - price * limit

    return max(dual(x) for x in np.linspace(-30, 5, 1000))


@pytest.mark.parametrize("tensors", [20, 60, 300])
def test_the_choice_is_close_to_the_bound(tensors: int) -> None:
    for seed in range(2):
        options = random_options(seed, tensors)
        limit = int(sum(o[0].nbytes for o in options) * 2.5)
        chosen = allocate(options, limit)
        assert chosen is not None
        size, loss = total(chosen)
        assert size <= limit and loss <= bound(options, limit) * (1.03 if tensors < 300 else 1.005)


def test_what_is_larger_and_no_better_is_never_chosen() -> None:
    options = [[Option(1, 10, 5.0), Option(2, 20, 6.0), Option(3, 30, 4.0)]]
    assert allocate(options, 25) == [Option(1, 10, 5.0)] and allocate(options, 30) == [Option(3, 30, 4.0)]


class Deep(nn.Module):
    """Layers of very unequal weight: the outputs of most are scaled down."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(8))
        self.gains = [2.0, 0.03, 0.5, 0.02, 1.0, 0.1, 0.03, 0.3]

    def forward(self, x: Tensor) -> Tensor:
        for layer, gain in zip(self.layers, self.gains, strict=True):
            x = x + gain * torch.tanh(layer(x))
        return x


def data(n: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 32, generator=generator) for _ in range(n)]


def wrong(model: nn.Module, network: nn.Module) -> float:
    """Relative power of the error of the outputs, on other data."""
    x = torch.randn(500, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return ((model(x) - network(x)).square().sum() / network(x).square().sum()).item()


@pytest.mark.parametrize("method", [RTN, GPTQ, DecoupleQ])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_at_the_size_of_one_width_mixed_ones_are_better(method: Any, bits: int, tmp_path: Path) -> None:
    network = Deep()
    single = bitfront.quantize(network, method(bits=bits, **EVERY), data())
    size = single.save(tmp_path / "single")
    mixed = bitfront.quantize(network, method(**EVERY), data(), max_size=size / MIB)
    assert 0.97 * size <= mixed.save(tmp_path / "mixed") == (tmp_path / "mixed").stat().st_size <= size
    assert wrong(mixed, network) < 0.6 * wrong(single, network)
    loaded = bitfront.load(tmp_path / "mixed", into=Deep())
    assert torch.equal(loaded(data()[0]), mixed(data()[0]))


@pytest.mark.parametrize("method", [LSQ, STE])
def test_what_trains_starts_from_widths_for_the_size(method: Any, tmp_path: Path) -> None:
    network = Deep()
    model = bitfront.prepare(network, method(**EVERY), data(), max_size=0.0075)
    optimizer = model.optimizer(torch.optim.SGD(network.parameters(), 1e-3))
    for x in data():
        optimizer.zero_grad()
        (model(x).square().mean() + model.penalty()).backward()
        optimizer.step()
    assert 0.97 * 0.0075 * MIB <= model.eval().save(tmp_path / "net") <= 0.0075 * MIB
    assert len({int(packed.bits.max()) for packed in model.encode().values()}) > 1


def steered(network: nn.Module, steps: int, **options: Any) -> tuple[bitfront.QuantizedModel, list[float]]:
    """A network that learns to be what it is, with learned widths; and the bits of its codes after each step."""
    exact = copy.deepcopy(network)
    model = bitfront.prepare(network, DiffQ(lr=0.05, **options, **EVERY), max_size=0.007, steps=steps).train()
    optimizer = model.optimizer(torch.optim.SGD(network.parameters(), 1e-3))
    sizes = []
    for n in range(steps):
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(n))
        optimizer.zero_grad()
        (F.mse_loss(model(x), exact(x)) + model.penalty()).backward()
        optimizer.step()
        sizes.append(sum((q.group_numel * q.widths()).sum().item() for q in model.quantizers))
    return model.eval(), sizes


def test_learned_widths_come_to_a_size_and_know_where_they_are_needed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Deep()
    model, sizes = steered(network, 200)
    start, room = 8 * 8 * 1024, sizes[-1]
    wanted = [start + min(1.0, (n + 1) / 100) * (room - start) for n in range(200)]
    assert sizes == pytest.approx(wanted, rel=1e-4)  # a ramp, then level
    size = model.save(tmp_path / "net")
    assert 0.99 * 0.007 * MIB <= size <= 0.007 * MIB
    bits = [packed.bits.float().mean().item() for packed in model.encode().values()]
    assert np.corrcoef(bits, np.log([gain * gain for gain in network.gains]))[0, 1] > 0.9
    single = bitfront.quantize(Deep(), RTN(bits=math.floor(sum(bits) / 8), group_size=0, **EVERY))
    assert wrong(model, Deep()) < 0.6 * wrong(single, Deep())
    loaded = bitfront.load(tmp_path / "net", into=Deep())
    assert torch.equal(loaded(data()[0]), model(data()[0]))


@pytest.mark.parametrize("done", [60, 200])
def test_a_file_saved_while_training_has_its_size_too(done: int, tmp_path: Path) -> None:
    """Of 200 steps; and is what evaluation mode then sees."""
    torch.manual_seed(0)
    model = bitfront.prepare(Deep(), DiffQ(lr=0.05, **EVERY), max_size=0.007, steps=200).train()
    optimizer = model.optimizer(torch.optim.SGD(model.network.parameters(), 1e-4))
    for n in range(done):
        optimizer.zero_grad()
        model(data()[n % 8]).square().mean().backward()
        optimizer.step()
    assert 0.95 * 0.007 * MIB <= model.save(tmp_path / "net") <= 0.007 * MIB
    loaded = bitfront.load(tmp_path / "net", into=Deep())
    assert torch.equal(loaded(data()[0]), model.eval()(data()[0]))


def test_learned_widths_need_the_length_of_the_training_and_a_size_that_is_possible() -> None:
    model = bitfront.prepare(Deep(), DiffQ(**EVERY), max_size=0.007)
    assert model.penalty() == 0
    model(data()[0]).sum().backward()
    with pytest.raises(BitfrontError, match="steps="):
        model.optimizer(torch.optim.SGD(model.network.parameters(), 1e-3)).step()
    with pytest.raises(BitfrontError, match="with min_bits for all"):
        bitfront.prepare(Deep(), DiffQ(**EVERY), max_size=0.0045, steps=10)
    bitfront.prepare(Deep(), DiffQ(min_bits=1, **EVERY), max_size=0.0045, steps=10).eval()


def test_floats_that_outgrow_their_type_end_no_evaluation(tmp_path: Path) -> None:
    """But the file that would be too large is not written."""
    network = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 32))
    method = DiffQ(raw_dtype="float16", **EVERY)
    least = bitfront.prepare(copy.deepcopy(network), DiffQ(raw_dtype="float16", init_bits=3, **EVERY)).eval()
    for quantizer in least.quantizers:
        quantizer.logits.data.fill_(-20.0)
    model = bitfront.prepare(network, method, max_size=least.save(tmp_path / "least") / MIB, steps=10)
    network[1].running_var.fill_(1e5)
    model.eval()
    with pytest.raises(BitfrontError, match="max_size allows"):
        model.save(tmp_path / "net")


def test_a_single_number_is_a_tensor_too(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(16, 16))
    network.gain = nn.Parameter(torch.tensor(1.5))
    model = bitfront.quantize(network, GPTQ(min_size=0.0, exclude=["bias"]), [torch.randn(8, 16)], max_size=0.004)
    assert model.save(tmp_path / "net") <= 0.004 * MIB


def test_a_size_that_cannot_be_kept_is_told_with_the_smallest(tmp_path: Path) -> None:
    network = Deep()
    smallest = bitfront.quantize(network, RTN(bits=1, **EVERY)).save(tmp_path / "net")
    with pytest.raises(BitfrontError, match=f"the file has {smallest / MIB:.4g} MiB, of which 0.000977 are"):
        bitfront.quantize(network, RTN(**EVERY), data(), max_size=(smallest - 1) / MIB)
    assert bitfront.quantize(network, RTN(**EVERY), data(), max_size=smallest / MIB).save(tmp_path / "net") == smallest
    with pytest.raises(BitfrontError, match="give data"):
        bitfront.quantize(network, RTN(**EVERY), max_size=1)
    with pytest.raises(BitfrontError, match="Float has no widths"):
        bitfront.prepare(network, bitfront.Float(**EVERY), data(), max_size=1)


def test_a_size_is_in_place_of_widths_and_of_a_penalty() -> None:
    with pytest.raises(BitfrontError, match="in place of bits=3"):
        bitfront.quantize(Deep(), RTN(bits=3, **EVERY), data(), max_size=0.009)
    with pytest.raises(BitfrontError, match="in place of penalty=2"):
        bitfront.prepare(Deep(), DiffQ(penalty=2, **EVERY), max_size=0.009, steps=10)


def test_a_size_that_is_not_used_up_is_told() -> None:
    told = "max_size=1 leaves room: all tensors have 8 bits"
    assert told in bitfront.quantize(Deep(), RTN(**EVERY), data(), max_size=1).summary()
    assert told not in bitfront.quantize(Deep(), RTN(**EVERY), data(), max_size=0.009).summary()


def test_what_is_said_about_a_file_counts(tmp_path: Path) -> None:
    model = bitfront.quantize(Deep(), RTN(**EVERY), data(), max_size=0.009)
    size = model.save(tmp_path / "net")
    with pytest.raises(BitfrontError, match="max_size allows"):
        model.save(tmp_path / "other", {"note": "x" * (int(0.009 * MIB) - size + 100)})
    assert not (tmp_path / "other").exists()


def test_widths_that_are_set_stay() -> None:
    method = GPTQ(layers={"layers.[01].weight": {"bits": 7}, "layers.*": {"group_size": 8}}, **EVERY)
    model = bitfront.quantize(Deep(), method, data(), max_size=0.0165)
    packed = model.encode()
    assert [int(packed[f"layers.{n}.weight"].bits) for n in (0, 1)] == [7, 7]
    assert all(p.codes.shape[1] == 8 for p in packed.values())


def test_what_no_output_depends_on_does_not_get_all_and_loses_not_all() -> None:
    """Outputs without gradients, and layers that are not used on these data."""

    class Classes(Deep):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(1)

    class Unused(Classes):
        def forward(self, x: Tensor) -> Tensor:
            return Deep.forward(self, x)

    for network in (Classes(), Unused()):
        widths = bitfront.quantize(network, GPTQ(**EVERY), data(), max_size=0.0095).widths()
        assert len(widths) == 9 and sum(len(w) - 1 for w in widths.values()) / 9 > 2


def test_widths_are_tried_on_a_part_of_the_data() -> None:
    seen, batches = [], [torch.randn(8, 16) for _ in range(60)]
    for n, batch in enumerate(batches):
        batch[0, 0] = n

    def run(net: nn.Module, batch: Tensor) -> Tensor:
        seen.append(int(batch[0, 0]))
        return net(batch)

    network = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    method = GPTQ(min_size=0.0, max_size=0.002)
    for number, part in ((60, 15), (20, 8), (5, 5)):
        seen.clear()
        sized(method, network, Calibration(batches[:number], run))
        assert {*seen} == {*range(part)}


def test_the_price_of_an_error_is_what_the_end_feels() -> None:
    """``y = s Q A x`` with an orthogonal Q: an error dA costs ``s² |dA x|²`` over the power of y."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(24, 16, bias=False), nn.Linear(16, 16, bias=False))
    network[1].weight.data = 3 * torch.linalg.qr(torch.randn(16, 16))[0]
    batches = [torch.randn(50, 24) @ torch.randn(24, 24).tril() for _ in range(60)]
    weights = {"0.weight": network[0].weight}
    felt = gradients(network, weights, Calibration(batches, lambda net, x: net(x)))["0.weight"]
    x = torch.cat(batches).double()
    inputs = Moments((x.T @ x / len(x))[None], len(x))
    w, other = network[0].weight.detach(), network[0].weight.detach() + 0.01 * torch.randn(16, 24)
    found = price(w, felt, inputs) * error(other, w, inputs)
    with torch.no_grad():
        change = [network[1](F.linear(b, other - w)).square().sum() / network(b).square().mean() for b in batches]
    assert found == pytest.approx(sum(change).item(), rel=0.1)
    assert network[1].weight.requires_grad and network[0].weight.grad is None


def test_the_price_by_drawn_labels_is_fishers() -> None:
    """Of logits ``A x`` it is ``sum |x|² (1 - sum p²)``: the gradient is ``(p - drawn) xᵀ``."""
    torch.manual_seed(0)
    network, batches = nn.Linear(12, 5, bias=False), [2 * torch.randn(40, 12) for _ in range(60)]
    network.weight.data *= 3

    def drawn(net: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
        labels = torch.multinomial(net(x).detach().softmax(-1), 1, generator=generator)[:, 0]
        return F.cross_entropy(net(x), labels, reduction="sum")

    data = Calibration(batches, lambda net, x: net(x), loss=drawn)
    found, narrow = (
        gradients(network, {"weight": network.weight}, data, dtype=dtype)["weight"]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert found != narrow == pytest.approx(found, rel=0.02)
    x = torch.cat(batches)
    wanted = x.square().sum(1) @ (1 - network(x).softmax(-1).square().sum(1))
    assert found == pytest.approx(wanted.item(), rel=0.05)


def test_what_is_padding_at_the_end_has_no_price() -> None:
    network, x = nn.Linear(6, 4, bias=False), torch.randn(1, 3, 6)
    x[:, 1:] *= 100
    padded, alone = (
        gradients(network, {"weight": network.weight}, Calibration([batch], lambda net, b: net(b), valid=valid))
        for batch, valid in ((x, lambda _: torch.tensor([1 / 3])), (x[:, :1], lambda _: None))
    )
    assert padded["weight"] == pytest.approx(alone["weight"], rel=1e-5)


SMOKE = ("task=vit", "smoke=true", "wandb=disabled")


def test_a_cell_keeps_its_size(tmp_path: Path) -> None:
    words = (*SMOKE, "quant=rtn,gptq,lsq,ste,diffq", "max_size=0.03", "raw_dtype=float16", f"root={tmp_path}")
    result = cli("run", "-m", *words)
    assert result.returncode == 0, result.stderr
    records = [record for record in read_all(tmp_path) if record.method != "float"]
    assert len(records) == 5
    for record in records:
        limit = record.config["max_size"] * MIB
        assert 0.9 * limit < record.sizes.file <= limit and record.setting == "max_size=0.03 raw_dtype=float16"
    again = cli("run", *SMOKE, "quant=lsq", "max_size=0.03", "raw_dtype=float16", f"root={tmp_path}")
    assert "finished before" in again.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("quant=rtn", "max_size=0.001"), "cannot be kept: at the smallest widths"),
        (("quant=float", "max_size=0.03"), "quant=float has no widths"),
        (("quant=rtn", "max_size=-1"), "max_size"),
        (("quant=rtn", "bits=3", "max_size=0.03"), "max_size is in place of bits; give one"),
        (("quant=diffq", "quant.penalty=5", "max_size=0.03"), "max_size is in place of penalty; give one"),
    ],
)
def test_sizes_that_cannot_be_are_refused(words: tuple[str, ...], told: str, tmp_path: Path) -> None:
    result = cli("run", *SMOKE, *words, f"root={tmp_path}")
    assert result.returncode == 1 and told in result.stderr and "Traceback" not in result.stderr


def test_smaller_groups_are_taken_where_they_pay() -> None:
    """Where a row's parts differ in size, and not where one grid fits all; not against what layers says."""
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(3)))
    network[1].weight.data *= torch.logspace(-1.5, 0, 8).repeat_interleave(32)
    batches = [torch.randn(32, 256) for _ in range(8)]
    layers = {"2.weight": {"group_size": 128}}
    for method in (RTN(**EVERY), RTN(layers=layers, **EVERY), RTN(group_size=128, **EVERY)):
        packed = bitfront.quantize(network, method, batches, max_size=0.1).encode()
        sizes, tables = [p.codes.shape[1] for p in packed.values()], [p.table for p in packed.values()]
        if method.group_size == 128:
            assert set(sizes) == {128}
            continue
        assert sizes[1] < 256 and tables[1] == 6
        assert not method.layers or (sizes[2] == 128 and tables[2] == 0)
    smooth = bitfront.quantize(network[0], DecoupleQ(**EVERY), batches, max_size=0.0256).encode()["weight"]
    assert smooth.codes.shape[1] == 256


def test_what_a_tied_embedding_is_looked_up_for_counts() -> None:
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.between = nn.Embedding(96, 48), nn.Linear(48, 48)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(0.01 * self.between(self.embedding(x)), self.embedding.weight)

    network, tokens = Tied(), [torch.randint(0, 96, (8, 12)) for _ in range(8)]
    data, weights = Calibration(tokens, lambda net, x: net(x)), {"embedding.weight": network.embedding.weight}
    tried = _tried(network, RTN(**EVERY), weights, data)["embedding.weight"]
    x = torch.cat([(0.01 * network.between(network.embedding(t))).flatten(0, 1) for t in tokens]).detach().double()
    seen = Moments((x.T @ x / len(x))[None], len(x))
    w, both = network.embedding.weight.detach(), seen.with_lookup(network.embedding.weight.detach())
    decoded = RTN(bits=3).solve(w, None)[0].decode()
    assert tried.options[2].loss == pytest.approx(error(decoded, w, both), rel=1e-4)
    assert tried.options[2].loss > 1.5 * error(decoded, w, seen)
