"""Convolutions in bfloat16, which some processors do wrongly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import cli
from torch import nn

import bitfront
from bitfront import DecoupleQ
from bitfront.errors import BitfrontError
from bitfront.quant.engine.plan import Calibration
from bitfront.quant.forwards import narrow
from bitfront.quant.forwards.narrow import MOST, check_convolutions

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("module", "like"),
    [
        (nn.Conv1d(16, 32, 8, 4), (2, 16, 800)),  # noise with AMX, in torch 2.11
        (nn.ConvTranspose1d(32, 16, 8, 4), (2, 32, 200)),  # its gradient
        (nn.Conv2d(8, 4, 3, 3, dilation=2, groups=2), (2, 8, 40, 40)),
        (nn.Conv1d(64, 64, 3), (2, 64, 100)),
    ],
)
def test_what_is_refused_is_wrong_and_what_is_not_is_right(module: nn.Module, like: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, found = torch.randn(like), []
    for enabled in (False, True):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = module(given)
        torch.manual_seed(1)
        felt = torch.randn(output.shape).to(output.dtype)
        found.append([output.float(), *torch.autograd.grad(output, [given, *module.parameters()], felt)])
    errors = [((b - a).norm() / a.norm()).item() for a, b in zip(*found, strict=True)]
    if max(errors) > MOST:
        with pytest.raises(BitfrontError, match=r"'0' wrongly in bfloat16.*ONEDNN_MAX_CPU_ISA=.*or give this"):
            check_convolutions(nn.Sequential(module), CPU, "this", torch.bfloat16)
    else:
        check_convolutions(nn.Sequential(module), CPU, "this", torch.bfloat16)
    check_convolutions(nn.Sequential(module), CPU, "this")


def test_nothing_is_trained_or_tuned_in_it_where_it_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(narrow, "_error", lambda *_: 1.1)
    words = ("task=resnet", "smoke=true", "quant=float", "trainer.precision=bf16-mixed", "trainer.accelerator=cpu")
    result = cli("run", *words, f"root={tmp_path}", "wandb=disabled")
    assert result.returncode != 0 and "wrongly in bfloat16" in result.stderr
    assert "give trainer.precision=32-true" in result.stderr
    network = nn.Sequential(nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 4, 3, padding=1)))
    data = Calibration([torch.randn(2, 4, 9)], lambda net, x: net(x))
    method = DecoupleQ(min_size=0.0, J=1, block_dtype="bfloat16")
    with pytest.raises(BitfrontError, match=r"'0' wrongly in bfloat16 \(off by 110%.*give block_dtype=float32"):
        method.attach(network, data)
    with pytest.raises(BitfrontError, match=r"'0.0' wrongly in bfloat16.*give float32 weights"):
        bitfront.quantize(network.bfloat16(), DecoupleQ(min_size=0.0, J=0), torch.randn(2, 4, 9).bfloat16())
    check_convolutions(network, torch.device("cuda"), "", torch.bfloat16)
