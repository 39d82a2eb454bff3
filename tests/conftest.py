"""Four tiny networks that between them have tied weights, buffers, stock attention and a recurrent layer."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitfront.commands import start
from bitfront.quant.core import Method
from bitfront.quant.engine.calibration import PostTraining
from bitfront.quant.engine.plan import Calibration
from bitfront.quant.layers.inputs import Accumulator, Moments, Watch
from bitfront.quant.model import QuantizedModel

REPOSITORY = Path(__file__).parents[1]


def seen_by(network: nn.Module, name: str, *calls: Any, valid: Tensor | None = None) -> Moments:
    """``H`` of a weight's inputs over some calls of the network."""
    sums = Accumulator(name, torch.device("cpu"))
    sums.valid = valid
    with torch.no_grad(), Watch({name: network.get_parameter(name)}, sums.add):
        for args in calls:
            network(*args)
    found = sums.moments()
    assert found
    return found


class Experts(nn.Module):
    """A router that sends each sample to one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.gate = nn.Linear(12, 12), nn.Linear(12, 2)
        self.experts = nn.ModuleList([nn.Linear(12, 12) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.before(x))
        to = self.gate(h).argmax(-1)
        out = torch.zeros_like(h)
        for n, expert in enumerate(self.experts):
            out[to == n] = expert(h[to == n])
        return out


class TiedGPT(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.hidden = nn.Linear(16, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embedding(x))))


class ConvNet(nn.Module):
    """Convolutions with batch norm: buffers matter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 10, 3, groups=2), nn.BatchNorm2d(10)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))


class Attention(nn.Module):
    """A stock attention layer: its projections are parameters, not modules."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0])


class Recurrent(nn.Module):
    """An LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 12, batch_first=True)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0])


NETWORKS: dict[str, tuple[type[nn.Module], Callable[[], Tensor]]] = {
    "gpt": (TiedGPT, lambda: torch.randint(40, (4, 6))),
    "conv": (ConvNet, lambda: torch.randn(4, 3, 8, 8)),
    "attention": (Attention, lambda: torch.randn(4, 6, 16)),
    "lstm": (Recurrent, lambda: torch.randn(4, 6, 8)),
}


@pytest.fixture(params=NETWORKS)
def tiny(request: pytest.FixtureRequest) -> tuple[type[nn.Module], Tensor]:
    """A network class and an input for it."""
    torch.manual_seed(0)
    network, x = NETWORKS[request.param]
    return network, x()


def attach(method: Method, network: nn.Module, x: Tensor) -> QuantizedModel:
    """Quantize; a post-training method is calibrated on ``x``."""
    if isinstance(method, PostTraining):
        return method.attach(network, Calibration(x.split(2), lambda net, batch: net(batch)))
    return method.attach(network)


torch.set_num_threads(1)  # networks this small only wait for each other's threads
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and theirs, would ignore it


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def command(*words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run ``python -m ...`` as a user would, in a process of its own, without W&B."""
    environment = {**os.environ, "WANDB_MODE": "disabled", "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, cwd=REPOSITORY, env=environment, timeout=timeout
    )


def cli(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    """The same in this process, where a process of its own would only serve to print: ``cli("run", "task=vit")``."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("WANDB_MODE", "disabled")
        patch.setenv("COLUMNS", "120")
        patch.chdir(REPOSITORY)
        try:
            start(name, words)
        except SystemExit as end:
            code = 1
            print(end.code, file=err)
        except Exception:
            code = 1
            traceback.print_exc()
    return subprocess.CompletedProcess([name, *words], code, out.getvalue(), err.getvalue())


OTHERS = multiprocessing.get_context("forkserver")  # a copy of a process that has imported torch, and nothing else
OTHERS.set_forkserver_preload(["bitfront.cells.flow"])


def elsewhere(folder: Path, call: Callable[..., Any], *arguments: Any, **environment: str) -> BaseProcess:
    """Start a call, of a module's function, in a process and a session of its own, in seconds less than ``command``.

    Args:
        folder: what it prints goes to files ``out`` and ``err`` there.
    """
    process = OTHERS.Process(target=_there, args=(folder, {**os.environ, **environment}, call, *arguments))
    process.start()
    return process


def _there(folder: Path, environment: dict[str, str], call: Callable[..., Any], *arguments: Any) -> None:
    os.setsid()
    os.chdir(REPOSITORY)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    call(*arguments)


def torchrun(folder: Path, call: Callable[..., Any], *arguments: Any) -> None:
    """A call in two processes that find each other as those of ``torchrun`` do; what they print goes to folders."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    both = []
    for rank in "01":
        (folder / rank).mkdir()
        both.append(elsewhere(folder / rank, call, *arguments, RANK=rank, LOCAL_RANK=rank, **place))
    for rank, process in zip("01", both, strict=True):
        process.join(300)
        assert process.exitcode == 0, (folder / rank / "err").read_text()


@pytest.fixture(scope="session")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with the float network of ``task=vit smoke=true``, on the CPU."""
    root = tmp_path_factory.mktemp("floats")
    assert cli("run", "task=vit", "smoke=true", "trainer.accelerator=cpu", f"root={root}").returncode == 0
    return root


@pytest.fixture
def root(floats: Path, tmp_path: Path) -> Path:
    """Runs with the float network that others start from."""
    shutil.copytree(floats / "vit", tmp_path / "vit")
    return tmp_path


def written(root: Path) -> dict[str, int]:
    """When each run's record was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in root.rglob("record.json")}


def wandb_run(directory: Path) -> dict[str, Any]:
    """The one W&B run below a folder, by W&B's own reader: ``config``, ``summary``, ``name`` and so on as it sums them
    up, and ``lines``, its log by kind.
    """
    (file,) = directory.rglob("offline-run-*/*.wandb")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    short, long = (
        subprocess.run(words, capture_output=True, text=True, check=True).stdout
        for words in ([*inspect, "--summary"], inspect)
    )
    lines: dict[str, list[Any]] = {}
    for line in map(json.loads, long.splitlines()):
        lines.setdefault(line["type"], []).append(line[line["type"]])
    return json.loads(short) | {"lines": lines}
