"""Networks taken out of their files: a reader of its own in a program without Bitfront, and plain weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ConvNet, TiedGPT, cli
from torch import nn

import bitfront
from bitfront import GPTQ, RTN, Artifact, DiffQ
from bitfront.quant.storage.packed import Packed

EVERY: dict[str, Any] = {"min_size": 0.0002, "exclude": ["bias"]}


def mixed(path: Path) -> Artifact:
    """Tied and half-precision tensors, buffers, groups of any width and length, tables of each type."""
    torch.manual_seed(0)
    network = nn.ModuleDict({"gpt": TiedGPT(), "conv": ConvNet().half()})
    packed = dict(bitfront.quantize(network, RTN(bits=9, group_size=7, scale_dtype="bfloat16", **EVERY)).encode())
    names = list(packed)
    trained = bitfront.prepare(network, DiffQ(min_size=0.0002)).eval()
    with torch.no_grad():
        for p in trained.quantizers.parameters():
            p.normal_(0, 2)  # widths of all kinds
    packed |= {name: p for name, p in trained.encode().items() if name in names[::2]}
    w = network.get_parameter(names[1])
    short = bitfront.quantize(
        nn.Sequential(nn.Linear(10, 6)), GPTQ(bits=3, group_size=4, min_size=0.0), [torch.randn(20, 10)]
    ).encode()["0.weight"]
    network["short"] = nn.Linear(10, 6)
    packed["short.weight"] = short
    packed[names[1]] = Packed.nearest(w, torch.tensor([5]), torch.tensor([-1.0]).half(), torch.tensor([2.0]).half(), 0)
    network["tables"], network["narrow"], network["coded"] = nn.Linear(96, 7), nn.Linear(12, 7), nn.Linear(96, 70)
    w, bits = network["coded"].weight.detach(), 2 + torch.randn(840).clamp(0, 2).round().int()
    packed["coded.weight"] = Packed.nearest(w, bits, torch.tensor([-0.1]), torch.tensor([0.2]), 8)
    of = {name: network.get_parameter(f"{name}.weight").detach() for name in ("tables", "narrow")}
    packed["tables.weight"] = RTN(bits=3, group_size=8, scale_bits=5).solve(of["tables"], None)[0]
    packed["narrow.weight"] = RTN(bits=2, group_size=4, scale_dtype="bfloat16").solve(of["narrow"], None)[0]
    artifact = Artifact.of(network, packed, {"note": "é"})
    artifact.save(path)
    return artifact


READ = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from reader import load
assert not any(name.startswith("bitfront") for name in sys.modules)
torch.save(load(sys.argv[2]), sys.argv[3])
"""


def test_a_program_with_the_reader_alone_gets_the_same_weights(tmp_path: Path) -> None:
    artifact = mixed(tmp_path / "net")
    assert {p.lo.dtype for p in artifact.packed.values()} == {torch.float32, torch.float16, torch.bfloat16}
    layouts = [p.layout() for p in artifact.packed.values()]
    assert all(any(layout.get(key) for layout in layouts) for key in ("rows", "table", "coded"))
    done = cli("export", f"artifact={tmp_path}/net", "format=torch", f"out={tmp_path}/reader.py")
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "reader.py").read_text().splitlines()) < 150
    words = [str(tmp_path), str(tmp_path / "net"), str(tmp_path / "state.pth")]
    subprocess.run([sys.executable, "-c", READ, *words], check=True, cwd=tmp_path)
    state, wanted = torch.load(tmp_path / "state.pth", weights_only=True), artifact.state()
    assert state.keys() == wanted.keys()
    for name, t in wanted.items():
        assert state[name].dtype == t.dtype and torch.equal(state[name], t), name


def test_the_reader_refuses_what_is_damaged_or_newer(tmp_path: Path) -> None:
    from bitfront.standalone import load

    mixed(tmp_path / "net")
    data = bytearray((tmp_path / "net").read_bytes())
    data[-5] ^= 1
    (tmp_path / "damaged").write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        load(tmp_path / "damaged")
    edited = (tmp_path / "net").read_bytes().replace(b'\\"note\\"', b'\\"Note\\"')
    (tmp_path / "edited").write_bytes(edited)
    with pytest.raises(ValueError, match="damaged"):
        load(tmp_path / "edited")
    (tmp_path / "older").write_bytes(edited.replace(b"own_crc32", b"own_crc00"))  # has none
    assert load(tmp_path / "older").keys() == load(tmp_path / "net").keys()
    newer = (tmp_path / "net").read_bytes().replace(b'\\"version\\":3', b'\\"version\\":9')
    (tmp_path / "newer").write_bytes(newer)
    with pytest.raises(ValueError, match="newer"):
        load(tmp_path / "newer")


def test_plain_weights_for_any_program(tmp_path: Path) -> None:
    artifact = mixed(tmp_path / "net")
    done = cli("export", f"artifact={tmp_path}/net", "format=float", f"out={tmp_path}/net.pth")
    assert done.returncode == 0, done.stderr
    state = torch.load(tmp_path / "net.pth", weights_only=True)
    assert all(torch.equal(state[name], t) for name, t in artifact.state().items())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"format": "tflite"}, "format=tflite: it is one of"),
        ({"artifact": "nowhere"}, "no artifact at 'nowhere'"),
        ({"artifact": ""}, "artifact= is needed"),
        ({"out": "."}, "give the name of a file"),
        ({"out": "nowhere/x"}, "give the name of a file"),
        ({"outt": "x"}, "unknown option 'outt=x'; did you mean 'out'"),
    ],
)
def test_mistakes_are_told(words: dict[str, str], told: str, tmp_path: Path) -> None:
    Artifact.of(nn.Linear(2, 2), {}, {}).save(tmp_path / "net")
    usual = {"artifact": f"{tmp_path}/net", "format": "float", "out": f"{tmp_path}/x"}
    done = cli("export", *(f"{key}={value}" for key, value in (usual | words).items()))
    assert done.returncode == 1 and told in done.stderr and "Traceback" not in done.stderr
