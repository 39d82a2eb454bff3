"""Layers that make up for the errors of those before them: what they are solved for is what they give in the float
network."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import Experts
from torch import Tensor, nn

import bitfront
from bitfront.errors import BitfrontError
from bitfront.quant.engine.plan import Calibration
from bitfront.quant.layers.inputs import Moments
from bitfront.quant.methods.decoupleq import DecoupleQ
from bitfront.quant.methods.gptq import GPTQ
from bitfront.quant.methods.rtn import RTN


def run(network: nn.Module, batch: Tensor) -> Tensor:
    return network(batch)


def outputs(network: nn.Module, data: Calibration) -> Tensor:
    with torch.no_grad():
        return torch.cat([network(batch) for batch in data.batches])


def test_the_weight_that_is_wanted_gives_the_float_outputs_by_least_squares() -> None:
    """Against ridge regression of the float outputs on the inputs; a share of the way for a share."""
    there = torch.randn(2, 500, 12, dtype=torch.float64)
    x = there @ torch.randn(12, 12).double() * 0.3 + 0.2 * torch.randn_like(there) + 0.5
    H, drift = x.mT @ x / 500, (there - x).mT @ x / 500
    w = torch.randn(10, 12)
    seen = Moments(H, 500, drift=drift)
    ridge = 0.02 * H.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(12)
    for entry, (own, rows) in enumerate(zip(x, w.double().split(5), strict=True)):
        least = torch.linalg.solve(H[entry] + ridge[entry], (own.mT @ there[entry] / 500 + ridge[entry]) @ rows.mT)
        for share in (0.0, 0.3, 1.0):
            got = seen.wanted(w, share, 0.02).split(5)[entry]
            torch.testing.assert_close(got, (rows + share * (least.mT - rows)).float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(Moments(H, 500).wanted(w, 1.0, 0.02), w)


@pytest.mark.parametrize("form", ["linear", "conv", "grouped", "transposed"])
def test_a_fine_layer_undoes_what_a_coarse_one_before_it_has_done(form: str) -> None:
    """A second layer that sees all channels can undo any linear error of the first; one that sees some, a part."""
    torch.manual_seed(0)
    second: dict[str, Any] = {
        "linear": lambda: nn.Linear(12, 12, bias=False),
        "conv": lambda: nn.Conv1d(12, 12, 3, bias=False),
        "grouped": lambda: nn.Conv1d(12, 12, 3, groups=3, bias=False),
        "transposed": lambda: nn.ConvTranspose1d(12, 12, 3, stride=2, bias=False),
    }
    first = nn.Linear(12, 12, bias=False) if form == "linear" else nn.Conv1d(12, 12, 1, bias=False)
    shape = (64, 12) if form == "linear" else (8, 12, 20)
    data = Calibration([torch.randn(shape) for _ in range(8)], run)
    network = nn.Sequential(nn.Sequential(first, second[form]())).eval()
    wanted = outputs(network, data)
    errors = {}
    for share in (0.0, 0.5, 1.0):
        method = GPTQ(bits=8, layers={"0.0.weight": {"bits": 2}}, min_size=0.0, propagation=share)
        model = method.attach(copy.deepcopy(network), data).eval()
        errors[share] = (outputs(model, data) - wanted).square().mean().item() / wanted.square().mean().item()
    assert errors[1.0] < 0.95 * errors[0.5] < 0.9 * errors[0.0]
    if form in ("linear", "conv"):
        assert errors[1.0] < 0.03 < errors[0.0]


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.Tanh()) for _ in range(4)
    ]
    return nn.Sequential(*layers).eval()


def data() -> Calibration:
    torch.manual_seed(1)
    mix = torch.randn(16, 16)
    return Calibration([torch.randn(64, 16) @ mix for _ in range(9)], run)


@pytest.mark.parametrize(
    "method",
    [GPTQ, DecoupleQ, lambda **options: DecoupleQ(J=4, **options), lambda **o: DecoupleQ(hessian="block", **o)],
    ids=["gptq", "decoupleq", "tuned", "felt"],
)
def test_errors_add_up_less_also_on_other_data(method: Any) -> None:
    wanted, calibrated = outputs(network(), data()), data()
    new = Calibration([batch.flip(0) + 0.1 * torch.randn_like(batch) for batch in calibrated.batches], run)
    fresh = outputs(network(), new)
    found = {}
    for share in (0.0, 1.0):
        options = {"J": 0} if method is DecoupleQ else {}
        model = method(bits=2, min_size=0.0, propagation=share, **options).attach(network(), data()).eval()
        found[share] = [
            (outputs(model, some) - w).square().mean().item() for some, w in ((calibrated, wanted), (new, fresh))
        ]
        apart = [entry.get("apart") for entry in model.log["layers"]]
        assert apart[0] == (0 if share else None) and all((x or 0) > 0 for x in apart[1:]) == bool(share)
    assert found[1.0][0] < 0.9 * found[0.0][0] and found[1.0][1] < 0.95 * found[0.0][1]


def test_it_is_the_same_handed_on_come_to_anew_and_after_an_interruption(tmp_path: Any) -> None:
    method = DecoupleQ(bits=3, J=0, min_size=0.0, propagation=1.0)

    class Between(nn.Sequential):
        """After each block comes what no block can hand on."""

        def forward(self, x: Tensor) -> Tensor:
            for part in self:
                x = 1.0 * part(x)
            return x

    replayed = Between(*network().children()).eval()
    handed, anew = (method.attach(net, data()).encode() for net in (network(), replayed))
    assert all(torch.equal(p.decode(), anew[name].decode()) for name, p in handed.items())
    for options in ({"states": tmp_path}, {"states": tmp_path}, {"offload": "disk"}):
        kept = bitfront.quantize(network(), method, data().batches, **options).encode()
        assert all(torch.equal(p.decode(), kept[name].decode()) for name, p in handed.items())
        for state in sorted(tmp_path.rglob("*.pt"))[2:]:  # interrupted there, the second time
            state.unlink()


def test_where_samples_choose_their_experts_it_is_left_out_and_told() -> None:
    torch.manual_seed(0)
    model = GPTQ(bits=2, min_size=0.0, propagation=1.0).attach(
        nn.Sequential(Experts()), Calibration([torch.randn(64, 12) for _ in range(4)], run)
    )
    told = {entry["name"]: entry.get("propagation") for entry in model.log["layers"]}
    assert told == {
        "0.before.weight": None,
        "0.gate.weight": None,
        "0.experts.0.weight": "none",
        "0.experts.1.weight": "none",
    }


def test_what_goes_another_way_in_the_float_network_is_not_taken_for_the_same() -> None:
    """Positions that depend on values: as many, but others."""

    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.second(h[(1e3 * h[:, 0]).sin().argsort()])

    torch.manual_seed(0)
    model = GPTQ(bits=2, min_size=0.0, propagation=1.0).attach(
        nn.Sequential(Sorted()), Calibration([torch.randn(64, 12) for _ in range(4)], run)
    )
    assert {e["name"]: e.get("propagation") for e in model.log["layers"]}["0.second.weight"] == "none"


def test_a_method_that_sees_no_inputs_refuses_it() -> None:
    with pytest.raises(BitfrontError, match="propagation"):
        RTN(bits=2, propagation=1.0)
    with pytest.raises(BitfrontError, match="propagation"):
        GPTQ(propagation=1.5)
