"""Networks whose blocks stay elsewhere: the same codes bit for bit, one block at a time on the device."""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import bitfront
from bitfront.errors import BitfrontError
from bitfront.quant.engine import calibration
from bitfront.quant.engine.plan import blocks
from bitfront.quant.engine.route import Route
from bitfront.quant.forwards.offload import Offload, mapped


@pytest.fixture
def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(vocab_size=40, num_hidden_layers=3, tie_word_embeddings=True, **sizes)
    return transformers.LlamaForCausalLM(config).eval()


def tokens() -> list[torch.Tensor]:
    return [torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(n)) for n in range(5)]


@pytest.mark.parametrize("J", [0, 2])
@pytest.mark.parametrize("target", ["network", "block"])
def test_what_comes_out_does_not_depend_on_where_a_network_stays(
    llama: transformers.LlamaForCausalLM, tmp_path: Path, J: int, target: str
) -> None:
    method = bitfront.DecoupleQ(bits=2, J=J, target=target, min_size=0)
    states = {place: bitfront.quantize(llama, method, tokens(), offload=place) for place in ("", "cpu", "disk")}
    plain = states[""].state_dict()
    for place in ("cpu", "disk"):
        other = states[place].state_dict()
        assert plain.keys() == other.keys()
        assert all(torch.equal(t, other[name]) for name, t in plain.items()), place
    size = states["disk"].save(tmp_path / "net.safetensors")
    assert size == states[""].save(tmp_path / "plain.safetensors")


def test_on_disk_all_blocks_are_files_that_nobody_sees(llama: transformers.LlamaForCausalLM, tmp_path: Path) -> None:
    method = bitfront.GPTQ(bits=3, min_size=0)
    model = bitfront.quantize(llama, method, tokens(), offload="disk", states=tmp_path, inplace=True)
    assert model.network is llama
    assert all(p.untyped_storage().filename for layer in llama.model.layers for p in layer.parameters())
    assert not list(tmp_path.rglob(".bitfront*"))


def test_a_forward_has_one_block_on_the_device_at_a_time(llama: transformers.LlamaForCausalLM) -> None:
    modules = {name: llama.get_submodule(name) for name in blocks(llama)}
    rest = Offload(llama, modules, torch.device("cpu"), "cpu")
    seen: dict[str, set[nn.Parameter]] = {}
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: seen.update({name: set(+rest.wanted)}))
    with rest.streamed():
        llama(tokens()[0])
    assert {name: parameters for name, parameters in seen.items() if parameters} == {
        name: set(module.parameters()) for name, module in modules.items() if [*module.parameters()]
    }
    assert not +rest.wanted
    assert not rest.kept


class Skips(nn.Module):
    """Blocks that hand on through containers, are called with a tensor twice, and write to it; a tied output."""

    class Block(nn.Module):
        def __init__(self, pops: bool) -> None:
            super().__init__()
            self.a, self.b, self.pops = nn.Linear(8, 8), nn.Linear(8, 8), pops

        def forward(self, x: Tensor, same: Tensor, skips: list[Tensor], state: dict[str, Tensor]) -> Tensor:
            y = self.a(x) + (skips.pop() if self.pops else state.get("m", 0 * x))
            if not self.pops:
                skips.append(y)
                state["m"] = y.mean() * x
            x.mul_(0.5)
            return self.b(torch.relu(y)) + same

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList([self.Block(False), self.Block(False), self.Block(True), self.Block(True)])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        skips: list[Tensor] = []
        state: dict[str, Tensor] = {}
        for block in self.blocks:
            x = x.clone()
            x = block(x, x, skips, state)
        return nn.functional.linear(x, self.embedding.weight)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_blocks_may_write_to_what_they_are_called_with(place: str) -> None:
    torch.manual_seed(0)
    network = Skips().eval()
    data = [torch.randint(20, (3, 5)) for _ in range(4)]
    found = [
        bitfront.quantize(network, bitfront.GPTQ(bits=2, min_size=0), data, offload=where).state_dict()
        for where in ("", place)
    ]
    assert all(torch.equal(t, found[1][name]) for name, t in found[0].items())


def test_what_is_used_outside_of_its_block_is_brought() -> None:
    network = Skips().eval()
    rest = Offload(network, {name: network.get_submodule(name) for name in blocks(network)}, torch.device("cpu"), "cpu")

    class Away(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert not [x for x in args if isinstance(x, Tensor) and x in rest.away and x not in rest.kept]
            return func(*args, **(kwargs or {}))

    with rest.streamed():
        with Away(), pytest.raises(AssertionError):
            network(torch.arange(4)[None])
        with Away(), rest.reaching():
            network(torch.arange(4)[None])
    assert not rest.kept
    assert not rest.wanted


def test_tuning_leaves_nothing_behind(llama: transformers.LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in the place of a block's parameters in each step is none of what is to be brought."""
    ends: list[int] = []
    quantize_block = calibration.quantize_block

    def counted(here: Route, *more: Any) -> Any:
        state = quantize_block(here, *more)
        ends.append(len(here.rest.wanted) + len(here.rest.kept))
        return state

    monkeypatch.setattr(calibration, "quantize_block", counted)
    bitfront.quantize(llama, bitfront.DecoupleQ(bits=2, J=2, min_size=0), tokens(), offload="cpu")
    assert ends
    assert not any(ends)


def test_an_interruption_leaves_the_network_on_the_cpu(llama: transformers.LlamaForCausalLM) -> None:
    rest = Offload(llama, {"model.layers.0": llama.model.layers[0]}, torch.device("cpu"), "cpu")
    with suppress(KeyboardInterrupt), rest.streamed():
        rest._entered(llama.model.layers[0], (), {})
        raise KeyboardInterrupt
    assert not rest.kept
    assert not llama.model.layers[0]._forward_pre_hooks


def test_an_error_in_a_block_leaves_the_network_as_it_was(llama: transformers.LlamaForCausalLM) -> None:
    before = copy.deepcopy(llama.state_dict())

    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    llama.model.layers[1].mlp.register_forward_pre_hook(broken)
    with pytest.raises(BitfrontError, match="broken"):
        bitfront.quantize(llama, bitfront.GPTQ(min_size=0), tokens(), offload="cpu", inplace=True)
    assert all(torch.equal(t, before[name]) for name, t in llama.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.bool, torch.int64])
def test_a_mapped_tensor_is_the_same_and_can_be_written_to(dtype: torch.dtype) -> None:
    x = torch.arange(24).remainder(3).to(dtype).view(2, 3, 4).transpose(0, 2)
    y = mapped(x)
    assert y.dtype == x.dtype
    assert torch.equal(x, y)
    y[0] = 0
    assert not y[0].any()


def test_a_disk_without_room_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(BitfrontError, match="No space left"):
        mapped(torch.zeros(3), tmp_path)
    assert not [*tmp_path.iterdir()]


def test_unknown_places_and_networks_elsewhere_are_refused(llama: transformers.LlamaForCausalLM) -> None:
    with pytest.raises(BitfrontError, match="offload"):
        bitfront.quantize(llama, bitfront.GPTQ(min_size=0), tokens(), offload="tape")
    with pytest.raises(BitfrontError, match="CPU"):
        bitfront.quantize(llama.to("meta"), bitfront.GPTQ(min_size=0), tokens(), offload="cpu", inplace=True)
