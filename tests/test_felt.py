"""How much what a layer sees counts: squared gradients of the block's output, or of the network's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Experts
from torch import Tensor, nn

from bitfront.errors import BitfrontError
from bitfront.quant.engine import calibration
from bitfront.quant.engine.calibration import felt_at_the_end
from bitfront.quant.engine.plan import Calibration
from bitfront.quant.layers.felt import FLOOR, Felt, Sums, felt, felt_outputs, probe
from bitfront.quant.layers.inputs import Watch
from bitfront.quant.methods.decoupleq import DecoupleQ
from bitfront.quant.methods.gptq import GPTQ

PROBES = 3000


def felt_by(network: nn.Module, name: str, x: Any, probes: int = 1, valid: Tensor | None = None) -> Felt:
    """Of the uses of a weight, in as many batches, all the same."""
    found: list[Tensor] = []
    hook = network.register_forward_hook(lambda _module, _args, output: found.append(output))

    generator = torch.Generator().manual_seed(0)

    def run() -> Tensor:
        found.clear()
        network(x)
        return probe(found, generator)

    weights = {name: network.get_parameter(name)}
    result = felt(weights, ((n, valid, run) for n in range(probes)))
    hook.remove()
    return result


def exactly(rest: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """What an error of each value of a layer's output costs, for the layers after it."""
    jacobian = torch.func.jacrev(rest)(z).reshape(-1, *z.shape)
    return jacobian.square().sum(0) / rest(z).square().mean()


LAYERS: dict[str, tuple[nn.Sequential, tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "linear": (
        nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)),
        (2, 4, 5),
        lambda power: power.mean(-1).reshape(1, -1),
    ),
    "conv1d": (
        nn.Sequential(nn.Conv1d(4, 6, 3, stride=2, groups=2), nn.ReLU(inplace=True), nn.Conv1d(6, 2, 2)),
        (2, 4, 9),
        lambda power: power.unflatten(1, (2, 3)).mean(2).transpose(0, 1).flatten(1),
    ),
    "conv2d": (
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Sigmoid(), nn.AvgPool2d(2), nn.Conv2d(4, 2, 1)),
        (2, 2, 4, 4),
        lambda power: power.mean(1).reshape(1, -1),
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_it_is_the_mean_over_rows_of_what_an_error_costs_the_output(kind: str) -> None:
    torch.manual_seed(0)
    network, shape, mean_of_rows = LAYERS[kind]
    x = torch.randn(shape)
    wanted = mean_of_rows(exactly(lambda z: copy.deepcopy(network)[1:](z.clone()), network[0](x).detach()))
    found = torch.stack([uses[0] for uses in felt_by(network, "0.weight", x, PROBES)["0.weight"].values()])
    error = found.std(0) / PROBES**0.5
    assert ((found.mean(0) - wanted).abs() < 5 * error + 1e-6).all()
    assert wanted.amax() > 1.2 * wanted.amin()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight"])
def test_stock_attention_shows_it_of_its_projections(name: str, batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=batch_first)
    x = torch.randn(3, 5, 8)
    counts, valid = torch.tensor([5, 2, 4]), torch.tensor([1.0, 0.4, 0.8])
    x = x if batch_first else x.transpose(0, 1)
    every, some = (felt_by(layer, name, x, valid=v)[name][0][0] for v in (None, valid))
    assert every.shape == (1, 15) and some.shape == (1, int(counts.sum()))
    assert set(some.flatten().tolist()) <= set(every.flatten().tolist()) and (every > 0).all()


def test_the_weighted_moments_are_those_of_inputs_that_count_more() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 3), [torch.randn(2, 5, 4), torch.randn(6, 4)]
    counts = [torch.rand(1, 10), torch.rand(1, 6)]
    sums = Sums("w", torch.device("cpu"), None, {n: [count] for n, count in enumerate(counts)})
    for n, batch in enumerate(x):
        sums.begin(n, None)
        with Watch({"w": layer.weight}, sums.add):
            layer(batch)
    moments, as_felt = sums.moments()
    rows, count = torch.cat([b.reshape(-1, 4) for b in x]).double(), torch.cat(counts, 1)[0].double()
    alike, weighted = rows.T @ rows / 16, rows.T @ (count[:, None] * rows)
    wanted = FLOOR * alike + (1 - FLOOR) * weighted * alike.trace() / weighted.trace()
    assert as_felt and moments.count == 16
    torch.testing.assert_close(moments.H[0], wanted, rtol=1e-5, atol=1e-6)


def test_moments_are_plain_where_a_use_is_not_felt() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("oi,bi->ob", self.inner.weight, x).T + self.inner(x)

    network, x = Twice(), torch.randn(6, 4)
    found = felt_by(network, "inner.weight", x)
    sums = Sums("inner.weight", torch.device("cpu"), None, found["inner.weight"])
    sums.begin(0, None)
    with Watch({"inner.weight": network.inner.weight}, sums.add):
        network(x)
    moments, as_felt = sums.moments()
    assert not as_felt and moments.count == 12
    torch.testing.assert_close(moments.H[0], (x.T @ x / 6).double())


class Masked(nn.Module):
    """A block that makes use of few of the positions of its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        kept = (x[..., :1] > 1).float()
        return self.second(torch.tanh(self.first(x)) * kept)


def test_what_the_block_gives_is_closer_where_little_of_what_a_layer_sees_matters() -> None:
    def error(hessian: str, seed: int) -> float:
        torch.manual_seed(seed)
        network = nn.Sequential(Masked(), nn.Sequential(nn.Linear(16, 16)))
        x = [torch.randn(64, 16) @ torch.randn(16, 16) / 4 for _ in range(8)]
        wanted = [network(batch).detach() for batch in x]
        data = Calibration(x, lambda net, batch: net(batch))
        model = GPTQ(bits=2, min_size=0.0, hessian=hessian).attach(network, data).eval()
        assert not any(layer.get("hessian") for layer in model.log["layers"])
        return sum((model(batch) - w).square().mean().item() for batch, w in zip(x, wanted, strict=True))

    assert sum(error("block", seed) for seed in range(5)) < 0.95 * sum(error("inputs", seed) for seed in range(5))


def test_parameters_keep_no_gradient_and_the_network_stays_as_it_was() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    before = copy.deepcopy(network.state_dict())
    felt_by(network, "0.weight", torch.randn(3, 4))
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())


def test_padding_of_the_output_is_not_felt() -> None:
    def error(valid: Callable[[Any], Tensor | None]) -> list[Tensor]:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        network = nn.Sequential(nn.Sequential(layer)).eval()
        x = [torch.randn(4, 6, 8) for _ in range(3)]
        for batch in x:
            batch[:, 4:] *= 100.0  # what only padded steps give
        model = GPTQ(bits=2, min_size=0.0, hessian="block").attach(
            network, Calibration(x, lambda net, batch: net(batch), valid=valid)
        )
        return [packed.codes for packed in model.encode().values()]

    share, mask = torch.full((4,), 4 / 6), torch.arange(6).expand(4, 6) < 4
    by_share, by_mask = error(lambda _: share), error(lambda _: mask)
    assert all(torch.equal(a, b) for a, b in zip(by_share, by_mask, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(by_share, error(lambda _: None), strict=True))


def test_a_forward_without_gradients_says_that_inputs_count_alike() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x)))

    def codes(hessian: str) -> tuple[list[Tensor], list[Any]]:
        torch.manual_seed(0)
        data = Calibration([torch.randn(20, 6)], lambda net, batch: net(batch))
        model = GPTQ(bits=2, min_size=0.0, hessian=hessian).attach(nn.Sequential(Fixed()), data)
        return [packed.codes for packed in model.encode().values()], model.log["layers"]

    (felt_codes, layers), (plain, _) = codes("block"), codes("inputs")
    assert all(layer["hessian"] == "inputs" for layer in layers)
    assert all(torch.equal(a, b) for a, b in zip(felt_codes, plain, strict=True))


def test_a_weight_that_is_the_first_operand_counts_its_inputs_alike() -> None:
    class Prototypes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.inner = nn.Parameter(torch.randn(48, 16)), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.w, self.inner(x)).T

    for n in (30, 48, 100):
        data = Calibration([torch.randn(n, 16)], lambda net, batch: net(batch))
        model = GPTQ(bits=2, min_size=0.0, hessian="block").attach(nn.Sequential(Prototypes()), data)
        assert {layer["name"]: layer.get("hessian") for layer in model.log["layers"]}["0.w"] == "inputs"


def test_gradients_that_are_not_finite_and_outputs_without_power_are_left_out() -> None:
    class Block(nn.Module):
        def __init__(self, odd: Callable[[Tensor], Any]) -> None:
            super().__init__()
            self.first, self.second, self.odd = nn.Linear(6, 6, bias=False), nn.Linear(6, 6), odd

        def forward(self, x: Tensor) -> Any:
            return self.odd(self.first(x))

    def guarded(h: Tensor) -> Tensor:
        norm = h.square().sum(-1, keepdim=True)
        return torch.where(norm > 0, h / norm.sqrt(), torch.zeros_like(h))

    x = torch.randn(8, 6)
    x[3] = 0
    data = Calibration([x], lambda net, batch: net(batch))
    for odd, told in ((guarded, "inputs"), (lambda h: (h, h.square() - h.detach().square()), None)):
        model = GPTQ(bits=2, min_size=0.0, hessian="block", exclude=["*second*"]).attach(
            nn.Sequential(Block(odd)), data
        )
        assert [layer.get("hessian") for layer in model.log["layers"]] == [told]


def test_a_router_that_sends_other_samples_after_quantization_is_no_trouble() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        data = Calibration([torch.randn(64, 12) for _ in range(2)], lambda net, batch: net(batch))
        model = GPTQ(bits=2, min_size=0.0, hessian="block").attach(nn.Sequential(Experts()), data)
        assert len(model.log["layers"]) == 4


def drawn(net: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
    """A loss with labels drawn from what a classifier says."""
    logits = net(x)
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    return nn.functional.cross_entropy(logits, labels, reduction="sum")


def test_with_drawn_labels_it_is_what_an_error_costs_the_answers() -> None:
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)), torch.randn(7, 5)
    data = Calibration([x] * PROBES, lambda net, batch: net(batch), loss=drawn)
    found = felt_at_the_end(network, {"0.weight": network.get_parameter("0.weight")}, data)["0.weight"]
    s = torch.stack([uses[0][0] for uses in found.values() if uses[0] is not None])  # [probes, 7]
    p, jacobian = network(x).softmax(-1).detach(), []
    for z in network[0](x).detach():
        jacobian.append(torch.func.jacrev(network[1:])(z))
    fisher = [(j.T @ (torch.diag(q) - q[:, None] * q) @ j).diagonal().mean() for j, q in zip(jacobian, p, strict=True)]
    error = s.std(0) / PROBES**0.5
    assert ((s.mean(0) - torch.stack(fisher)).abs() < 5 * error).all()


def test_answers_are_closer_where_the_end_says_what_matters() -> None:
    def errors(hessian: str, seed: int, **more: Any) -> Tensor:
        """Relative entropy, and squared error, of the answers."""
        torch.manual_seed(seed)
        network = nn.Sequential(Masked(), nn.Sequential(nn.Linear(16, 16), nn.Tanh()), nn.Linear(16, 8))
        x = [2 * torch.randn(512, 16) @ torch.randn(16, 16) / 4 for _ in range(8)]
        wanted = torch.cat([network(batch).detach() for batch in x])
        data = Calibration(x, lambda net, batch: net(batch), **more)
        model = GPTQ(bits=2, min_size=0.0, hessian=hessian).attach(network, data).eval()
        assert not any(layer.get("hessian") for layer in model.log["layers"])
        got = torch.cat([model(batch) for batch in x]).detach()
        p, q = (answers.log_softmax(-1) for answers in (wanted, got))
        return torch.stack([(p.exp() * (p - q)).sum(), (wanted - got).square().sum()])

    plain, labels, signs = (
        sum(errors(hessian, seed, **more) for seed in range(12))
        for hessian, more in (("inputs", {}), ("fisher", {"loss": drawn}), ("fisher", {}))
    )
    assert labels[0] < 0.96 * plain[0] and signs[1] < 0.96 * plain[1]


def test_the_end_of_a_network_is_felt_again_when_an_interrupted_calibration_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(3)])

    x = [torch.randn(16, 8) for _ in range(3)]
    method = GPTQ(bits=2, min_size=0.0, hessian="fisher")
    data = Calibration(x, lambda net, batch: net(batch), states=tmp_path)
    whole = method.attach(network(), data).encode()
    next(tmp_path.glob("*/0002.pt")).unlink()
    again = method.attach(network(), Calibration(x, lambda net, batch: net(batch), states=tmp_path)).encode()
    assert all(torch.equal(again[name].codes, packed.codes) for name, packed in whole.items())
    with monkeypatch.context() as patch:  # all of it is there
        patch.setattr(calibration, "felt_at_the_end", None)
        method.attach(network(), Calibration(x, lambda net, batch: net(batch), states=tmp_path))
    for asking in (method, GPTQ(bits=2, min_size=0.0, J=1, block_loss="fisher")):
        with pytest.raises(BitfrontError, match=r"fisher needs gradients of the whole network.*leave offload out"):
            asking.attach(network(), Calibration(x, lambda net, batch: net(batch), offload="cpu"))
    with pytest.raises(BitfrontError, match="block_loss=fisher is of the block-wise stage; give J"):
        GPTQ(bits=2, block_loss="fisher")


def test_padding_at_the_end_of_the_network_is_not_felt() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    lengths = torch.tensor([6, 2])
    x, here = torch.randn(2, 6, 4), torch.arange(6) < lengths[:, None]
    weights = {"0.weight": network.get_parameter("0.weight")}

    def felt_with(valid: Callable[[Any], Tensor | None]) -> Tensor:
        data = Calibration([x], lambda net, batch: net(batch), valid=valid)
        (use,) = felt_at_the_end(network, weights, data)["0.weight"][0]
        assert use is not None
        return use

    padded = felt_with(lambda _: here)
    alone = torch.cat([x[0], x[1, :2]])
    data = Calibration([alone], lambda net, batch: net(batch))
    (wanted,) = felt_at_the_end(network, weights, data)["0.weight"][0]
    assert padded.shape == wanted.shape == (1, 8) and (padded > 0).all()  # type: ignore[union-attr]


def test_states_of_another_loss_are_not_taken(tmp_path: Path) -> None:
    def codes(folder: Path, **more: Any) -> list[Tensor]:
        torch.manual_seed(0)
        network = nn.Sequential(Masked(), nn.Linear(16, 8))
        data = Calibration([torch.randn(64, 16)], lambda net, batch: net(batch), states=folder, **more)
        found = GPTQ(bits=2, min_size=0.0, hessian="fisher").attach(network, data).encode()
        return [packed.codes for packed in found.values()]

    codes(tmp_path / "a")
    taken, fresh = (codes(tmp_path / name, loss=drawn) for name in "ab")
    assert all(torch.equal(a, b) for a, b in zip(taken, fresh, strict=True))
    assert len(list((tmp_path / "a").iterdir())) == 2


def test_what_cannot_be_felt_is_said() -> None:
    class Over(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.sigmoid(self.first(x))
            h += 1  # which the gradient of the sigmoid needs as it was
            return self.second(h)

    data = Calibration([torch.randn(20, 6)], lambda net, batch: net(batch))
    for method, without in (
        (GPTQ(bits=2, min_size=0.0, hessian="block"), "hessian=inputs"),
        (GPTQ(bits=2, min_size=0.0, hessian="fisher"), "hessian=inputs"),
        (GPTQ(bits=2, min_size=0.0, J=1, block_loss="fisher"), "block_loss=squared"),
    ):
        with pytest.raises(BitfrontError, match=f"no gradients.*give {without}"):
            method.attach(nn.Sequential(Over(), Over()), data)
    with pytest.raises(BitfrontError, match=r"no gradients.*give J=0"):
        GPTQ(bits=2, min_size=0.0, J=1).attach(nn.Sequential(Over()), data)


def test_a_block_that_gives_more_in_one_call_than_in_another_is_not_tuned() -> None:
    class More(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return y if len(x) > 3 else (y, y)

    data = Calibration([torch.randn(n, 6) for n in (5, 2)], lambda net, batch: net(batch))
    network = nn.Sequential(More(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)))
    with pytest.raises(BitfrontError, match=r"1 tensors in one call and 2 in another; give J=0, moving=0"):
        DecoupleQ(min_size=0.0, J=1).attach(network, data)
    DecoupleQ(min_size=0.0, J=0).attach(network, data)


def test_what_a_block_gives_counts_by_its_squared_gradient() -> None:
    torch.manual_seed(0)
    network, x = (
        nn.Sequential(nn.Linear(5, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 3))),
        [torch.randn(4, 5) for _ in "ab"],
    )
    z = [network[0](batch).detach().requires_grad_() for batch in x]
    grads = [torch.autograd.grad(network[1](one).square().sum(), one)[0] for one in z]
    mean = torch.cat(grads).square().mean()

    def passes() -> Any:
        yield from ((n, None, lambda batch=batch: network(batch).square().sum()) for n, batch in enumerate(x))

    found = felt_outputs({"0": network[0]}, passes())["0"]
    assert found.keys() == {(0, 0), (1, 0)}
    for n, grad in enumerate(grads):
        (counts,) = found[n, 0]
        assert counts is not None
        torch.testing.assert_close(counts.float(), (1 - FLOOR) * grad.square() / mean + FLOOR, rtol=0.03, atol=0.01)
    assert not network[0]._forward_hooks and all(p.grad is None for p in network.parameters())


class Shared(nn.Module):
    """With a block that is called twice, and whose output is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        once = self.inner(x)
        once += 1
        return self.inner(once)


def test_outputs_of_every_call_count_and_none_where_a_gradient_is_missing() -> None:
    torch.manual_seed(0)
    network, x = Shared(), torch.randn(3, 4)

    def counts(of: Callable[[Tensor], Tensor]) -> Any:
        return felt_outputs({"inner": network.inner}, [(0, None, lambda: of(network(x)))])

    assert counts(lambda y: y.sum())["inner"].keys() == {(0, 0), (0, 1)}
    assert counts(lambda y: y.sum() * torch.inf) == {}
    assert counts(lambda y: y.sum() * 0) == {}
    assert counts(lambda y: y.detach().sum()) == {}


def test_a_block_is_tuned_for_what_the_end_feels() -> None:
    """Of what the first block gives, the rest of the network takes two features of eight."""

    def error(loss: str, seed: int) -> float:
        torch.manual_seed(seed)
        first = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        network = nn.Sequential(first, nn.Linear(8, 4))
        with torch.no_grad():
            network[1].weight[:, 2:] = 0
        x = [torch.randn(64, 8) for _ in range(8)]
        wanted = [network(batch).detach() for batch in x]
        method = DecoupleQ(bits=2, min_size=0.0, exclude=["1.*"], moving=8, block_lr=0.01, J=0, block_loss=loss)
        model = method.attach(network, Calibration(x, lambda net, batch: net(batch))).eval()
        return sum((model(batch) - w).square().mean().item() for batch, w in zip(x, wanted, strict=True))

    assert sum(error("fisher", seed) for seed in range(4)) < 0.8 * sum(error("squared", seed) for seed in range(4))


def test_passes_to_other_outputs_say_nothing_of_a_block_and_that_is_told() -> None:
    """As of a decoder whose drawn answer is longer than the sample."""

    def longer(network: nn.Module, batch: Tensor, generator: torch.Generator) -> Tensor:
        return network(torch.cat([batch, batch])).square().sum()

    def block(**more: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), nn.Linear(6, 2))
        data = Calibration([torch.randn(20, 6)], lambda net, batch: net(batch), **more)
        method = GPTQ(bits=2, min_size=0.0, J=1, block_loss="fisher")
        return method.attach(network, data).log["blocks"][0]

    assert block(loss=longer)["block_loss"] == "squared" and "block_loss" not in block()
