"""What weights see, whatever multiplies them: against the Jacobian of the output in the weight, and explicit loops."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import seen_by
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import bitfront
from bitfront import GPTQ, RTN, DecoupleQ
from bitfront.cells import compose
from bitfront.cells.flow import build_method, build_task
from bitfront.quant.engine.calibration import calibrate
from bitfront.quant.engine.plan import Calibration
from bitfront.quant.layers.uses import Form
from bitfront.standalone import load

ALL: dict[str, Any] = {"min_size": 0.0, "exclude": ["*bias*"]}


class Uses(nn.Module):
    """One weight, used as told."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], *shape: int, seed: int = 0) -> None:
        super().__init__()
        self.use, self.weight = use, nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.weight)


def batch(*shape: int, seed: int = 0) -> Tensor:
    """Samples that are correlated along each of their axes."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for axis, n in list(enumerate(shape))[1:]:
        mixing = torch.randn(n, n, generator=torch.Generator().manual_seed(7))
        x = (x.movedim(axis, -1) @ mixing).movedim(-1, axis)
    return x


def convolution(layer: nn.Module) -> tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]:
    """A layer as a function of its weight."""
    layer.bias = None
    return (
        lambda x, w: torch.func.functional_call(layer, {"weight": w}, (x,)),
        tuple(layer.get_parameter("weight").shape),
    )


def of_experts(x: Tensor, w: Tensor, chosen: tuple[int, ...] = (0, 2, 3)) -> Tensor:
    """Each on a part of the samples, by slices."""
    return torch.cat([F.linear(x[e :: len(w)], w[e]) for e in chosen])


OFFSETS = torch.tensor([2, 2, 5, 8], dtype=torch.int32)
PRODUCTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "mm": (lambda x, w: torch.mm(x, w), (12, 8), (8, 6)),
    "matmul": (lambda x, w: x @ w, (3, 5, 8), (8, 6)),
    "addmm": (lambda x, w: torch.addmm(torch.zeros(6), x, w), (12, 8), (8, 6)),
    "T": (lambda x, w: x @ w.T, (3, 5, 8), (6, 8)),
    "mT": (lambda x, w: torch.matmul(x, w.mT), (3, 5, 8), (6, 8)),
    "t": (lambda x, w: x.mm(w.t()), (12, 8), (6, 8)),
    "transpose": (lambda x, w: F.linear(x, w.transpose(0, 1)), (12, 8), (8, 6)),
    "first operand": (lambda x, w: w @ x.mT, (3, 5, 8), (6, 8)),
    "input of linear": (lambda x, w: F.linear(w, x), (12, 8), (6, 8)),
    "expanded": (lambda x, w: torch.bmm(x, w[None].expand(3, -1, -1)), (3, 5, 8), (8, 6)),
    "einsum": (lambda x, w: torch.einsum("bti,oi->bot", x, w), (3, 5, 8), (6, 8)),
    "einsum, implicit": (lambda x, w: torch.einsum("...i,io", x, w), (3, 5, 8), (8, 6)),
    "einsum of heads": (lambda x, w: torch.einsum("bthd,hdo->bto", x.unflatten(2, (2, 4)), w), (3, 5, 8), (2, 4, 6)),
    "matmul, repeated": (lambda x, w: x @ w, (3, 5, 8), (1, 8, 6)),
    "matmul, repeated stack": (lambda x, w: x[:, None] @ w, (3, 5, 8), (1, 2, 8, 6)),
    "einsum, repeated": (lambda x, w: torch.einsum("bti,bio->bto", x, w), (3, 5, 8), (1, 8, 6)),
    "bmm": (lambda x, w: torch.bmm(x, w), (4, 5, 8), (4, 8, 6)),
    "baddbmm": (lambda x, w: torch.baddbmm(torch.zeros(1), x, w), (4, 5, 8), (4, 8, 6)),
    "bmm, transposed": (lambda x, w: torch.bmm(w, x.mT), (4, 5, 8), (4, 6, 8)),
    "einsum of experts": (lambda x, w: torch.einsum("eni,eio->neo", x, w), (4, 5, 8), (4, 8, 6)),
    "all experts": (lambda x, w: x @ w, (12, 8), (4, 8, 6)),
    "experts by slices": (of_experts, (12, 8), (4, 6, 8)),
    "unbound": (lambda x, w: torch.cat([x[n : 3 * n + 1] @ e for n, e in enumerate(w.unbind())]), (12, 8), (4, 8, 6)),
    "grouped": (lambda x, w: F.grouped_mm(x, w, offs=OFFSETS), (8, 8), (4, 8, 16)),
    "grouped, transposed": (lambda x, w: F.grouped_mm(x, w.mT, offs=OFFSETS), (8, 8), (4, 16, 8)),
}
CONVOLUTIONS = {
    str(layer).replace("kernel_size=", "").replace("stride=", ""): (layer, shape)
    for layer, shape in [
        (nn.Conv1d(4, 6, [3], stride=[2], padding=[1], dilation=[2]), (2, 4, 9)),
        (nn.Conv2d(4, 6, [3, 2], stride=[1, 2], padding=[1, 0]), (2, 4, 5, 6)),
        (nn.Conv2d(4, 6, 3), (4, 5, 6)),
        (nn.Conv3d(3, 4, 2), (2, 3, 3, 4, 3)),
        (nn.Conv3d(4, 4, (2, 3, 1), (2, 1, 2), (1, 1, 0), (1, 2, 1), groups=2), (2, 4, 4, 5, 5)),
        (nn.Conv3d(3, 4, 2, padding="same"), (3, 3, 4, 3)),
        (nn.ConvTranspose1d(4, 3, 8, stride=4, padding=2), (2, 4, 6)),
        (nn.ConvTranspose1d(4, 3, 8, stride=3, padding=1, output_padding=2), (2, 4, 6)),
        (nn.ConvTranspose1d(4, 6, 4, stride=2, dilation=2, groups=2), (4, 6)),
        (nn.ConvTranspose1d(4, 8, 4, stride=2, groups=4), (2, 4, 6)),
        (nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1), (2, 4, 3, 4)),
        (nn.ConvTranspose2d(4, 6, (2, 3), (2, 2), (1, 0), (0, 1), groups=2), (2, 4, 3, 4)),
        (nn.ConvTranspose3d(2, 3, 2, (2, 2, 1)), (2, 2, 2, 3, 2)),
    ]
}
KINDS = {
    **{name: (use, x, w) for name, (use, x, w) in PRODUCTS.items()},
    **{name: (use, x, w) for name, (layer, x) in CONVOLUTIONS.items() for use, w in [convolution(layer)]},
}


def gram(use: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor) -> Tensor:
    """Of the Jacobian of the outputs in the weight, ``[values, values]``."""
    J = torch.autograd.functional.jacobian(lambda v: use(x, v), w.detach(), vectorize=True).reshape(-1, w.numel())
    return J.double().T @ J.double()


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kind", KINDS)
def test_second_moments_are_those_of_the_jacobian(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are outputs, and meet nothing of each other: all of ``J^T J`` is ``H``, once for each row."""
    use, shape, size = KINDS[kind]
    x, network = batch(*shape), Uses(use, *size)
    for chunk in (1 << 24, 1):
        monkeypatch.setattr("bitfront.quant.layers.convolutions.CHUNK", chunk)
        found = seen_by(network, "weight", (x,))
        wanted = gram(use, x, network.weight)
        assert wanted.abs().max() > 0
        numbers = found.rows(torch.arange(network.weight.numel()).view(size))
        assembled = torch.zeros_like(wanted)
        for entry, H in zip(numbers, found.H, strict=True):
            assembled[entry[:, :, None], entry[:, None, :]] = H * found.count
        scale = wanted.abs().max().item()
        torch.testing.assert_close(assembled, wanted, rtol=1e-4, atol=2e-6 * scale)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kind", KINDS)
def test_solved_weights_beat_nearest_ones_and_the_loss_is_that_of_the_output(kind: str, tmp_path: Path) -> None:
    """Up to the file: rows in another order come back from it, by our reader and by the one that stands alone."""
    use, shape, size = KINDS[kind]
    data, losses = [batch(*shape, seed=n) for n in range(4)], torch.zeros(3)

    def error(w: Tensor, quantized: Tensor) -> float:
        exact, wrong = (torch.cat([use(x, v).flatten() for x in data]).double() for v in (w, quantized))
        return ((wrong - exact).square().sum() / exact.square().sum()).item()

    for seed in range(4):
        w = Uses(use, *size, seed=seed).weight.detach()
        losses[0] += error(w, RTN(bits=3, group_size=8).solve(w, None)[0].decode())
        for n, method in enumerate((GPTQ(bits=3, group_size=8, **ALL), DecoupleQ(bits=3, group_size=8, J=0, **ALL)), 1):
            model = bitfront.quantize(Uses(use, *size, seed=seed), method, data)
            (entry,), packed = model.log["layers"], model.encode()["weight"]
            assert entry["loss"] == pytest.approx(error(w, packed.decode()), rel=1e-3) and model.log["blind"] == 0
            losses[n] += entry["loss"]
    assert losses[2] < losses[1] < losses[0]
    model.save(tmp_path / "net.safetensors")
    again = bitfront.load(tmp_path / "net.safetensors", into=Uses(use, *size)).weight
    assert torch.equal(again, packed.decode())
    assert torch.equal(load(tmp_path / "net.safetensors")["weight"], packed.decode())


def unrolled(layer: nn.RNNBase, name: str, x: Tensor, lengths: list[int], first: Any) -> Tensor:
    """What a weight of a recurrent layer is multiplied with, by its equations, ``[uses, columns]``."""
    H, directions, found = layer.hidden_size, 1 + layer.bidirectional, dict[str, list[Tensor]]()
    states = first if isinstance(first, tuple) else (first, torch.zeros(len(first), len(x), H))
    for sample, length in enumerate(lengths):
        steps = list(x[sample, :length])
        for n, way in itertools.product(range(layer.num_layers), range(directions)):
            if way == 0:
                outputs: list[list[Tensor]] = [[] for _ in steps]
            own = f"l{n}" + "_reverse" * way
            w = {
                kind: layer.get_parameter(f"{kind}_{own}") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            }
            h, c = (state[n * directions + way, sample] for state in states)
            for t in reversed(range(length)) if way else range(length):
                found.setdefault(f"weight_ih_{own}", []).append(steps[t])
                found.setdefault(f"weight_hh_{own}", []).append(h)
                a, b = w["weight_ih"] @ steps[t] + w["bias_ih"], w["weight_hh"] @ h + w["bias_hh"]
                if layer.mode == "LSTM":
                    i, f, g, o = (a + b).chunk(4)
                    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                    h = o.sigmoid() * c.tanh()
                    h = layer.get_parameter(f"weight_hr_{own}") @ h if layer.proj_size else h
                elif layer.mode == "GRU":
                    (ar, az, an), (br, bz, bn) = a.chunk(3), b.chunk(3)
                    z = (az + bz).sigmoid()
                    h = (1 - z) * (an + (ar + br).sigmoid() * bn).tanh() + z * h
                else:
                    h = (a + b).tanh() if layer.mode == "RNN_TANH" else (a + b).relu()
                outputs[t].append(h)
            if way == directions - 1:
                steps = [torch.cat(parts) for parts in outputs]
    return torch.stack(found[name]).double()


RECURRENT: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": lambda **how: nn.LSTM(5, 4, 2, bidirectional=True, **how),
    "lstm with projections": lambda **how: nn.LSTM(5, 4, 2, proj_size=3, **how),
    "gru": lambda **how: nn.GRU(5, 4, 2, bidirectional=True, **how),
    "rnn": lambda **how: nn.RNN(5, 4, 3, **how),
    "rnn of relu": lambda **how: nn.RNN(5, 4, nonlinearity="relu", bidirectional=True, **how),
}


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("batch_first", [False, True])
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_recurrent_layers_see_their_inputs_and_states(kind: str, packed: bool, batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = RECURRENT[kind](batch_first=batch_first).eval()
    x, lengths = torch.randn(3, 6, 5), [6, 2, 4] if packed else [6, 6, 6]
    sizes = layer.num_layers * (1 + layer.bidirectional), 3
    first: Any = torch.randn(*sizes, layer.proj_size or 4)
    first = (first, torch.randn(*sizes, 4)) if layer.mode == "LSTM" else first
    given: Any = x if batch_first else x.transpose(0, 1)
    given = pack_padded_sequence(given, lengths, batch_first, enforce_sorted=False) if packed else given
    for name, w in layer.named_parameters():
        if w.dim() == 2 and "weight_hr" not in name:
            found, wanted = seen_by(layer, name, (given, first)), unrolled(layer, name, x, lengths, first)
            torch.testing.assert_close(found.H[0], wanted.T @ wanted / len(wanted), rtol=1e-4, atol=1e-5)
            assert found.count == sum(lengths)


@torch.no_grad()
def test_padded_and_packed_sequences_agree_where_padding_is_known() -> None:
    layer, lengths = nn.LSTM(5, 4, batch_first=True).eval(), [6, 2, 4]
    x, mask = torch.randn(3, 6, 5), torch.arange(6) < torch.tensor(lengths)[:, None]
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    for name, valid in itertools.product(("weight_ih_l0", "weight_hh_l0"), (mask, torch.tensor(lengths) / 6)):
        a, b = seen_by(layer, name, (x,), valid=valid), seen_by(layer, name, (packed,), valid=valid)
        torch.testing.assert_close(a.H, b.H, rtol=1e-5, atol=1e-6)
        assert a.count == b.count == sum(lengths)


def test_a_projection_of_an_lstm_stays_unseen_and_is_told() -> None:
    network = nn.Sequential(nn.LSTM(8, 8, proj_size=4, batch_first=True))
    model = bitfront.quantize(network, GPTQ(bits=3, **ALL), [batch(4, 6, 8)])
    unseen = {entry["name"]: entry["unseen"] for entry in model.log["layers"] if "unseen" in entry}
    assert unseen == {"0.weight_hr_l0": ["lstm"]}
    assert model.log["blind"] == pytest.approx(32 / (32 + 256 + 128))


@torch.no_grad()
def test_padding_is_left_out_of_transposed_convolutions() -> None:
    layer, lengths = nn.ConvTranspose1d(4, 3, 4, stride=2, padding=1, bias=False), [5, 3]
    x = torch.zeros(2, 4, 5)
    samples = [torch.randn(1, 4, n) for n in lengths]
    for padded, sample in zip(x, samples, strict=True):
        padded[:, : sample.shape[-1]] = sample[0]
    wanted = seen_by(layer, "weight", *[(sample,) for sample in samples])
    found = seen_by(layer, "weight", (x,), valid=torch.tensor(lengths) / 5)
    torch.testing.assert_close(found.H, wanted.H, rtol=1e-5, atol=1e-6)
    assert found.count == wanted.count


class Mixture(nn.Module):
    """Experts by slices of a stack, one for each batch."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts, self.last = nn.Parameter(torch.randn(4, 16, 16)), nn.Linear(16, 16)
        self.transposed = transposed

    def forward(self, e: int, x: Tensor) -> Tensor:
        return self.last(x @ self.experts[e] if self.transposed else F.linear(x, self.experts[e]))


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_are_seen_over_all_batches_and_idle_ones_told(transposed: bool) -> None:
    data = [(n % 3, batch(20, 16, seed=n)) for n in range(6)]
    network = Mixture(transposed)
    model = bitfront.quantize(network, GPTQ(bits=3, **ALL), data, forward=lambda net, batch: net(*batch))
    entry = next(entry for entry in model.log["layers"] if entry["name"] == "experts")
    assert entry["inputs"] == 40 and entry["unseen"] == ["1 of its 4 entries not used on these data"]
    assert "calibrated on a part of their uses: 1 tensors" in model.summary() and model.log["blind"] == 0
    packed = model.encode()["experts"]
    w, quantized = network.experts.detach(), packed.decode()
    power = [sum(((x @ (v[e] if transposed else v[e].T)) ** 2).sum() for e, x in data) for v in (quantized - w, w)]
    assert entry["loss"] == pytest.approx((power[0] / power[1]).item(), rel=1e-3)
    worst = (quantized[3] - w[3]).square().mean() / w[3].square().mean()
    assert worst < 0.1  # as near as three bits allow
    assert packed.axes == ((0, 2, 1) if transposed else ()) and packed.lo.numel() == 64


def test_rows_that_are_looked_up_count_as_often_as_they_are() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.places = nn.Embedding(20, 8), nn.Parameter(torch.randn(1, 6, 8))
            self.last = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.words(x) + self.places[:, : x.shape[1]])

    network, data = Reader(), [torch.randint(10, (4, 5), generator=torch.Generator().manual_seed(n)) for n in range(3)]
    mask = torch.arange(5) < torch.tensor([5, 3, 2, 5])[:, None]
    method = DecoupleQ(bits=2, J=0, min_size=0.0)
    packed, log = calibrate(network, method, Calibration(data, lambda net, x: net(x), valid=lambda _: mask))
    entries, first = {entry["name"]: entry for entry in log["layers"]}, Reader()
    rows = torch.cat([x[mask] for x in data])
    error = (packed["words.weight"].decode() - first.words.weight)[rows].square().sum()
    assert entries["words.weight"]["inputs"] == len(rows) == 45
    assert entries["words.weight"]["loss"] == pytest.approx((error / first.words.weight[rows].square().sum()).item())
    assert "unseen" not in entries["words.weight"] and log["blind"] == 0
    assert entries["places"]["inputs"] == 3 and 0 < entries["places"]["loss"] < 0.2  # whose values are added
    assert torch.equal(packed["words.weight"].codes, method.solve(first.words.weight.detach(), None)[0].codes)


@pytest.mark.parametrize("table", [0, 6])
@pytest.mark.parametrize("group_size", [-1, 5, 8])
def test_values_of_blocks_in_another_order_are_tuned(table: int, group_size: int, tmp_path: Path) -> None:
    """Through everything that reads a packed tensor: tuning, interrupted states, sizes, the file."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.ConvTranspose1d(8, 6, 4, 2, 1), nn.Conv1d(6, 8, 4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.tanh(self.up(x)))

    torch.manual_seed(0)
    network = nn.Sequential(nn.Sequential(Block(), Block()))
    data = Calibration(
        [0.05 * batch(4, 8, 12, seed=n) for n in range(8)], lambda net, x: net(x), states=tmp_path / "states"
    )
    method = DecoupleQ(bits=3, group_size=group_size, scale_bits=table, J=6, block_lr=0.01, **ALL)
    model = method.attach(nn.Sequential(nn.Sequential(*map(copied, network[0]))), data).eval()
    assert all(block["best_epoch"] > 0 for block in model.log["blocks"] if "held_out" in block)
    again = method.attach(nn.Sequential(nn.Sequential(*map(copied, network[0]))), data).eval()
    size = model.save(tmp_path / "net.safetensors")
    read, alone = bitfront.Artifact.load(tmp_path / "net.safetensors"), load(tmp_path / "net.safetensors")
    for name, packed in model.encode().items():
        assert torch.equal(packed.decode(), again.encode()[name].decode())
        assert torch.equal(packed.decode(), read.packed[name].decode())
        assert torch.equal(packed.decode(), alone[name]) and packed.nbytes == len(packed.to_bytes())
        assert bool(packed.axes) == ("up" in name)
    assert group_size != 8 or any(packed.axes and packed.table for packed in read.packed.values()) == bool(table)
    smaller = GPTQ(max_size=size / 2**20, group_size=group_size, **ALL)
    fitted = bitfront.quantize(network, smaller, data.batches)
    assert fitted.save(tmp_path / "small.safetensors") <= size


def copied(module: nn.Module) -> nn.Module:
    same = type(module)()
    same.load_state_dict(module.state_dict())
    return same


def test_forms_are_as_plain_as_they_can_be() -> None:
    assert Form.of((6, 1, 4), (6, 1, 1, 4), (0, 2, 1, 3)) == Form()
    assert Form.of((6, 5), (6, 5), (1, 0)) == Form((), (1, 0))
    assert Form.of((6, 5, 4), (1, 6, 5, 4, 1), (0, 4, 2, 1, 3)) == Form((6, 5, 4), (1, 0, 2))


TASKS = ("vit", "resnet", "lm", "separation", "separation_musdb", "asr", "asr_wav2vec2", "asr_whisper")


@pytest.mark.parametrize("name", TASKS)
def test_no_weight_of_our_tasks_is_blind(name: str) -> None:
    config = compose.load([f"task={name}", "quant=gptq", "smoke=true", "data_root=/nowhere"])
    task = build_task(config)
    network, method = task.model().eval(), build_method(config)
    assert isinstance(method, GPTQ)
    data = Calibration(task.calibration(2, 2), task.loss, task.blocks(network), task.valid)
    _, log = calibrate(network, method.fitting(network), data)
    assert log["blind"] == 0 and all("loss" in entry and "unseen" not in entry for entry in log["layers"])
