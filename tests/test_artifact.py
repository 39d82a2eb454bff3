"""Bit packing, the decode rule, and the file: exact, strict, atomic."""

from __future__ import annotations

import copy
import json
import math
import os
import tracemalloc
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ConvNet, TiedGPT
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

from bitfront import GPTQ, LSQ, RTN, DecoupleQ
from bitfront.errors import ArtifactError
from bitfront.quant.layers.inputs import Moments
from bitfront.quant.storage import entropy
from bitfront.quant.storage.artifact import Artifact
from bitfront.quant.storage.packed import Packed, grouped, ordered, pack, packed_bytes, restored, ungrouped, unpack
from bitfront.quant.storage.rounding import round_to_nearest
from bitfront.quant.storage.scales import Scales
from bitfront.standalone import load


@given(width=st.integers(1, 15), n=st.integers(0, 70), seed=st.integers(0, 2**32 - 1))
def test_packing_restores_every_code(width: int, n: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**width, n).astype(np.uint8 if width <= 8 else np.uint16)
    packed = pack(codes, width)
    assert packed.size == packed_bytes(n, width) == width * ((n + 7) // 8)
    np.testing.assert_array_equal(unpack(packed, width, n), codes)


@pytest.mark.parametrize("n", [0, 1, 2047, 2048, 2049, 65535, 65536, 65537, 200_003])
@pytest.mark.parametrize("width", [1, 2, 8, 9, 15])
def test_packing_across_chunks(n: int, width: int) -> None:
    codes = np.random.default_rng(n).integers(0, 2**width, n).astype(np.uint8 if width <= 8 else np.uint16)
    np.testing.assert_array_equal(unpack(pack(codes, width), width, n), codes)


def test_packing_is_bit_planes_lowest_first() -> None:
    assert pack(np.array([1, 2, 3, 0], np.uint8), 2).tolist() == [0b0101, 0b0110]


def packed_tensors() -> st.SearchStrategy[Packed]:
    """Mixed widths 1..15, in many groups entropy-coded; scales per tensor or group, spans of either sign, tables of few
    bits; sizes that do not divide."""

    @st.composite
    def build(draw: st.DrawFn) -> Packed:
        numel, size = draw(st.one_of(st.integers(1, 60), st.integers(1000, 3000))), draw(st.integers(1, 9))
        n = -(-numel // size)
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        low = draw(st.integers(1, 15))
        bits = rng.integers(low, draw(st.integers(low, 15)) + 1, n if draw(st.booleans()) else 1)
        scales = draw(st.sampled_from([1, n]))
        dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
        table = draw(st.sampled_from([0, 1, 6, 8])) if scales > 1 else 0
        form = Scales(torch.float32, table) if table else Scales(dtype)
        lo, span = (x[0] for x in form.stored(*(torch.from_numpy(rng.normal(size=(1, scales))) for _ in range(2))))
        codes = rng.integers(0, 2 ** bits[:, None], (n, size))
        kind = torch.uint8 if bits.max() <= 8 else torch.int16
        whole, width = torch.from_numpy(codes).to(kind), torch.from_numpy(bits).to(torch.uint8)
        return Packed(whole, width, lo, span, torch.Size([1, numel]), 0, table)

    return build()


@given(packed_tensors())
@settings(max_examples=300)
def test_entry_restores_the_tensor(packed: Packed) -> None:
    data = packed.to_bytes()
    again = Packed.from_bytes(data, packed.layout())
    assert data.numel() == packed.nbytes
    assert torch.equal(again.decode(), packed.decode())
    assert torch.equal(again.codes, packed.codes)
    assert torch.equal(again.bits.expand(len(again.codes)), packed.bits.expand(len(packed.codes)))


@given(st.lists(st.integers(0, 14), min_size=1, max_size=20), st.integers(1, 5000), st.integers(0, 1000))
def test_symbols_take_as_many_bits_as_they_carry(kinds: list[int], n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    symbols = rng.choice(np.array(kinds, np.uint8), n, p=rng.dirichlet(np.full(len(kinds), 0.3)))
    data = entropy.encode(symbols)
    assert np.array_equal(entropy.decode(data, n), symbols)
    counts = np.bincount(symbols)
    share = counts[counts > 0] / n
    carried = -n * (share * np.log2(share)).sum() / 8
    assert len(data) <= 1.02 * carried + 40 + n / 150  # frequencies, states, frequencies that are not exact
    assert abs(entropy.estimate(counts) - len(data)) <= 4 + n / 500
    with pytest.raises(ArtifactError, match=r"too short|too long|none"):
        entropy.decode(data[:-2], n)


@given(st.binary(max_size=60), st.integers(1, 3000))
def test_bytes_that_are_no_symbols_are_refused(data: bytes, n: int) -> None:
    with suppress(ArtifactError):  # all but few of them
        assert len(entropy.decode(np.frombuffer(data, np.uint8), n)) == n


@pytest.mark.parametrize("table", [6, 7, 8])
@pytest.mark.parametrize("size", [4e-6, 6e-6, 1.5e-5, 1.0])
def test_grids_of_small_weights_stay_when_they_are_stored_again(size: float, table: int) -> None:
    for seed in range(40):
        w = size / 3 * torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
        packed = round_to_nearest(w, 4, 32, Scales(torch.float16, table))
        assert torch.equal(Packed.from_bytes(packed.to_bytes(), packed.layout()).decode(), packed.decode())


def test_the_middle_code_of_a_table_is_zero() -> None:
    w = torch.randn(200, 64) * torch.rand(200, 1)
    packed = round_to_nearest(w, 4, 8, Scales(torch.float16, 6, True))
    assert packed.table == 6
    zero = packed.lo + 8 * packed.span / 15
    assert (zero.abs() <= 1e-3 * packed.span).all()


@pytest.mark.parametrize("method", [RTN, GPTQ, DecoupleQ])
def test_tables_are_not_taken_where_they_cannot_have_the_grids(method: Any) -> None:
    """Ranges of both signs in a row, or a hundred times as large as others."""
    torch.manual_seed(0)
    drifting = 0.02 * torch.randn(8, 256) + torch.linspace(-1, 1, 256)
    uneven = torch.randn(8, 256)
    uneven[3, :32] *= 300
    for w in (drifting, uneven):
        seen = Moments(torch.eye(256).double()[None], 10)
        found = {bits: method(bits=4, group_size=32, scale_bits=bits).solve(w, seen)[0] for bits in (0, 6)}
        assert found[6].table == 0 and torch.equal(found[6].decode(), found[0].decode())
    assert method(bits=4, group_size=32, scale_bits=6).solve(torch.randn(8, 256), seen)[0].table == 6


def test_symmetric_ranges_too_large_for_float16_are_wider() -> None:
    w = -4e4 * torch.rand(8, 32)
    for method in (RTN, GPTQ, DecoupleQ):
        packed, _ = method(bits=3, symmetric=True).solve(w, Moments(torch.eye(32).double()[None], 10))
        assert packed.lo.dtype == torch.float32 and packed.decode().isfinite().all()


@given(table=st.integers(1, 8), n=st.integers(2, 9), seed=st.integers(0, 1000))
def test_few_bits_are_relative_to_the_largest_of_a_row(table: int, n: int, seed: int) -> None:
    x = torch.randn(6, n, generator=torch.Generator().manual_seed(seed)).abs() * torch.logspace(-3, 3, 6)[:, None]
    x[0, 0], x[1] = -x[0].max() - 1, 0
    form = Scales(torch.float32, table)
    found, _ = form.stored(x, x)
    largest = x.abs().amax(1, keepdim=True)
    assert ((found - x).abs()[2:] <= (0.5 / (2**table - 1) + 1e-3) * largest[2:]).all()
    assert (found[0, 1:] == 0).all() and (found[1] == 0).all()  # of the other sign; nothing at all
    assert torch.equal(form.stored(found, found)[1], found)


@pytest.mark.parametrize(
    ("w", "wanted"),
    [
        (torch.randn(4, 64), torch.float16),
        (torch.randn(4, 64) * 1e6, torch.float32),  # too large
        (torch.randn(4, 64) * 1e-7, torch.float32),  # below its least step
        (torch.randn(4, 64) * 1e-4 + 3, torch.float32),  # the distance of its numbers there is larger
        (torch.full((4, 64), 0.7), torch.float16),
    ],
    ids=["usual", "large", "small", "narrow", "constant"],
)
def test_scales_are_wider_where_their_type_would_move_values(w: Tensor, wanted: torch.dtype) -> None:
    for method in (RTN(bits=4, group_size=16), RTN(bits=4, group_size=16, scale_bits=6)):
        packed, _ = method.solve(w, None)
        assert packed.table or packed.lo.dtype == wanted
        step = packed.span.abs().max() / 15
        assert ((packed.decode() - w).abs() <= (0.76 if not packed.table else 1.5) * step + 1e-3 * w.abs()).all()


@given(packed_tensors())
def test_decode_is_the_rule(packed: Packed) -> None:
    groups = len(packed.codes)
    lo, span = (x.double().repeat_interleave(groups // len(x))[:, None] for x in (packed.lo, packed.span))
    expected = lo + span * packed.codes.double() / (2.0 ** packed.bits.double()[:, None] - 1)
    close = torch.allclose(packed.decode().double(), ungrouped(expected, packed.shape), rtol=1e-6, atol=1e-6)
    assert close


@given(bits=st.integers(1, 15), size=st.integers(-1, 7), seed=st.integers(0, 1000))
def test_nearest_is_within_half_a_step(bits: int, size: int, seed: int) -> None:
    w = torch.randn(5, 9, generator=torch.Generator().manual_seed(seed))
    packed = round_to_nearest(w, bits, size)
    step = packed.span / (2**bits - 1)
    error = grouped((w - packed.decode()).abs(), size).amax(1)
    assert (error <= step * (0.5 + 1e-4) + 1e-6).all()


def test_nearest_of_decoded_is_itself() -> None:
    packed = round_to_nearest(torch.randn(64, 8), 5, -1)
    again = Packed.nearest(packed.decode(), packed.bits, packed.lo, packed.span, -1)
    assert torch.equal(again.codes, packed.codes)


@pytest.mark.parametrize("size", [0, -1, 1, 4, 7])
def test_groups_are_consecutive_and_padded_with_the_last_value(size: int) -> None:
    w = torch.arange(30.0).view(5, 6)
    groups = grouped(w, size)
    assert torch.equal(ungrouped(groups, w.shape), w)
    assert groups.shape == {0: (1, 30), -1: (5, 6), 1: (30, 1), 4: (8, 4), 7: (5, 7)}[size]
    assert (groups.flatten()[30:] == 29).all()


@pytest.mark.parametrize("w", [torch.full((4, 4), 0.3), torch.zeros(4, 4), torch.full((4, 4), -1e-30)])
def test_constant_tensors_are_exact(w: torch.Tensor) -> None:
    assert torch.equal(round_to_nearest(w, 3, 0).decode(), w)


def stored(network: nn.Module, path: Path, about: dict | None = None) -> Artifact:
    weights = {n: p for n, p in network.named_parameters() if p.dim() > 1}
    artifact = Artifact.of(network, {n: round_to_nearest(p, 3, 4) for n, p in weights.items()}, about or {})
    artifact.save(path)
    return artifact


def test_file_round_trip_with_buffers_ties_and_provenance(tmp_path: Path) -> None:
    network = nn.ModuleDict({"gpt": TiedGPT(), "conv": ConvNet().train()})
    network["conv"](torch.randn(4, 3, 8, 8))  # moves the running statistics
    network["conv"].layers[1].half()
    artifact = stored(network, tmp_path / "a", {"task": {"x": [1, None, "é"]}})
    loaded = Artifact.load(tmp_path / "a")
    assert loaded.about == {"task": {"x": [1, None, "é"]}}
    assert loaded.tied == {"gpt.head.weight": "gpt.embedding.weight"}
    fresh = nn.ModuleDict({"gpt": TiedGPT(), "conv": ConvNet()})
    fresh["conv"].layers[1].half()
    loaded.load_into(fresh)
    for name, tensor in network.state_dict().items():
        key = loaded.tied.get(name, name)
        expected = artifact.packed[key].decode() if key in artifact.packed else tensor
        assert torch.equal(fresh.state_dict()[name], expected) and fresh.state_dict()[name].dtype == tensor.dtype
    assert fresh["gpt"].head.weight is fresh["gpt"].embedding.weight


def test_payload_is_what_the_file_holds_beside_its_header(tmp_path: Path) -> None:
    artifact = stored(ConvNet(), tmp_path / "a")
    with open(tmp_path / "a", "rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    assert artifact.payload == (tmp_path / "a").stat().st_size - header


def test_small_tensors_can_be_read_by_any_safetensors_reader(tmp_path: Path) -> None:
    network = ConvNet()
    stored(network, tmp_path / "a")
    with safe_open(tmp_path / "a", "pt") as file:
        assert torch.equal(file.get_tensor("layers.1.running_var"), network.state_dict()["layers.1.running_var"])


@pytest.mark.parametrize("change", ["cut", "flip", "empty", "other", "newer", "missing"])
def test_a_damaged_file_is_refused_with_a_reason(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a"
    stored(ConvNet(), path)
    data = bytearray(path.read_bytes())
    if change == "cut":
        data = data[:-20]
    elif change == "flip":
        data[-5] ^= 1
    elif change == "empty":
        data = bytearray()
    elif change == "newer":
        data = data.replace(b'\\"version\\":1', b'\\"version\\":9')
    path.write_bytes(data)
    if change == "other":
        safetensors.torch.save_file({"x": torch.zeros(1)}, path)
    elif change == "missing":
        path.unlink()
    reason = {"newer": "newer", "other": "not written by bitfront", "missing": "no artifact"}.get(change, "damaged")
    with pytest.raises(ArtifactError, match=reason):
        Artifact.load(path)


def test_a_damaged_header_is_refused_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "a"
    stored(ConvNet(), path)
    good, data = Artifact.load(path), path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    harmless = 0
    for at in range(0, header, 3):
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with suppress(ArtifactError):
            found = Artifact.load(path)
            assert (found.about, found.tied, found.narrow) == (good.about, good.tied, good.narrow)
            assert found.raw.keys() == good.raw.keys() and found.packed.keys() == good.packed.keys()
            assert all(torch.equal(found.raw[name], t) for name, t in good.raw.items())
            assert all(torch.equal(found.packed[name].decode(), p.decode()) for name, p in good.packed.items())
            harmless += 1
    assert harmless < 20  # as of the names of checksums: without its own, the header is an older file's


def test_an_edited_header_is_refused_unless_it_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a"
    stored(ConvNet(), path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["bitfront"])
    tensors = safetensors.torch.load_file(path)
    for own in (True, False):
        edited = header | {"about": {"task": "another"}}
        if not own:
            del edited["own_crc32"]
        safetensors.torch.save_file(tensors, path, {"bitfront": json.dumps(edited)})
        if own:
            with pytest.raises(ArtifactError, match="own_crc32"):
                Artifact.load(path)
        else:
            assert Artifact.load(path).about == {"task": "another"}


def test_loading_is_strict_and_leaves_the_network_alone(tmp_path: Path) -> None:
    stored(ConvNet(), tmp_path / "a")
    artifact = Artifact.load(tmp_path / "a")
    more, wider, other = ConvNet(), ConvNet(), ConvNet()
    more.extra = nn.Linear(2, 2)
    wider.layers[0] = nn.Conv2d(3, 9, 3)
    other.layers[1].double()
    for network, reason in ((more, "'extra.bias' is missing"), (wider, "not \\[9, 3, 3, 3\\]"), (other, "float64")):
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        with pytest.raises(ArtifactError, match=reason):
            artifact.load_into(network)
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_one_message_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    artifact = stored(ConvNet(), path)
    before = path.read_bytes()
    real_open = open
    monkeypatch.setattr(
        "builtins.open", lambda file, *args: real_open("/dev/full" if ".a." in str(file) else file, *args)
    )
    with pytest.raises(ArtifactError, match="No space left"):
        artifact.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "crafted",
    [
        {"shape": [1 << 40], "scales": 1},
        {"shape": [1 << 20, 1 << 20], "rows": 1 << 20, "scales": 1},
        {"shape": [-16, -20]},
        {"shape": [16.0, 20]},
        {"shape": 320},
        {"rows": 3},
        {"rows": -1},
        {"rows": "4"},
        {"bits": [0, 0]},
        {"bits": [3, 2]},
        {"bits": [3, 16]},
        {"bits": 3},
        {"group_size": 0},
        {"group_size": 10**9},
        {"group_size": 10**9, "rows": 16},
        {"group_size": 10**13, "rows": 1},
        {"group_size": True},
        {"scales": 0},
        {"scales": 7},
        {"dtype": "int8"},
        {"table": 9},
        {"table": -1},
        {"table": 4, "shape": [320, 1], "scales": 40},
        {"axes": [0]},
        {"axes": [0, 2]},
        {"axes": [1, 1]},
        {"axes": [-1, 0]},
        {"axes": [1, 0, 2]},
        {"axes": "10"},
        {"axes": [1.0, 0.0]},
        {"axes": [True, False]},
        {"axes": 1},
        {"axes": None},
        {"axes": [*range(1000)]},
        {"axes": [10**4000, 0]},
        {"view": [16, 20]},
        {"view": [4, 4, 20], "axes": [1, 0]},
        {"view": [4, 4, 21], "axes": [1, 0, 2]},
        {"view": [-4, -4, 20], "axes": [1, 0, 2]},
        {"view": [1 << 40, 0, 20], "axes": [1, 0, 2]},
        {"view": [[16], 20], "axes": [1, 0]},
        {"axes": [1, 0], "table": 4},
        {"coded": -1},
        {"coded": 10**9},
        {"coded": 3},
        {"dtype": "nn"},
        {"shape": [10**4000] * 400},  # whose product would take seconds
        {"shape": [1] * 1000},
        {"dtype": "x" * 10**6},
    ],
    ids=lambda crafted: str(crafted)[:40],
)
def test_crafted_layouts_are_refused_before_memory_is_taken(crafted: dict[str, Any]) -> None:
    packed = round_to_nearest(torch.randn(16, 20), 3, 8)
    data, layout = packed.to_bytes(), packed.layout() | crafted
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError) as caught:
            Packed.from_bytes(data, layout)
        assert len(str(caught.value)) < 400
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("shape", "view", "axes"), [((6, 20), (), (1, 0)), ((4, 6, 5), (), (2, 0, 1)), ((6, 20), (6, 5, 4), (2, 1, 0))]
)
@pytest.mark.parametrize("group_size", [-1, 7])
def test_axes_in_another_order_are_put_back(
    shape: tuple[int, ...], view: tuple[int, ...], axes: tuple[int, ...], group_size: int, tmp_path: Path
) -> None:
    w = torch.randn(shape)
    rows = ordered(w, view, axes)
    packed = replace(round_to_nearest(rows, 8, group_size), shape=w.shape, view=view, axes=axes)
    step = packed.span.abs().max() / 255
    assert (packed.decode() - w).abs().max() <= 0.51 * step and packed.decode().is_contiguous()
    assert torch.equal(restored(rows.reshape(-1), w.shape, view, axes), w)
    again = Packed.from_bytes(packed.to_bytes(), packed.layout())
    assert again.layout() == packed.layout() and torch.equal(again.decode(), packed.decode())
    Artifact({"w": packed}, {}, {}).save(tmp_path / "net")
    assert torch.equal(load(tmp_path / "net")["w"], packed.decode())
    header = json.loads(safe_open(tmp_path / "net", "pt").metadata()["bitfront"])
    assert header["version"] == 4 and header["quantized"]["w"]["axes"] == list(axes)


def test_widths_and_scales_that_the_entry_belies_are_refused() -> None:
    narrow = Packed.nearest(torch.randn(16), *(torch.tensor(x) for x in ([1, 2], [0.0], [1.0])), 8)
    for bits in ([1, 3], [2, 3]):  # as many bits in the table of widths, other widths
        with pytest.raises(ArtifactError, match=r"widths|shorter"):
            Packed.from_bytes(narrow.to_bytes(), narrow.layout() | {"bits": bits})
    for wrong in ([0.0, math.nan], [math.inf, 1.0], [3e38, 3e38]):  # lo, span
        data = narrow.to_bytes()
        data[-8:] = torch.tensor(wrong).view(torch.uint8)
        with pytest.raises(ArtifactError, match="finite"):
            Packed.from_bytes(data, narrow.layout())
    with pytest.raises(ArtifactError, match="not bytes"):
        Packed.from_bytes(narrow.to_bytes().float(), narrow.layout())


def test_a_header_too_deep_to_read_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "a", {"bitfront": "[" * 100_000})
    with pytest.raises(ArtifactError, match="damaged"):
        Artifact.load(tmp_path / "a")


def test_a_refused_file_leaves_weight_norm_alone(tmp_path: Path) -> None:
    stored(nn.Sequential(nn.Linear(16, 16)), tmp_path / "a")
    other = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)), nn.Linear(16, 16))
    before = list(other.state_dict())
    with pytest.raises(ArtifactError, match=r"'1\.bias' is missing"):
        Artifact.load(tmp_path / "a").load_into(other)
    assert list(other.state_dict()) == before


def test_two_tensors_of_a_file_are_not_written_into_one_of_the_network(tmp_path: Path) -> None:
    def pair(tied: bool) -> nn.Sequential:
        network = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
        if tied:
            network[1].weight = network[0].weight
        return network

    stored(pair(False), tmp_path / "a")
    stored(equal := pair(True), tmp_path / "b")
    with pytest.raises(ArtifactError, match="ties"):
        Artifact.load(tmp_path / "a").load_into(pair(True))
    Artifact.load(tmp_path / "b").load_into(untied := pair(False))
    assert torch.equal(untied[0].weight, untied[1].weight) and untied[0].weight.shape == equal[0].weight.shape


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("method", [RTN, LSQ])
def test_floats_that_stay_may_be_narrow(kind: str, method: Any, tmp_path: Path) -> None:
    """The file has them so, and a model in evaluation mode sees what the file has; its network keeps what it was."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Linear(64, 2).half()
            self.large, self.unused = nn.Parameter(torch.tensor([1e6])), nn.Parameter(torch.zeros(0, 3))
            self.register_buffer("steps", torch.zeros(()))
            self.again = self.norm

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            x = self.norm(self.conv(x)).mean((2, 3)) * self.large[0]
            return x @ self.head.weight.float().T

    torch.manual_seed(0)
    network, x = Net(), torch.randn(4, 3, 8, 8)
    network(x)  # statistics
    before = {name: t.clone() for name, t in network.state_dict().items()}
    common: dict[str, Any] = {"min_size": 0.0005, "bits": 4}
    model = method(raw_dtype=kind, **common).attach(network).eval()
    full = method(**common).attach(copy.deepcopy(network)).eval()
    assert model.save(tmp_path / "a") < full.save(tmp_path / "b")
    artifact = Artifact.load(tmp_path / "a")
    float16 = kind == "float16"
    assert artifact.raw["norm.running_var"].dtype == getattr(torch, kind)
    assert artifact.raw["steps"].dtype == torch.float32
    assert artifact.raw["large"].dtype == (torch.float32 if float16 else torch.bfloat16)
    assert artifact.raw["head.weight"].dtype == torch.float16 and "head.weight" not in artifact.narrow
    fresh = Net().eval()
    assert artifact.narrow >= {"norm.weight", "norm.running_mean"} and not any("again" in n for n in artifact.raw)
    artifact.load_into(fresh)
    assert torch.equal(fresh(x), model(x)) and not torch.equal(fresh(x), full(x))
    torch.testing.assert_close(fresh(x), full(x), rtol=0.05, atol=0.05 * full(x).abs().max().item())
    before["steps"] += 1  # in evaluation mode, too
    changed = {name for name, t in network.state_dict().items() if not torch.equal(t, before[name])}
    assert changed <= {"conv.weight"}
    state = load(tmp_path / "a")
    assert all(state[name].dtype == t.dtype and torch.equal(state[name], t) for name, t in artifact.state().items())
    with torch.no_grad():
        network.norm.bias.add_(1)
    assert not torch.equal(fresh(x), model(x))


def test_tensors_that_share_memory_are_stored_each(tmp_path: Path) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.randn(10)
            self.register_buffer("whole", whole)
            self.register_buffer("part", whole[2:7])
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight.data = self.a.weight.data

    network, fresh = Views(), Views()
    Artifact.of(network, {}, {}).save(tmp_path / "a")
    Artifact.load(tmp_path / "a").load_into(fresh)
    assert all(torch.equal(t, fresh.state_dict()[name]) for name, t in network.state_dict().items())


def test_files_of_torch_and_places_that_are_none_are_told(tmp_path: Path) -> None:
    torch.save(ConvNet().state_dict(), tmp_path / "mine.pth")
    with pytest.raises(ArtifactError, match=r"saved by torch; load it with torch\.load"):
        Artifact.load(tmp_path / "mine.pth")
    for place in (tmp_path, tmp_path / "nowhere" / "a"):
        with pytest.raises(ArtifactError, match="give a file in a folder"):
            stored(ConvNet(), place)


def test_a_large_network_is_filled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """All decoded weights at once would need the memory of a second network."""
    network = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 8))
    network[3].weight = network[2].weight
    stored, other = RTN(bits=3, min_size=0).attach(copy.deepcopy(network)).artifact(), copy.deepcopy(network)
    load, sizes = nn.Module.load_state_dict, list[int]()

    def counted(self: nn.Module, state: dict[str, Tensor], **options: Any) -> Any:
        sizes.append(len(state))
        return load(self, state, **options)

    monkeypatch.setattr("bitfront.quant.storage.artifact.PART", 0)
    monkeypatch.setattr(nn.Module, "load_state_dict", counted)
    stored.load_into(other)
    assert max(sizes) == 2  # a tensor and its alias
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in stored.state().items())
