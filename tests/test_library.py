"""The library as its user meets it: README's examples, and networks of the world outside, with every method."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import torchvision
import transformers
from conftest import REPOSITORY
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bitfront
from bitfront import GPTQ, LSQ, RTN, STE, BitfrontError, DecoupleQ, DiffQ, Float
from bitfront.quant.log import UNTUNED

SMALL: dict[str, Any] = {"min_size": 0.001}
CALIBRATED = {"rtn": RTN(bits=4, **SMALL), "gptq": GPTQ(bits=4, **SMALL), "decoupleq": DecoupleQ(bits=2, J=1, **SMALL)}
TRAINED = {
    "diffq": DiffQ(penalty=5, **SMALL),
    "lsq": LSQ(bits=4, **SMALL),
    "ste": STE(bits=4, **SMALL),
    "float": Float(),
}


def rows(n: int, *shape: int) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(50, 32), nn.LSTM(32, 32, batch_first=True, bidirectional=True)
        self.tags = nn.Linear(64, 7)

    def forward(self, words: Tensor) -> Tensor:
        return self.tags(self.lstm(self.embedding(words))[0])


class UNet(nn.Module):
    """Of one dimension, with transposed convolutions and skips."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv1d(c, 2 * c, 4, 2, 1) for c in (8, 16)])
        self.up = nn.ModuleList([nn.ConvTranspose1d(4 * c, c, 4, 2, 1) for c in (16, 8)])
        self.first, self.middle, self.last = nn.Conv1d(1, 8, 3, 1, 1), nn.Conv1d(32, 32, 1), nn.Conv1d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.first(x), []
        for layer in self.down:
            x = torch.relu(layer(x))
            skips.append(x)
        x = self.middle(x)
        for layer in self.up:
            x = torch.relu(layer(torch.cat([x, skips.pop()], 1)))
        return self.last(x)


def encoder() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3
    )
    return transformers.BertForSequenceClassification(config)


def decoder() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, tie_word_embeddings=True, attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def tokens(n: int) -> list[dict[str, Tensor]]:
    ids = torch.randint(0, 60, (n, 8, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) < torch.tensor([9, 9, 5, 9, 7, 9, 2, 9])[:, None]).long()
    return [{"input_ids": x, "attention_mask": mask, "labels": x[:, 0] % 3} for x in ids]


def following(n: int) -> list[dict[str, Tensor]]:
    return [batch | {"labels": batch["input_ids"]} for batch in tokens(n)]


def convnet() -> nn.Module:
    return torchvision.models.shufflenet_v2_x0_5(num_classes=5)


def classified(n: int) -> list[Any]:
    return [(rows(4, 3, 32, 32) + k, torch.arange(4) % 5) for k in range(n)]


def tagged(n: int) -> list[Any]:
    words = torch.randint(0, 50, (n, 8, 9), generator=torch.Generator().manual_seed(0))
    return [(x, x % 7) for x in words]


Loss = Callable[[Any, Any], Tensor]  # of a network and a batch
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], list[Any]], Loss]] = {
    "encoder": (encoder, tokens, lambda net, batch: net(**batch).loss),
    "decoder": (decoder, following, lambda net, batch: net(**batch).loss),
    "tagger": (Tagger, tagged, lambda net, batch: F.cross_entropy(net(batch[0]).flatten(0, 1), batch[1].flatten())),
    "unet": (UNet, lambda n: [rows(4, 1, 32) * k for k in range(1, n + 1)], lambda net, x: F.mse_loss(net(x), 0.5 * x)),
    "convnet": (convnet, classified, lambda net, batch: F.cross_entropy(net(batch[0]), batch[1])),
}


def outputs(net: Any, batch: Any) -> Tensor:
    """Of a network in evaluation mode, with all that is around it as the user has it."""
    with torch.no_grad():
        if isinstance(batch, dict):
            return net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return net(batch[0] if isinstance(batch, tuple) else batch)


@cache
def start(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name][0]().eval()


def fresh(name: str) -> nn.Module:
    return NETWORKS[name][0]().eval()  # other numbers


def in_a_plain_loop(model: bitfront.QuantizedModel, name: str) -> None:
    _, data, loss = NETWORKS[name]
    optimizer = model.optimizer(torch.optim.AdamW(model.network.parameters(), 1e-3))
    model.train()
    for batch in data(4):
        optimizer.zero_grad()
        (loss(model, batch) + model.penalty()).backward()
        nn.utils.clip_grad_norm_(model.network.parameters(), 1.0)
        optimizer.step()
    model.eval()


class Module(pl.LightningModule):
    def __init__(self, model: bitfront.QuantizedModel, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def training_step(self, batch: Any, _: int) -> Tensor:
        return self.loss(self.model, batch) + self.model.penalty()

    def configure_optimizers(self) -> Any:
        optimizer = self.model.optimizer(torch.optim.AdamW(self.model.network.parameters(), 1e-3))
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def under_lightning(model: bitfront.QuantizedModel, name: str) -> None:
    _, data, loss = NETWORKS[name]
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", gradient_clip_val=1.0, accumulate_grad_batches=2, **dict.fromkeys(quiet, False)
    )
    trainer.fit(Module(model.train(), loss), DataLoader(data(4), batch_size=None))
    model.eval()


def check_stored(model: bitfront.QuantizedModel, name: str, path: Path) -> None:
    """The file holds what the model computes, and says how large it is."""
    batch = NETWORKS[name][1](1)[0]
    size = model.save(path)
    again = bitfront.load(path, into=fresh(name))
    assert torch.equal(outputs(again, batch), outputs(model, batch)) and size == path.stat().st_size
    assert f"file: {size:,} bytes" in model.summary()


@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.parametrize("name", NETWORKS)
def test_any_network_is_quantized_after_training(name: str, method: str, tmp_path: Path) -> None:
    network, data = start(name), NETWORKS[name][1](4)
    before = copy.deepcopy(network.state_dict())
    model = bitfront.quantize(network, CALIBRATED[method], data)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert set(model.names) == set(bitfront.prepare(fresh(name), LSQ(**SMALL)).names) and len(model.names) >= 3
    check_stored(model, name, tmp_path / "net.safetensors")
    exact, found = outputs(network, data[0]), outputs(model, data[0])
    assert 0 < (found - exact).square().sum() < (0.8 if method == "decoupleq" else 0.2) * exact.square().sum()


@pytest.mark.parametrize("loop", [in_a_plain_loop, under_lightning])
@pytest.mark.parametrize("method", TRAINED)
@pytest.mark.parametrize("name", NETWORKS)
def test_any_network_is_trained(name: str, method: str, loop: Callable[..., None], tmp_path: Path) -> None:
    network = copy.deepcopy(start(name))
    model = bitfront.prepare(network, TRAINED[method])
    learned = {key: p.detach().clone() for key, p in model.named_parameters()}
    loop(model, name)
    still = {key for key, p in model.named_parameters() if torch.equal(p, learned[key])}
    assert not {key for key in still if key.startswith("quantizers.")}
    assert len(still) < 0.2 * len(learned)
    check_stored(model, name, tmp_path / "net.safetensors")


def test_a_decoder_gets_the_same_codes_with_and_without_its_cache() -> None:
    data = [{"input_ids": batch["input_ids"]} for batch in tokens(4)]

    def found(use_cache: bool) -> dict[str, Tensor]:
        model = bitfront.quantize(
            start("decoder"), GPTQ(bits=3, **SMALL), data, forward=lambda net, b: net(**b, use_cache=use_cache)
        )
        assert len(model.log["layers"]) == 15 and all(entry["loss"] > 0 for entry in model.log["layers"])
        return {name: packed.codes for name, packed in model.encode().items()}

    cached, plain = found(True), found(False)
    assert all(torch.equal(cached[name], plain[name]) for name in plain)


def test_a_block_wise_stage_without_blocks_is_said() -> None:
    data, method = [torch.randn(8, 16) for _ in range(2)], DecoupleQ(bits=2, J=1, min_size=0)
    for network, tuned in (
        (nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)), 0),
        (nn.Sequential(nn.Sequential(nn.Linear(16, 16)), nn.Sequential(nn.Linear(16, 4))), 2),
    ):
        model = bitfront.quantize(network, method, data)
        assert model.log["tuned"] == tuned and (UNTUNED in model.summary()) is not bool(tuned)
        assert "tuned" not in bitfront.quantize(network, GPTQ(min_size=0), data).log


def test_a_loop_of_ones_own_trains_the_values_of_codes_after_quantize(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 4)).eval()
    data = [torch.randn(32, 16) for _ in range(4)]
    model = bitfront.quantize(network, DecoupleQ(bits=2, J=0, sft=True, min_size=0), data)
    codes = {name: p.codes for name, p in model.encode().items()}

    def error() -> Any:
        return sum(((model(x) - network(x).detach()) ** 2).mean() for x in data)

    before = error().item()
    optimizer = model.train().optimizer(torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2))
    for _ in range(30):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    after = error().item()
    assert after < 0.9 * before
    assert all(torch.equal(p.codes, codes[name]) for name, p in model.encode().items())
    model.eval().save(tmp_path / "net")
    loaded = bitfront.load(tmp_path / "net", into=copy.deepcopy(network)).eval()
    assert all(torch.equal(loaded(x), model(x)) for x in data)


def test_what_is_blind_in_strange_networks_is_said() -> None:
    for name, data in (("tagger", tagged(2)), ("unet", NETWORKS["unet"][1](2))):
        model = bitfront.quantize(start(name), GPTQ(**SMALL), data)
        assert "blind" not in model.summary() and model.log["blind"] == 0
    whole = bitfront.quantize(start("convnet"), GPTQ(), classified(2)).summary()
    own = list(start("convnet").parameters())
    for reason, tensors in (
        (r"at most 2,621 values, min_size=0\.01 MB", [p for p in own if p.dim() > 1 and p.numel() <= 2621]),
        ("vectors", [p for p in own if p.dim() == 1]),
    ):
        share = re.search(rf"float, {reason}: (\d+) tensors, ([\d,]+) bytes, ([\d.]+) %", whole)
        assert share and int(share[1]) == len(tensors)
        assert int(share[2].replace(",", "")) == sum(4 * p.numel() for p in tensors)


@pytest.mark.parametrize("wrap", [lambda net: torch.compile(net, backend="eager"), nn.DataParallel], ids=["c", "p"])
def test_wrappers_are_taken_off(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    x = rows(2, 1, 32)
    for made in (lambda net: bitfront.quantize(net, RTN(**SMALL)), lambda net: bitfront.prepare(net, LSQ(**SMALL))):
        plain, wrapped = made(copy.deepcopy(start("unet"))).eval(), made(wrap(copy.deepcopy(start("unet")))).eval()
        wrapped.save(tmp_path / "net")
        assert torch.equal(outputs(wrapped, x), outputs(plain, x))
        assert torch.equal(outputs(bitfront.load(tmp_path / "net", into=start("unet")), x), outputs(plain, x))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)])
def test_schedules_move_what_the_optimizer_has_beside_its_rate(optimizer: Any) -> None:
    """OneCycleLR moves momentum, too, whichever name it has."""

    def rates(joint: bool) -> list[dict[str, Any]]:
        model = bitfront.prepare(nn.Linear(64, 64), DiffQ(**SMALL))
        own = optimizer(model.network.parameters(), 1e-3)
        own = model.optimizer(own) if joint else own
        schedule = torch.optim.lr_scheduler.OneCycleLR(own, 0.1, total_steps=5)
        found = []
        for _ in range(4):
            own.step()
            schedule.step()
            found.append({k: v for k, v in own.param_groups[0].items() if k in ("lr", "betas", "momentum")})
        return found

    assert rates(True) == rates(False)


def test_widths_of_a_frozen_weight_still_learn() -> None:
    model = bitfront.prepare(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), DiffQ(penalty=5, **SMALL))
    model.network[0].weight.requires_grad_(False)
    optimizer = model.optimizer(torch.optim.SGD(model.network.parameters(), 0.1))
    before = [copy.deepcopy(list(q.parameters())) for q in model.quantizers]
    (model(rows(4, 64)).square().mean() + model.penalty()).backward()
    optimizer.step()
    for old, quantizer in zip(before, model.quantizers, strict=True):
        assert not any(torch.equal(a, b) for a, b in zip(old, quantizer.parameters(), strict=True))


def test_evaluation_keeps_no_second_copy_of_calibrated_weights() -> None:
    model = bitfront.quantize(nn.Linear(64, 64), RTN(bits=2, **SMALL))
    outputs(model, rows(2, 64))
    assert sum(t.nbytes for t in model._cached_of) < 2 * 64 * 64  # codes and scales
    model.network.weight.data.fill_(7)  # has no say
    assert torch.equal(model.weights()["weight"], model.encode()["weight"].decode())


@pytest.mark.parametrize("method", [DiffQ(penalty=5, **SMALL), LSQ(bits=4, **SMALL)])
def test_compiled_models_train_and_measure_the_same(method: Any) -> None:
    def run(compiled: bool) -> tuple[float, Tensor]:
        torch.manual_seed(0)
        model = bitfront.prepare(copy.deepcopy(start("unet")), method)
        net = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = model.optimizer(torch.optim.SGD(model.network.parameters(), 0.1))
        x = rows(4, 1, 32)
        torch.manual_seed(1)  # compiling for the first time may have drawn some
        loss = F.mse_loss(net(x), x) + model.penalty()
        loss.backward()
        optimizer.step()
        model.eval()
        return loss.item(), outputs(net, x)

    (loss, y), (wanted, exact) = run(True), run(False)
    assert loss == pytest.approx(wanted, rel=1e-4)
    torch.testing.assert_close(y, exact, rtol=1e-3, atol=1e-4)


def test_autocast_trains_what_full_precision_does() -> None:
    def gradients(on: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = bitfront.prepare(copy.deepcopy(start("unet")), LSQ(bits=8, **SMALL))
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            loss = F.mse_loss(model(rows(4, 1, 32)).float(), rows(4, 1, 32))
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    low, full = gradients(True), gradients(False)
    assert low.keys() == full.keys()
    for name in full:
        assert F.cosine_similarity(low[name].float().flatten(), full[name].flatten(), dim=0) > 0.9, name


def test_only_the_weights_are_scheduled_and_clipped() -> None:
    """With DiffQ's widths in the loop, weights and rates move exactly as they would without them."""

    def trained(penalty: float) -> bitfront.QuantizedModel:
        torch.manual_seed(0)
        model = bitfront.prepare(nn.Sequential(nn.Linear(64, 64)), DiffQ(penalty=penalty, noise="uniform", **SMALL))
        optimizer = model.optimizer(torch.optim.SGD(model.network.parameters(), 0.1))
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (model(rows(4, 64)).square().mean() + model.penalty()).backward()
            parameters = [p for group in optimizer.param_groups for p in group["params"]]  # as Lightning clips
            nn.utils.clip_grad_norm_(parameters, 0.01)
            optimizer.step()
            schedule.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)
        logits = next(model.quantizers.parameters())
        assert (logits.detach() - model.method.initial_logit()).abs().max() == pytest.approx(3e-3, rel=1e-2)
        return model

    few, many = trained(1.0), trained(1e6)
    noise_alone = (few.network[0].bias - many.network[0].bias).abs().max()
    assert noise_alone < 1e-4 * 0.01 * 3


def test_a_network_that_is_quantized_already_is_refused() -> None:
    model = bitfront.prepare(nn.Linear(64, 64), LSQ(**SMALL))
    for again in (lambda: bitfront.prepare(model, STE(**SMALL)), lambda: bitfront.quantize(model, RTN(**SMALL))):
        with pytest.raises(BitfrontError, match="quantized already"):
            again()


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        (rows(8), r"a tensor \[8\]"),
        ({"a": rows(2, 8), "y": 3}, r"a dict of a: a tensor \[2, 8\], y: a int"),
        (((rows(2, 8), rows(2, 8)), 0), r"a tuple of a tuple of a tensor \[2, 8\], a tensor \[2, 8\], a int"),
    ],
)
def test_a_batch_that_the_network_does_not_take_is_told(batch: Any, told: str) -> None:
    with pytest.raises(BitfrontError, match=f"first batch, {told} .*forward=lambda") as caught:
        bitfront.quantize(start("unet"), GPTQ(**SMALL), [batch])
    assert caught.value.__cause__ is not None  # whose traceback shows where


def test_widths_that_have_hardly_moved_are_told() -> None:
    model = bitfront.prepare(nn.Linear(64, 64), DiffQ(penalty=5, **SMALL))
    assert "hardly moved from 8 bits" in model.summary()
    with torch.no_grad():
        for p in model.quantizers.parameters():
            p.sub_(1)
    assert "hardly moved" not in model.eval().summary()


def test_an_optimizer_of_another_network_is_refused() -> None:
    model = bitfront.prepare(nn.Linear(64, 64), LSQ(**SMALL))
    with pytest.raises(BitfrontError, match="make it of network"):
        model.optimizer(torch.optim.SGD(nn.Linear(64, 64).parameters(), 0.1))


def test_methods_are_for_one_of_the_two() -> None:
    with pytest.raises(BitfrontError, match=r"bitfront\.quantize"):
        bitfront.prepare(nn.Linear(64, 64), GPTQ())
    with pytest.raises(BitfrontError, match=r"bitfront\.prepare"):
        bitfront.quantize(nn.Linear(64, 64), LSQ())  # type: ignore[arg-type]


def test_the_joint_optimizer_goes_on_from_its_state() -> None:
    def steps(model: bitfront.QuantizedModel, optimizer: Any, n: int) -> None:
        for _ in range(n):
            optimizer.zero_grad()
            (model(rows(4, 64)).square().mean() + model.penalty()).backward()
            optimizer.step()

    def made() -> tuple[bitfront.QuantizedModel, Any]:
        torch.manual_seed(0)
        method = DiffQ(penalty=5, noise="uniform", **SMALL)
        model = bitfront.prepare(nn.Sequential(nn.Linear(64, 64)), method)
        return model, model.optimizer(torch.optim.Adam(model.network.parameters(), 1e-2))

    model, optimizer = made()
    steps(model, optimizer, 3)
    other, resumed = made()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in ((model, optimizer), (other, resumed)):
        torch.manual_seed(1)
        steps(*each, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def examples() -> list[str]:
    """README's python blocks that use the library."""
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    return [block for block in blocks if "import bitfront\n" in block]


@pytest.mark.parametrize("n", range(2))
def test_readmes_examples_run_as_written(
    n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(examples()) == 2
    net = convnet()
    names: dict[str, Any] = {
        "net": net,
        "MyNet": convnet,
        "loader": DataLoader(TensorDataset(rows(8, 3, 32, 32), torch.arange(8) % 5), batch_size=4),
    }
    exec(examples()[n], names)
    assert (tmp_path / "net.safetensors").stat().st_size < 0.5 * sum(4 * p.numel() for p in net.parameters())
    assert n or "file: " in capsys.readouterr().out


def in_another_program(file: Path, x: Tensor) -> Tensor:
    """What a shufflenet with the weights of a file gives, in a program that has nothing else of ours."""
    torch.save(x, file.with_name("x.pt"))
    code = f"""
import bitfront, torch, torchvision
torch.set_num_threads(1)  # as in the tests: sums of other parts round otherwise
net = bitfront.load("{file.name}", into=torchvision.models.shufflenet_v2_x0_5(num_classes=5)).eval()
with torch.no_grad():
    torch.save(net(torch.load("x.pt")), "y.pt")
"""
    subprocess.run([sys.executable, "-c", code], cwd=file.parent, check=True)
    return torch.load(file.with_name("y.pt"))


def test_another_program_gets_the_same_outputs(tmp_path: Path) -> None:
    x = rows(4, 3, 32, 32)
    model = bitfront.quantize(start("convnet"), DecoupleQ(bits=2, J=1), classified(4))
    model.save(tmp_path / "net.safetensors")
    assert torch.equal(in_another_program(tmp_path / "net.safetensors", x), outputs(model, x))


def test_what_could_be_smaller_is_told_with_its_bytes(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 16), nn.Linear(64, 32), nn.LayerNorm(300))
    sizes, said = {}, {}
    for raw in ("float32", "float16"):
        method = RTN(bits=4, min_size=0.005, exclude=["2.weight"], raw_dtype=raw)
        model = bitfront.quantize(network, method)
        sizes[raw], said[raw] = model.save(tmp_path / raw), model.summary().splitlines()
    floats = 4 * (64 + 65 * 16 + 65 * 32 + 2 * 300)
    told = (
        f"saves {floats // 2:,} bytes of them; a smaller min_size quantizes 1 of these tensors, {4 * 64 * 16:,} bytes"
    )
    assert any(line.endswith(told) for line in said["float32"])
    assert not any("raw_dtype" in line for line in said["float16"])
    assert sizes["float32"] - sizes["float16"] == pytest.approx(floats // 2, abs=60)
