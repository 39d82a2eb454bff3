"""What a block gives is handed to the next one: the same as going through the network anew for each."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from torch import Tensor, nn

from bitfront.quant.engine import calibration, route
from bitfront.quant.engine.calibration import calibrate
from bitfront.quant.engine.plan import Calibration, plan
from bitfront.quant.methods.decoupleq import DecoupleQ
from bitfront.quant.methods.gptq import GPTQ

ALL: dict[str, Any] = {"min_size": 0.0}


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, shift: Tensor | None = None, scale: float = 1.0) -> Tensor:
        x = x + scale * self.down(F.gelu(self.up(self.norm(x))))
        return x if shift is None else x + shift


class Tower(nn.Module):
    """Blocks one after the other, ``between`` which something may happen to what is handed on."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.first, self.layers, self.head = (
            nn.Linear(8, 16),
            nn.ModuleList(Block() for _ in range(depth)),
            nn.Linear(16, 3),
        )

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x, shift = self.first(x), x.mean(-1, keepdim=True)
        for n, layer in enumerate(self.layers):
            x = self.between(layer(x, shift, scale=0.5 if n else 1.0))
        return self.head(x)


class Halved(Tower):
    def between(self, x: Tensor) -> Tensor:
        return x / 2


class Written(Tower):
    """What a block gave is written to."""

    def between(self, x: Tensor) -> Tensor:
        return x.mul_(0.5)


class Stateful(Tower):
    """Each block but the first adds what the one before left in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("left", torch.zeros(()))
        for layer in self.layers:
            layer.register_forward_hook(self._leave)

    def _leave(self, _: nn.Module, args: Any, output: Tensor) -> Tensor:
        result = output + self.left
        self.left.copy_(output.detach().mean() + 1)
        return result


class Skipping(Tower):
    """A batch of few samples does not come to a block."""

    def forward(self, x: Tensor) -> Tensor:
        few, x = len(x) < 3, self.first(x)
        for n, layer in enumerate(self.layers):
            x = x if few and n == 1 else layer(x)
        return self.head(x)


class Twice(Tower):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in (*self.layers, self.layers[1]):
            x = layer(x)
        return self.head(x)


def batches(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 5, 8, generator=generator) for n in sizes or (4, 4, 2)]


def linked(network: nn.Module, data: Calibration) -> list[str]:
    weights = {name: p for name, p in network.named_parameters() if p.dim() > 1}
    return [unit.block for unit in plan(network.eval(), weights, data) if unit.link]


def run(net: nn.Module, x: Any) -> Any:
    return net(x)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Tower, ["layers.1", "layers.2", "layers.3", "head"]),
        (Halved, []),
        (Written, []),
        (Stateful, ["layers.1"]),  # what follows depends on more than arguments
        (Skipping, ["layers.0", "layers.3", "head"]),
        (Twice, ["layers.0", "layers.3"]),  # not the head, whose input comes of the block that is called twice
    ],
)
def test_blocks_are_linked_where_inputs_come_of_the_block_before(kind: Any, expected: list[str]) -> None:
    torch.manual_seed(0)
    assert linked(kind(), Calibration(batches(), run)) == expected


def llama() -> tuple[nn.Module, list[Any]]:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    )
    tokens = [torch.randint(50, (2, n), generator=torch.Generator().manual_seed(n)) for n in (6, 6, 9)]
    masks = [torch.ones_like(t) for t in tokens]
    masks[1][0, 4:] = 0
    return transformers.LlamaForCausalLM(config), [
        {"input_ids": t, "attention_mask": m} for t, m in zip(tokens, masks, strict=True)
    ]


def t5() -> tuple[nn.Module, list[Any]]:
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2, decoder_start_token_id=0
    )
    tokens = [torch.randint(50, (2, n), generator=torch.Generator().manual_seed(n)) for n in (6, 8)]
    return transformers.T5ForConditionalGeneration(config), [
        {"input_ids": t, "decoder_input_ids": t[:, 1:], "use_cache": False} for t in tokens
    ]


def named(net: nn.Module, batch: Any) -> Any:
    return net(**{"use_cache": False, **batch})


def test_networks_of_transformers_are_linked() -> None:
    torch.manual_seed(0)
    network, data = llama()
    assert linked(network, Calibration(data, named)) == ["model.layers.1", "model.layers.2"]
    network, data = t5()
    found = linked(network, Calibration(data, named))
    assert found == [f"{part}.block.{n}" for part in ("encoder", "decoder") for n in (1, 2)]


@pytest.mark.parametrize("kind", ["tower", "stateful", "skipping", "llama", "t5"])
@pytest.mark.parametrize("options", [{"J": 0}, {"J": 2}, {"J": 2, "target": "block"}], ids=str)
def test_the_codes_are_those_of_going_through_the_network_for_each_block(
    kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def made() -> tuple[nn.Module, Calibration]:
        torch.manual_seed(0)
        if kind in ("llama", "t5"):
            network, data = llama() if kind == "llama" else t5()
            return network, Calibration(data, named)
        return {"tower": Tower, "stateful": Stateful, "skipping": Skipping}[kind](), Calibration(batches(), run)

    method = DecoupleQ(bits=2, held_out=0.4, **options, **ALL)
    ours, _ = calibrate(*made()[:1], method, made()[1])

    def unlinked(*args: Any) -> Any:
        units = plan(*args)
        for unit in units:
            unit.link = None
        return units

    monkeypatch.setattr(calibration, "plan", unlinked)
    anew, _ = calibrate(*made()[:1], method, made()[1])
    for name, packed in anew.items():
        for field in ("codes", "lo", "span"):
            assert torch.equal(getattr(ours[name], field), getattr(packed, field)), (name, field)


@pytest.mark.parametrize("options", [{"J": 0}, {"J": 1, "held_out": 0.4}], ids=str)
def test_the_network_is_gone_through_once_for_the_linked_blocks(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However deep it is: for the plan, and to the first layer and the first block."""

    def forwards(depth: int) -> int:
        torch.manual_seed(0)
        network, seen = Tower(depth), Counter[str]()
        network.register_forward_pre_hook(lambda *_: seen.update(["network"]))
        calibrate(network, DecoupleQ(bits=2, **options, **ALL), Calibration(batches(), run))
        return seen["network"]

    assert forwards(3) == forwards(6) <= 1 + 3 * (3 + bool(options["J"]))


def test_the_float_network_is_kept_only_where_a_way_through_it_is_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    monkeypatch.setattr(
        route.Exact, "keep", lambda self, unit, real=route.Exact.keep: (real(self, unit), kept.append(len(self.kept)))
    )
    for kind, some in ((Tower, False), (Halved, True)):
        kept.clear()
        torch.manual_seed(0)
        method = DecoupleQ(bits=2, J=1, held_out=0.4, exclude=["first*"], **ALL)
        calibrate(kind(), method, Calibration(batches(), run))
        assert bool(kept) == some
    assert calibrate(Tower(), GPTQ(bits=2, **ALL), Calibration(batches(), run))


def test_a_forward_for_moments_ends_with_the_last_use_of_the_weight() -> None:
    """Of a weight that each call uses as often; one that only some calls use twice is waited for."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.again(self.first(x))
            return self.last(self.again(x) if len(x) > 2 else x)

    network = nn.Sequential(Block(), Block())
    data = Calibration([torch.randn(n, 4) for n in (2, 3)], lambda net, x: net(x))
    unit = plan(network, dict(network.named_parameters()), data)[0]
    assert unit.uses["0.first.weight"] == unit.uses["0.last.weight"] == 1
    assert unit.uses["0.again.weight"] == 0
    calls = Counter[str]()
    for name, layer in network[0].named_children():
        layer.register_forward_hook(lambda *_, name=name: calls.update([name]))
    calibrate(network, GPTQ(min_size=0), data)
    assert calls["first"] == calls["last"] + len(data.batches)  # those for `last`, which end there
