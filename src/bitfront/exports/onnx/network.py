"""A network with packed weights as an ONNX file: exported by torch, its weights packed again, run and compared."""

from __future__ import annotations

import io
import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import torch
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    RemoveUnusedNodesPass,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bitfront.errors import BitfrontError, first_line
from bitfront.exports.onnx.examples import SAMPLES, Example
from bitfront.exports.onnx.graph import MICROSOFT, Blocks, Builder, Place, weight
from bitfront.files import write_atomically
from bitfront.progress import phase
from bitfront.quant.forwards.parametrized import duplicate
from bitfront.quant.storage.artifact import Artifact
from bitfront.quant.storage.packed import Packed

OPSET, OPSET_OF_2_BITS = 21, 25  # the first with uint4 and uint16, and with uint2
EXACT, SUMMED, ROUNDED = 1e-5, 1e-4, 0.2  # differences that are let pass; of matmul_nbits at accuracy_level 0, and else


@dataclass
class Exported:
    """What came out.

    Attributes:
        size: of the file, bytes.
        difference: of the outputs in ONNX Runtime from the decoded network's, at most, over the largest of theirs.
        inputs: name and shape of each; a name in place of a size that may change.
        products: linear layers that are MatMulNBits.
        floats: quantized tensors that are not in the graph under their names, whose weights would be float.
    """

    size: int
    difference: float
    inputs: dict[str, list[int | str]]
    products: int
    floats: list[str]

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {shape}".replace("'", "") for name, shape in self.inputs.items())
        told = f"{self.size:,} bytes; in onnxruntime its outputs differ by {self.difference:.2g} of the largest"
        products = f"; {self.products} products in few bits" if self.products else ""
        floats = f"; not packed, as the graph does not have them: {', '.join(self.floats)}" if self.floats else ""
        return f"{told}; inputs {shapes}{products}{floats}"


def export(
    network: nn.Module, artifact: Artifact, examples: Sequence[Example], out: Path, accuracy_level: int | None = None
) -> Exported:
    """Write a network with an artifact's weights as an ONNX file, whose weights are packed.

    Args:
        network: of the artifact's architecture; stays as it is.
        artifact: with the weights.
        examples: calls, at least one; sizes in which they differ may change in the file.
        out: the file; is written when its outputs have been compared.
        accuracy_level: of MatMulNBits, in which then linear layers are computed whose widths and groups fit; None has
            none.

    Raises:
        BitfrontError: the artifact is another network's, an operator cannot be exported, or the outputs differ.
    """
    network = duplicate(network).cpu().eval().requires_grad_(False)
    artifact.load_into(network)
    network, examples = network.float(), [example.float() for example in examples]  # of half networks, too
    for name, packed in artifact.packed.items():  # not rounded to half
        network.get_parameter(name).copy_(packed.decode())
    bits = min((int(packed.bits.min()) for packed in artifact.packed.values()), default=8)
    with phase("exporting the network"):
        model = graph(network, examples, OPSET_OF_2_BITS if bits <= 2 else OPSET)
        products, floats = packed_again(model.graph, artifact, accuracy_level)
        if products:
            model.opset_imports[MICROSOFT] = 1
        name_sizes(model.graph)
        content = serialized(model)
    with phase("comparing the outputs"):
        most = difference(network, content, examples)
    allowed = EXACT if not products else ROUNDED if accuracy_level else SUMMED
    if not most <= allowed:
        remedy = "; give accuracy_level=0" if products and accuracy_level else ""
        raise BitfrontError(
            f"in onnxruntime the outputs differ by {most:.2g} of the largest, more than {allowed:g}, and nothing is "
            f"written{remedy}"
        )
    write_atomically(out, content)
    return Exported(len(content), most, {str(x.name): _sizes(x) for x in model.graph.inputs}, products, floats)


def packed_again(graph: ir.Graph, artifact: Artifact, accuracy_level: int | None) -> tuple[int, list[str]]:
    """Put codes in the place of the quantized weights.

    Returns:
        How many linear layers compute with the codes; the tensors that are not in the graph under their names.
    """
    build, products, floats = Builder(graph), 0, []
    for name, packed in artifact.packed.items():
        names = [name, *(alias for alias, of in artifact.tied.items() if of == name)]
        found = [graph.initializers[n] for n in names if n in graph.initializers]
        if not found:
            floats.append(name)
            continue
        for alias in found[1:]:
            alias.replace_all_uses_with(found[0])
        products += replace(build, found[0], packed, accuracy_level)
        for value in found:
            for node, _ in value.uses():
                graph.remove(node, safe=True)  # a transposition of which nothing comes any more
            del graph.initializers[str(value.name)]
    return products, floats


def name_sizes(graph: ir.Graph) -> None:
    """Call sizes that may change samples and lengths, not s77."""
    names: dict[str, str] = {}
    for x in graph.inputs:
        for n, size in enumerate(_sizes(x)):
            if isinstance(size, str) and size not in names:
                names[size] = f"length_{len(names)}" if n else "samples"
    for x in (*graph.inputs, *graph.outputs):
        x.shape = ir.Shape(
            [
                re.sub(r"\w+", lambda found: names.get(found[0], found[0]), d) if isinstance(d, str) else d
                for d in _sizes(x)
            ]
        )


def _sizes(x: ir.Value) -> list[int | str]:
    return [d if isinstance(d, int) else str(d.value) for d in x.shape or ()]


def serialized(model: ir.Model) -> bytes:
    """The file, without what only tells of the export."""
    for shrink in CommonSubexpressionEliminationPass(), RemoveUnusedNodesPass(), ClearMetadataAndDocStringPass():
        shrink(model)
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]  # the shapes of values, which runtimes find by themselves
    for node in proto.graph.node:
        node.ClearField("name")
    return proto.SerializeToString()


def graph(network: nn.Module, examples: Sequence[Example], opset: int) -> ir.Model:
    """As torch exports it, without any folding: weights keep their names.

    Raises:
        BitfrontError: with what cannot be exported.
    """
    example = examples[0].first(max(2, examples[0].samples))  # torch takes a size of 1 for a constant
    try:
        with _silent():
            program = torch.onnx.export(
                network,
                example.args,
                kwargs=example.kwargs,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=opset,
                dynamic_shapes=example.dynamic(network, examples[1:]),
            )
    except Exception as error:  # whatever torch raises of a stranger's forward
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise BitfrontError(
            f"torch cannot export {type(network).__name__} to ONNX ({type(cause).__name__}: {first_line(cause)}); "
            "write that part of its forward otherwise, or give format=float"
        ) from error
    assert program is not None
    return program.model


def replace(build: Builder, value: ir.Value, packed: Packed, accuracy_level: int | None) -> int:
    """Put nodes that make the weights of codes in the place of an initializer, or products that have the codes.

    Returns:
        How many products.
    """
    layers = [] if accuracy_level is None else linear(value)
    blocks = Blocks.of(packed) if layers else None
    if blocks is None:
        build.before = build.graph[0]
        w, dtype = weight(build, packed), value.dtype or ir.DataType.FLOAT
        w = w if dtype == ir.DataType.FLOAT else build.node("Cast", w, to=dtype)
        value.replace_all_uses_with(w)
        w.name = value.name
        return 0
    for layer, y in zip(layers, blocks.products(build, layers, accuracy_level or 0), strict=True):
        old = layer.node.outputs[0]
        old.replace_all_uses_with(y, replace_graph_outputs=True)
        build.graph.remove(layer.node, safe=True)
        y.type, y.shape, y.name, old.name = old.type, old.shape, old.name, None
    return len(layers)


def linear(w: ir.Value) -> list[Place]:
    """The products of inputs with a weight's transpose; none, if it is used otherwise, too."""
    nodes: list[ir.Node] = []
    for node, index in w.uses():
        if node.op_type == "Gemm" and index == 1 and _plain(node):
            nodes.append(node)
        elif node.op_type == "Transpose" and all((n.op_type, i) == ("MatMul", 1) for n, i in node.outputs[0].uses()):
            nodes += [n for n, _ in node.outputs[0].uses()]
        else:
            return []
    if w.dtype != ir.DataType.FLOAT:
        return []
    biases = [node.inputs[2] if len(node.inputs) > 2 else None for node in nodes]
    return [Place(n, x, bias) for n, bias in zip(nodes, biases, strict=True) if (x := n.inputs[0]) is not None]


def _plain(gemm: ir.Node) -> bool:
    scales = gemm.attributes.get_float("alpha", 1.0), gemm.attributes.get_float("beta", 1.0)
    return scales == (1.0, 1.0) and (gemm.attributes.get_int("transA", 0), gemm.attributes.get_int("transB", 0)) == (
        0,
        1,
    )


@torch.no_grad()
def difference(network: nn.Module, content: bytes, examples: Sequence[Example]) -> float:
    """How far outputs in ONNX Runtime are from a network's, at most, over the largest of each; on several
    numbers of samples of each example.

    Raises:
        BitfrontError: it does not run.
    """
    options, most = onnxruntime.SessionOptions(), 0.0
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        inputs = session.get_inputs()
        sizes = [inputs[0].shape[0]] if isinstance(inputs[0].shape[0], int) else [SAMPLES, 1, 3]
        for batch in [example.first(size) for example in examples for size in sizes]:
            fed = {x.name: t.numpy() for x, t in zip(inputs, batch.tensors, strict=True)}
            theirs = [torch.from_numpy(x) for x in session.run(None, fed)]
            ours = [x for x in tree_leaves(network(*batch.args, **batch.kwargs)) if isinstance(x, Tensor)]
            most = max(most, *map(_apart, ours, theirs), 0.0 if len(ours) == len(theirs) else math.inf)
    except Exception as error:  # whatever the runtime raises: its own have no common class
        raise BitfrontError(f"onnxruntime does not run the exported network: {first_line(error)}") from error
    return most


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """Infinite where shapes, whole numbers or infinities differ."""
    finite = ours.isfinite()
    if ours.shape != theirs.shape or not torch.equal(ours[~finite], theirs[~finite]):
        return math.inf
    if not ours.is_floating_point():
        return 0.0 if torch.equal(ours, theirs) else math.inf
    a, b = ours[finite].double(), theirs[finite].double()
    largest = a.abs().max().item() if a.numel() else 0.0
    return (a - b).abs().max().item() / largest if largest else float(b.any())


@contextmanager
def _silent() -> Iterator[None]:
    """Without what torch prints and warns of while it exports."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
