"""Networks in ONNX: what onnxruntime makes of packed weights, against what we decode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from conftest import NETWORKS, TiedGPT, cli
from torch import Tensor, nn

import bitfront
from bitfront import GPTQ, RTN, Artifact, BitfrontError, DiffQ, Packed
from bitfront.exports.onnx.graph import Blocks, Builder, Place, weight

ALL: dict[str, Any] = {"min_size": 0.0, "exclude": ["bias"]}


def run(build: Any, *inputs: tuple[str, Tensor, list[Any]]) -> np.ndarray:
    """The output of a graph of one output, ``build(builder, values)``."""
    values = [ir.Value(name=n, shape=ir.Shape(s), type=ir.TensorType(ir.DataType.FLOAT)) for n, _, s in inputs]
    opsets = {"": 25, "com.microsoft": 1}
    graph = ir.Graph(values, [], nodes=[], opset_imports=opsets, name="g")
    output = build(Builder(graph), *values)
    output.type = ir.TensorType(ir.DataType.FLOAT)
    graph.outputs.append(output)
    content = ir.to_proto(ir.Model(graph, ir_version=13)).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, {name: x.numpy() for name, x, _ in inputs})[0]


def packed(
    shape: tuple[int, ...], widths: list[int], scales: int, groups: int, rows: int = 0, **options: Any
) -> Packed:
    """Random codes, and grids of which one is constant and one falls."""
    bits = torch.tensor(widths, dtype=torch.uint8)
    values = -(-torch.Size(shape).numel() // groups) if not rows else options["values"]
    largest = (1 << bits.int()).expand(groups)[:, None]
    codes = (torch.rand(groups, values) * largest).int()
    codes = codes.to(torch.uint8 if max(widths) <= 8 else torch.int16)
    lo, span = torch.randn(scales), torch.randn(scales)
    span[0] = 0 if scales > 1 else span[0]
    dtype = options.get("dtype", torch.float32)
    return Packed(codes, bits, lo.to(dtype), span.to(dtype), torch.Size(shape), rows)


torch.manual_seed(0)
CASES = {
    **{f"{bits} bits": packed((6, 10), [bits], 6, 6) for bits in range(1, 16)},
    "of the tensor": packed((6, 10), [3], 1, 1),
    "a vector": packed((7,), [4], 1, 1),
    "padded": packed((3, 5, 3), [2], 12, 12),
    "padded groups with one grid": packed((3, 5, 3), [5], 1, 12),
    "rows of padded groups": packed((4, 10), [4], 12, 12, rows=4, values=4),
    "half": packed((6, 10), [4], 6, 6, dtype=torch.float16),
    "bfloat16": packed((6, 10), [9], 6, 6, dtype=torch.bfloat16),
    "widths of all kinds": packed((15, 8), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], 1, 15),
    "widths, a grid for each row": packed((4, 16), [2, 8, 3, 8, 2, 2, 4, 3], 4, 8),
    **{
        f"grids in {n} bits": RTN(bits=3, group_size=8, scale_bits=n, **ALL).solve(torch.randn(5, 24), None)[0]
        for n in (3, 6, 8)
    },
    **{
        f"{len(axes)} axes in another order": replace(packed((8, 6, 4), [3], scales, 24), view=view, axes=axes)
        for view, axes, scales in (((), (1, 0, 2), 6), ((8, 6, 2, 2), (3, 1, 0, 2), 24))
    },
    "rows of padded groups, transposed": replace(packed((10, 4), [4], 12, 12, rows=4, values=4), axes=(1, 0)),
    "widths, padded": packed((3, 5, 3), [2, 3, 2, 4, 7, 2, 3, 2, 2, 3, 9, 12], 1, 12, dtype=torch.float16),
}


def test_rows_that_are_columns_are_no_product_in_few_bits() -> None:
    """Of which the operator has the rows as they are stored."""
    assert Blocks.of(packed((24, 64), [4], 24, 24)) and not Blocks.of(
        replace(packed((24, 64), [4], 64, 64), axes=(1, 0))
    )


@pytest.mark.parametrize("case", CASES)
def test_weights_are_decoded_to_the_last_bit(case: str) -> None:
    found = run(lambda build: weight(build, CASES[case]))
    assert np.array_equal(found, CASES[case].decode().numpy())


PRODUCTS = {
    **{f"{bits} bits": packed((24, 70), [bits], 24, 24) for bits in range(1, 9)},
    "of the tensor": packed((24, 64), [4], 1, 1),
    "groups of 32": packed((24, 96), [2], 72, 72),
    "groups of 256": packed((24, 512), [2], 48, 48),
    "groups with one grid for each row": packed((24, 96), [3], 24, 72),
    "rows of padded groups": packed((24, 40), [4], 72, 72, rows=24, values=16),
    "few columns": packed((24, 5), [8], 24, 24),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_products_with_packed_weights(case: str) -> None:
    w, blocks = PRODUCTS[case].decode(), Blocks.of(PRODUCTS[case])
    assert blocks is not None and blocks.bits in (2, 4, 8)
    x, bias = torch.randn(2, 3, w.shape[1]), torch.randn(24)

    def build(builder: Builder, x: ir.Value) -> ir.Value:
        place = Place(None, x, builder.constant(bias.numpy()))  # type: ignore[arg-type]
        return next(blocks.products(builder, [place], 0))

    found = run(build, ("x", x, ["samples", 3, w.shape[1]]))
    assert np.abs(found - (x @ w.T + bias).numpy()).max() < 1e-5 * (x.abs() @ w.T.abs()).max()


@pytest.mark.parametrize(
    "other",
    [
        packed((24, 64), [9], 24, 24),
        packed((24, 64), [2, 3] * 12, 24, 24),
        packed((24, 64), [4], 192, 192),  # groups of 8
        packed((24, 48), [4], 48, 48),  # of 24
        packed((2, 3, 4), [4], 2, 2),
    ],
)
def test_what_the_operator_does_not_have_stays_with_the_weights(other: Packed) -> None:
    assert Blocks.of(other) is None


def saved(network: nn.Module, x: Tensor, path: Path, method: Any) -> nn.Module:
    """Save a quantized network; its decoded one."""
    if isinstance(method, DiffQ):
        model = bitfront.prepare(network, method).eval()
        with torch.no_grad():
            for p in model.quantizers.parameters():
                p.normal_(0, 2)
    else:
        model = bitfront.quantize(network, method, [x])
    model.save(path)
    return bitfront.load(path, into=network).eval()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", [RTN(bits=2, **ALL), DiffQ(min_size=0.0)], ids=["rtn", "diffq"])
def test_networks_give_the_same_outputs(name: str, method: Any, tmp_path: Path) -> None:
    kind, inputs = NETWORKS[name]
    network, x = kind().eval(), inputs()
    decoded = saved(network, x, tmp_path / "net", method)
    told = bitfront.to_onnx(kind(), tmp_path / "net", [x], tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    other = inputs()[:3]
    found = session.run(None, {session.get_inputs()[0].name: other.numpy()})[0]
    wanted = decoded(other).detach().numpy()
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max() and told.difference <= 1e-5
    floats = {i.name for i in onnx.load(tmp_path / "net.onnx").graph.initializer}
    assert not told.floats and not floats & Artifact.load(tmp_path / "net").packed.keys()


class Turned(nn.Module):
    """Of whose weights none has its outputs along its first axis."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.ConvTranspose1d(8, 6, 8, 4, 2)
        self.product, self.experts = nn.Parameter(torch.randn(6, 10)), nn.Parameter(torch.randn(2, 10, 12))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.up(x)).transpose(1, 2) @ self.product
        return torch.einsum("bti,eio->beto", torch.tanh(y), self.experts)


@pytest.mark.parametrize("products", [False, True])
def test_weights_in_another_order_come_out_as_they_were(products: bool, tmp_path: Path) -> None:
    x = torch.randn(4, 8, 9)
    decoded = saved(Turned().eval(), x, tmp_path / "net", GPTQ(bits=3, group_size=4, **ALL))
    packed = Artifact.load(tmp_path / "net").packed
    assert {name for name, p in packed.items() if p.axes} == {"up.weight", "product", "experts"} and packed[
        "up.weight"
    ].view
    told = bitfront.to_onnx(Turned(), tmp_path / "net", [x], tmp_path / "o", matmul_nbits=products)
    session = onnxruntime.InferenceSession(tmp_path / "o", providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": x[:3].numpy()})[0]
    assert np.abs(found - decoded(x[:3]).detach().numpy()).max() <= 1e-5 * np.abs(found).max()
    assert told.products == 0 and not told.floats


def test_the_file_has_the_codes_and_hardly_more(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    for bits in (2, 4, 8):
        saved(network, torch.randn(4, 256), tmp_path / "net", RTN(bits=bits, **ALL))
        for products, most in ((False, 1500), (True, 1500 + 2 * 256 * 8 * 2)):
            told = bitfront.to_onnx(
                network, tmp_path / "net", torch.randn(4, 256), tmp_path / "o", matmul_nbits=products
            )
            assert told.size == (tmp_path / "o").stat().st_size <= Artifact.load(tmp_path / "net").payload + most
            assert told.products == 2 * products


def test_a_tied_embedding_is_stored_once_and_a_linear_layer_computes_packed(tmp_path: Path) -> None:
    network = TiedGPT().eval()
    saved(network, torch.randint(40, (4, 6)), tmp_path / "net", RTN(bits=4, **ALL))
    tokens = torch.randint(40, (4, 6))
    told = bitfront.to_onnx(network, tmp_path / "net", tokens, tmp_path / "o", matmul_nbits=True, accuracy_level=0)
    graph = onnx.load(tmp_path / "o").graph
    assert told.products == 1 and sum(n.op_type == "MatMulNBits" for n in graph.node) == 1
    assert sum(list(i.dims)[-1] == 40 * 16 or list(i.dims)[::2] == [40, 16] for i in graph.initializer) == 1
    session = onnxruntime.InferenceSession(tmp_path / "o", providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": tokens[:1, :3].numpy()})[0].shape == (1, 3, 40)  # any number, any length


def test_half_networks_run_in_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, x = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).half().eval(), torch.randn(4, 6, 64).half()
    saved(network, x, tmp_path / "net", RTN(bits=4, **ALL))
    told = bitfront.to_onnx(network, tmp_path / "net", x, tmp_path / "o")
    assert told.difference < 1e-5 and next(network.parameters()).dtype == torch.float16


def test_accuracy_level_4_is_near(tmp_path: Path) -> None:
    network = nn.Linear(256, 64)
    saved(network, torch.randn(4, 256), tmp_path / "net", RTN(bits=4, **ALL))
    told = bitfront.to_onnx(network, tmp_path / "net", torch.randn(4, 256), tmp_path / "o", matmul_nbits=True)
    assert 1e-5 < told.difference < 0.05


class Asks(nn.Module):
    """A network whose path depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


class Random(Asks):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.rand_like(x)


@pytest.mark.parametrize(
    ("kind", "told"), [(Asks, "torch cannot export Asks"), (Random, "outputs differ by .* nothing is written")]
)
def test_what_cannot_be_exported_is_refused_and_leaves_no_file(kind: Any, told: str, tmp_path: Path) -> None:
    network = kind().eval()
    saved(network, torch.ones(4, 16), tmp_path / "net", RTN(bits=4, **ALL))
    with pytest.raises(BitfrontError, match=told):
        bitfront.to_onnx(network, tmp_path / "net", torch.ones(4, 16), tmp_path / "o")
    assert [*tmp_path.iterdir()] == [tmp_path / "net"]


def exported(task: str, root: Path) -> Any:
    words = [f"task={task}", "smoke=true", "trainer.accelerator=cpu", f"root={root}", f"data_root={root}"]
    done = cli("run", *words, "quant=rtn", "bits=3", "init_from=float")
    assert done.returncode == 0, done.stderr
    (file,) = root.glob(f"{task}/rtn/*/model.safetensors")
    return cli("export", f"artifact={file}", "format=onnx", f"out={root}/o.onnx", f"data_root={root}")


def test_a_run_by_command(root: Path) -> None:
    done = exported("vit", root)
    assert done.returncode == 0, done.stderr
    assert "inputs x [samples, 1, 8, 8]" in done.stdout and (root / "o.onnx").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["resnet", "lm", "asr", "separation"])
def test_other_tasks_by_command(task: str, tmp_path: Path) -> None:
    done = exported(task, tmp_path)
    assert done.returncode == 0, done.stderr
    length = {"lm": "[samples, length_1]", "asr": "[samples, length_1, 40]"}.get(task, "[samples, ")
    assert length in done.stdout


def own() -> nn.Module:
    """A network of the user's."""
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def batches() -> list[Tensor]:
    """Inputs of the user's."""
    return [torch.randn(5, 16)]


def test_a_network_of_the_users_own_by_command(tmp_path: Path) -> None:
    saved(own(), torch.randn(4, 16), tmp_path / "net", RTN(bits=4, **ALL))
    words = [f"artifact={tmp_path}/net", "format=onnx", f"out={tmp_path}/o.onnx"]
    done = cli("export", *words, "model=tests.test_onnx:own", "data=tests.test_onnx:batches", "matmul_nbits=true")
    assert done.returncode == 0 and "2 products" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["format=onnx"], "names no task of ours; give model= and data="),
        (["format=onnx", "model=tests.test_onnx:own"], "data= is needed with model="),
        (["format=float", "matmul_nbits=true"], "matmul_nbits: of format=onnx alone"),
        (["format=onnx", "accuracy_level=0"], "is of matmul_nbits=true"),
        (["format=onnx", "accuracy_level=7", "matmul_nbits=true"], "accuracy_level=7"),
    ],
)
def test_mistakes_are_told(words: list[str], told: str, tmp_path: Path) -> None:
    saved(own(), torch.randn(4, 16), tmp_path / "net", RTN(bits=4, **ALL))
    done = cli("export", f"artifact={tmp_path}/net", f"out={tmp_path}/o", *words)
    assert done.returncode == 1 and told in done.stderr and "Traceback" not in done.stderr


def test_without_the_packages_the_remedy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in [name for name in sys.modules if name.startswith("bitfront.exports")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    saved(own(), torch.randn(4, 16), tmp_path / "net", RTN(bits=4, **ALL))
    with pytest.raises(BitfrontError, match=r"onnxruntime: pip install 'bitfront\[onnx\]'"):
        bitfront.to_onnx(own(), tmp_path / "net", batches(), tmp_path / "o")
