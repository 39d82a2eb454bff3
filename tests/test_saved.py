"""Files of torch: what is damaged is never taken for what was written."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitfront import GPTQ, Calibration, DecoupleQ
from bitfront.errors import BitfrontError
from bitfront.saved import DamagedError, load_saved, resume

STATE = {"a": torch.arange(1000.0), "b": {"c": [1, "x"]}}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.save(STATE, tmp_path / "state.pt")
    return tmp_path / "state.pt"


def same(a: Any, b: Any) -> bool:
    return bool(torch.equal(a["a"], b["a"]) and a["b"] == b["b"])


def test_every_byte_counts(saved: Path) -> None:
    data, refused = saved.read_bytes(), 0
    for at in range(0, len(data), 7):
        saved.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        try:
            assert same(load_saved(saved), STATE), at  # as of dates, or of padding
        except DamagedError:
            refused += 1
    assert refused > 0.8 * len(data) / 7


@pytest.mark.parametrize("kind", ["cut", "no zip", "compressed", "entries that overlap", "another", "code"])
def test_what_a_run_cannot_go_on_from_is_set_aside(kind: str, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = saved.read_bytes()
    if kind == "cut":
        saved.write_bytes(data[:-100])
    elif kind == "no zip":
        saved.write_bytes(b"\x80\x02}q\x00.")
    elif kind == "compressed":  # which a thousandth of its content would do for
        with zipfile.ZipFile(saved) as old, zipfile.ZipFile(saved.with_name("new"), "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
        saved.with_name("new").replace(saved)
    elif kind == "entries that overlap":
        with zipfile.ZipFile(saved, "a") as file:
            file.infolist()[-1].file_size = file.infolist()[-1].compress_size = 10**12
            file._didModify = True  # type: ignore[attr-defined]
    elif kind == "another":
        torch.save({"a": 1}, saved)
    else:
        torch.save({"a": print, "b": 1}, saved)
    assert resume(saved, {"a", "b"}) is None
    assert not saved.exists() and saved.with_name("state.pt.damaged").exists()
    assert "state.pt" in capsys.readouterr().err
    assert resume(saved, {"a", "b"}) is None  # as if there had been none


@pytest.mark.parametrize("error", [MemoryError(), PermissionError(13, "Permission denied")])
def test_what_cannot_be_read_now_stays(error: Exception, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(BitfrontError):
        resume(saved, {"a", "b"})
    assert saved.exists()


def test_what_is_whole_is_taken(saved: Path) -> None:
    state = resume(saved, {"a", "b"})
    assert state is not None and same(state, STATE)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_a_rotten_block_is_quantized_again(n: int, tmp_path: Path) -> None:
    """Also in the middle, where those behind it are whole."""

    def quantized() -> dict[str, Tensor]:
        torch.manual_seed(0)
        network, batches = Two(), [torch.randn(8, 16) for _ in range(4)]
        data = Calibration(batches, lambda net, x: net(x), [f"blocks.{i}" for i in range(3)], states=tmp_path)
        method = DecoupleQ(bits=2, J=1, min_size=1e-4) if n == 1 else GPTQ(bits=2, propagation=0.5, min_size=1e-4)
        return {name: p.decode() for name, p in method.attach(network, data).encode().items()}

    before = quantized()
    (path,) = tmp_path.glob(f"*/{n:04}.pt")
    data = bytearray(path.read_bytes())
    at = data.index(b"/data/0") + 200
    data[at] ^= 1
    path.write_bytes(data)
    after = quantized()
    assert path.with_name(f"{path.name}.damaged").exists() and path.exists()
    assert all(torch.equal(after[name], before[name]) for name in before)
