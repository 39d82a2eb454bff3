"""Two processes that calibrate one network, each with a part of the data: what one process finds with all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import torchrun
from torch import Tensor, distributed, nn

import bitfront
from bitfront import GPTQ, GSQ, RTN, BitfrontError, DecoupleQ

ALL: dict[str, Any] = {"min_size": 0.0, "exclude": ["bias", "norm.weight"]}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(12, 16), nn.LayerNorm(12), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(torch.tanh(self.up(x))))


class Routed(nn.Module):
    """Inputs without a first value do not come to the last block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.out = nn.ModuleList([Block(), Block(), Block()]), nn.Linear(12, 4)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for block in self.blocks[: 3 if x[..., 0].any() else 2]:
            x = block(x)
        return self.out(x)


def network() -> nn.Module:
    torch.manual_seed(0)
    return Routed()


def sequences(samples: int, rare: bool = False) -> dict[str, Tensor]:
    """Padded ones, as many values of which do not count as the samples have it."""
    x, lengths = torch.randn(samples, 6, 12), torch.arange(samples) % 5 + 2
    x[..., 0] *= rare
    return {"x": x, "attention_mask": (torch.arange(6) < lengths[:, None]).long()}


def batches() -> list[list[dict[str, Tensor]]]:
    """Of each process: an unlike number of batches, of unlike sizes, of which one alone reaches the last block."""
    torch.manual_seed(1)
    return [[sequences(n) for n in (8, 16, 24)], [*(sequences(n) for n in (24, 8)), sequences(8), sequences(24, True)]]


def merged() -> list[dict[str, Tensor]]:
    """The same for one process: the n-th batches are parts of one."""
    both = batches()
    parts = [[own[n] for own in both if n < len(own)] for n in range(4)]
    return [{key: torch.cat([part[key] for part in some]) for key in some[0]} for some in parts]


def whole() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(64, 6, 12)


METHODS: dict[str, Callable[[], bitfront.PostTraining]] = {
    "gptq": lambda: GPTQ(bits=3, **ALL),
    "tuned": lambda: DecoupleQ(bits=2, J=2, held_out=0.3, **ALL),
    "errors made up for": lambda: DecoupleQ(bits=2, propagation=1.0, J=0, **ALL),
    "codes that move": lambda: DecoupleQ(bits=2, moving=8, held_out=0.0, **ALL),
    "soft codes": lambda: GSQ(moving=8, held_out=0.0, **ALL),
    "exact in blocks": lambda: GPTQ(bits=2, J=2, target="block", **ALL),
    "rounded, then tuned": lambda: RTN(bits=2, J=1, **ALL),
}


def told(model: bitfront.QuantizedModel) -> dict[str, Any]:
    tuned = [entry for block in model.log["blocks"] for entry in (block.get("moving", {}), block)]
    return {
        "codes": {name: packed.codes.tolist() for name, packed in model.encode().items()},
        "values": {name: packed.decode() for name, packed in model.encode().items()},
        "norms": {name: p.detach() for name, p in model.network.named_parameters() if "norm" in name},
        "inputs": {entry["name"]: entry["inputs"] for entry in model.log["layers"]},
        "held_out": [x for entry in tuned for x in entry.get("held_out", ())],
        "best": [entry.get("best_epoch") for entry in tuned],
    }


def sizes() -> bitfront.QuantizedModel:
    data = whole()
    data = data[distributed.get_rank() :: 2] if distributed.is_initialized() else data
    return bitfront.quantize(network(), GPTQ(batch_size=16, **ALL), data, max_size=0.006)


def error(call: Callable[[], Any]) -> str:
    with pytest.raises((BitfrontError, ArithmeticError)) as found:
        call()
    return str(found.value)


def failing(rank: int) -> dict[str, str]:
    """What a process says where something is wrong with the second alone."""
    calls, bad, alone = [0], whole()[rank::2], network()
    if rank == 1:
        bad[3] = torch.nan
        nn.init.zeros_(alone.out.weight)

    def forward(net: nn.Module, batch: Any) -> Any:
        calls[0] += 1
        if rank == 1 and calls[0] == 5:
            raise ArithmeticError("the fifth")
        return net(batch)

    tuned, good = METHODS["tuned"](), whole()[rank::2]
    return {
        "not finite": error(lambda: bitfront.quantize(network(), tuned, bad)),
        "raises": error(lambda: bitfront.quantize(network(), tuned, good, forward=forward)),
        "shapes": error(lambda: bitfront.quantize(network(), tuned, good[..., : 12 - rank])),
        "no data": error(lambda: bitfront.quantize(network(), tuned, good[:0])),
        "unlike": error(lambda: bitfront.quantize(alone, tuned, good)),
    }


def resumed(folder: Path) -> list[Any]:
    """Twice the same call, with a folder of states that the other process does not see."""
    own = batches()[distributed.get_rank()]
    models = [bitfront.quantize(network(), METHODS["tuned"](), own, states=folder) for _ in range(2)]
    return [(told(model), [block["seconds"] for block in model.log["blocks"]]) for model in models]


def work(folder: Path) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    found = {name: told(bitfront.quantize(network(), make(), batches()[rank])) for name, make in METHODS.items()}
    alone = told(bitfront.quantize(network(), RTN(bits=3, **ALL))) if rank == 0 else None  # no data, no others
    every = {
        "models": found,
        "sizes": told(sizes()),
        "errors": failing(rank),
        "resumed": resumed(folder / str(rank) / "states"),
        "alone": alone,
    }
    torch.save(every, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("both")
    torchrun(folder, work, folder)
    assert (folder / "0" / "states").exists() and not (folder / "1" / "states").exists()
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """But for the rounding of sums."""
    assert a["codes"] == b["codes"] and a["inputs"] == b["inputs"] and a["best"] == b["best"]
    assert a["held_out"] == pytest.approx(b["held_out"], rel=1e-4)
    for key in ("values", "norms"):
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_parts_of_the_data_give_what_all_of_them_give(name: str, both: list[dict[str, Any]]) -> None:
    ours, other = (one["models"][name] for one in both)
    assert ours["codes"] == other["codes"] and ours["held_out"] == other["held_out"]
    assert all(torch.equal(t, other["values"][key]) for key, t in ours["values"].items())
    same(ours, told(bitfront.quantize(network(), METHODS[name](), merged())))


def test_widths_for_a_size_are_chosen_together(both: list[dict[str, Any]]) -> None:
    ours, other = (one["sizes"] for one in both)
    assert ours["codes"] == other["codes"] and ours["inputs"] == other["inputs"]
    assert ours["inputs"] == told(sizes())["inputs"]  # of all samples; widths also depend on random signs


def test_an_error_of_one_process_ends_all(both: list[dict[str, Any]]) -> None:
    ours, theirs = (one["errors"] for one in both)
    assert "NaN" in ours["not finite"] and ours["not finite"] == theirs["not finite"]
    assert theirs["raises"] == "the fifth" and ours["raises"] == "process 1: ArithmeticError: the fifth"
    assert ours["shapes"] == f"process 1: {theirs['shapes']}" and "[16, 6, 11]" in ours["shapes"]
    assert ours["no data"] == theirs["no data"] and "needs calibration data" in ours["no data"]
    assert ours["unlike"] == theirs["unlike"] and "same weights" in ours["unlike"]


def test_an_interrupted_calibration_goes_on_in_all(both: list[dict[str, Any]]) -> None:
    seconds = both[0]["resumed"][0][1]
    for (first, _), (second, again) in (one["resumed"] for one in both):
        assert first["codes"] == second["codes"] == both[0]["models"]["tuned"]["codes"]
        assert again == seconds  # of the first call: nothing was measured anew


def test_what_needs_no_data_needs_no_other_process(both: list[dict[str, Any]]) -> None:
    assert both[0]["alone"]["codes"] == told(bitfront.quantize(network(), RTN(bits=3, **ALL)))["codes"]
