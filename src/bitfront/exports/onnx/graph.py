"""Packed tensors in an ONNX graph: codes as uint2, uint4, uint8 or uint16, the narrowest that a width fits, and nodes
that make the weights of them by the rule of ``packed``, w = Cast(codes) * (span / largest) + lo. Codes of several
widths are stored by type, and come to their places by the table of their groups' widths.

Runtimes compute that once, when they load the file: it saves bytes, not time. (Of DequantizeLinear in Cast's place,
ONNX Runtime would compute it in each run.) MatMulNBits, an operator of ONNX Runtime's own, keeps the codes of a linear
layer packed while it computes. Its zero z is whole; what is left of the float zero is a product with sums of the inputs
of each block of a row:

    y = x (step (codes - z))ᵀ + (sums of x) (lo + step z)ᵀ,    z = -lo / step, rounded and clipped
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from bitfront.quant.storage.packed import Packed
from bitfront.quant.storage.scales import coarse

TYPES = {2: ir.DataType.UINT2, 4: ir.DataType.UINT4, 8: ir.DataType.UINT8, 16: ir.DataType.UINT16}
FLOATS = {torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}
MICROSOFT = "com.microsoft"
LEAST, MOST = 16, 128  # values of a block: what the operator takes, and what it computes fastest with
SHARED = 256  # bytes of constants that are looked for among those that are there


def fitting(bits: int) -> int:
    """Bits of the narrowest type for codes of a width."""
    return next(width for width in TYPES if width >= bits)


LARGEST = 2.0 ** np.arange(16, dtype=np.float32) - 1  # code, by width
KINDS = np.array([0, *map(fitting, range(1, 16))], np.int32)  # bits of the type, by width


class Builder:
    """Writes nodes and initializers into a graph.

    Args:
        graph: is written to.

    Attributes:
        before: the node that new ones come before; None for the end.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph, self.before, self._count = graph, next(iter(graph), None), 0
        self._shared: dict[tuple[object, ...] | None, ir.Value] = {}

    def node(self, kind: str, *inputs: ir.Value, domain: str = "", **attributes: int | list[int]) -> ir.Value:
        """The output of a new node."""
        node = ir.node(kind, inputs, attributes, domain=domain, outputs=[ir.Value(name=self._name())])
        if self.before is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self.before, node)
        return node.outputs[0]

    def constant(self, values: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
        """An initializer; codes of few bits are packed. Small ones are there once."""
        values = np.ascontiguousarray(values)
        key = (dtype, values.dtype, values.shape, values.tobytes()) if values.nbytes <= SHARED else None
        if key in self._shared:
            return self._shared[key]
        tensor = ir.tensor(values, dtype, name=self._name())
        value = ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype))
        value.shape = ir.Shape(values.shape)
        self.graph.register_initializer(value)
        if key is not None:
            self._shared[key] = value
        return value

    def codes(self, codes: np.ndarray, bits: int) -> ir.Value:
        """Codes of so many bits, in the narrowest type that has them."""
        width = fitting(bits)
        return self.constant(codes.astype(np.uint8 if width <= 8 else np.uint16), TYPES[width])

    def integers(self, *values: int) -> ir.Value:
        """A shape, or axes."""
        return self.constant(np.array(values, np.int64))

    def floats(self, x: Tensor) -> ir.Value:
        """Numbers of any type, as float32; stored as they are."""
        if x.dtype == torch.float32:
            return self.constant(x.cpu().numpy())
        stored = self.constant(x.cpu().view(torch.int16).numpy().view(FLOATS[x.dtype].numpy()), FLOATS[x.dtype])
        return self.cast(stored)

    def cast(self, x: ir.Value) -> ir.Value:
        """As float32."""
        return self.node("Cast", x, to=ir.DataType.FLOAT)

    def _name(self) -> str:
        self._count += 1
        return f"packed_{self._count}"


def weight(build: Builder, packed: Packed) -> ir.Value:
    """A tensor's weights, float32 of its shape."""
    codes, bits = unsigned(packed.codes), packed.bits.cpu().numpy()
    shape, size, rows = (packed.lo.numel(), -1, codes.shape[1]), packed.shape.numel(), packed.rows or 1
    lo, span = (_numbers(build, x, packed) for x in (packed.lo, packed.span))
    if (bits == bits[0]).all():
        values = build.cast(build.codes(codes.reshape(shape), bits[0]))
        largest = build.constant(LARGEST[bits[0]])
    else:
        table = build.node("Cast", build.codes(bits, 4), to=ir.DataType.INT32)
        values = build.node("Reshape", _placed(build, codes, bits, table), build.integers(*shape))
        largest = build.node("Gather", build.constant(LARGEST), table)
        largest = build.node("Reshape", largest, build.integers(shape[0], -1, 1))
    scaled = build.node("Mul", values, build.node("Div", span, largest))
    values = build.node("Add", scaled, lo)
    if codes.size != size:  # padding, of the last group or of each row's
        values = build.node("Reshape", values, build.integers(rows, -1))
        values = build.node("Slice", values, build.integers(0), build.integers(size // rows), build.integers(1))
    if packed.axes:
        seen = packed.view or packed.shape
        values = build.node("Reshape", values, build.integers(*(seen[axis] for axis in packed.axes)))
        values = build.node("Transpose", values, perm=np.argsort(packed.axes).tolist())
    return build.node("Reshape", values, build.integers(*packed.shape))


def _numbers(build: Builder, x: Tensor, packed: Packed) -> ir.Value:
    """``lo`` or ``span``, ``[scales, 1, 1]``, as few bits where the tensor has them so."""
    if not packed.table:
        return build.floats(x[:, None, None])
    q, tops = coarse(x.cpu().view(packed.lines, -1), packed.table)
    share = build.node("Div", build.cast(build.codes(q.numpy(), packed.table)), build.constant(LARGEST[packed.table]))
    return build.node("Reshape", build.node("Mul", share, build.floats(tops)), build.integers(-1, 1, 1))


def _placed(build: Builder, codes: np.ndarray, bits: np.ndarray, table: ir.Value) -> ir.Value:
    """Codes ``[groups, values]`` of several widths as floats. The groups of a type are stored together; their places
    follow from the table of widths, as places of 32 bits would take half as much as the codes.
    """
    present, counts = np.unique(KINDS[bits], return_counts=True)
    parts = [build.cast(build.codes(codes[KINDS[bits] == kind], kind)) for kind in present]
    kinds = build.node("Unsqueeze", build.node("Gather", build.constant(KINDS), table), build.integers(1))
    own = build.node("Cast", build.node("Equal", kinds, build.constant(present)), to=ir.DataType.INT32)
    before = build.constant((np.cumsum(counts) - counts - 1).astype(np.int32))  # of the types stored before, and itself
    count = build.node("Add", build.node("CumSum", own, build.constant(np.array(0))), before)
    places = build.node("ReduceSum", build.node("Mul", own, count), build.integers(1), keepdims=0)
    values = build.node("Concat", *parts, axis=0) if len(parts) > 1 else parts[0]
    return build.node("Gather", values, places)


@dataclass
class Place:
    """A linear layer in the graph: ``node`` multiplies ``x`` with a weight's transpose, and adds a bias."""

    node: ir.Node
    x: ir.Value
    bias: ir.Value | None


@dataclass
class Blocks:
    """A linear layer's weights ``[rows, columns]`` in blocks of a row, as MatMulNBits has them.

    Attributes:
        bits: 2, 4 or 8.
        codes: uint8 ``[rows, blocks, values]``, padded with 0.
        step, zero, rest: ``[rows, blocks]``: w = step (codes - zero) + rest, with whole zeros of so many bits.
        columns: without the padding.
    """

    bits: int
    codes: np.ndarray
    step: np.ndarray
    zero: np.ndarray
    rest: np.ndarray
    columns: int

    @classmethod
    def of(cls, packed: Packed) -> Blocks | None:
        """None where the operator cannot have them: groups of other sizes, widths that differ or are too large."""
        widths = packed.bits.unique().tolist()
        if len(packed.shape) != 2 or packed.axes or len(widths) > 1 or widths[0] > 8:
            return None
        (rows, columns), scales = packed.shape, packed.lo.numel()
        along = packed.codes.numel() // scales  # values that share a scale
        if packed.codes.numel() == rows * columns and along % columns == 0:  # whole rows do
            size = min(MOST, max(LEAST, 1 << (columns - 1).bit_length()))
        elif along & (along - 1) == 0 and along >= LEAST and (packed.rows or columns % along == 0):
            size = min(MOST, along)
        else:
            return None
        bits, lines = fitting(widths[0]), unsigned(packed.codes).reshape(rows, -1)
        codes = np.pad(lines, ((0, 0), (0, -lines.shape[1] % size))).reshape(rows, -1, size)
        lo, step, _ = (x.cpu() for x in Packed.grid(packed.bits[:1], packed.lo, packed.span, scales))
        zero = torch.where(step == 0, 0.0, -lo / step).round().clamp(0, 2**bits - 1)
        shape = rows, codes.shape[1]
        step, zero, rest = (
            x.repeat_interleave(rows * shape[1] // scales).view(shape) for x in (step, zero, lo + step * zero)
        )
        return cls(bits, codes, step.numpy(), zero.numpy().astype(np.uint8), rest.numpy(), columns)

    def products(self, build: Builder, places: Sequence[Place], level: int) -> Iterator[ir.Value]:
        """The layer's outputs at each place.

        Args:
            build: takes the nodes.
            places: where the layer is.
            level: of accuracy, as the operator counts: 4 computes with inputs of 8 bits, 0 with float32.
        """
        (rows, blocks, size), rest = self.codes.shape, self.rest
        sizes = {"K": self.columns, "N": rows, "bits": self.bits, "block_size": size, "accuracy_level": level}
        stored, zero = (build.constant(packed_low_first(x, self.bits)) for x in (self.codes, self.zero))
        if (rest == rest[:, :1]).all():  # one grid for a row: the sum of all of it
            rest, blocks, size = rest[:, :1], 1, self.columns
        step, left = build.constant(self.step), build.constant(rest.T) if rest.any() else None
        for place in places:
            build.before = place.node
            y = build.node("MatMulNBits", place.x, stored, step, zero, domain=MICROSOFT, **sizes)
            if left is not None:
                y = build.node("Add", y, build.node("MatMul", _sums(build, place.x, self.columns, blocks, size), left))
            yield y if place.bias is None else build.node("Add", y, place.bias)


def _sums(build: Builder, x: ir.Value, columns: int, blocks: int, size: int) -> ir.Value:
    """Of each block of inputs ``[..., columns]``, ``[..., blocks]``."""
    rank = len(x.shape or ())
    if missing := blocks * size - columns:
        x = build.node("Pad", x, build.integers(*[0] * (2 * rank - 1), missing))
    x = build.node("Reshape", x, build.integers(*[0] * (rank - 1), blocks, size))
    return build.node("ReduceSum", x, build.integers(-1), keepdims=0)


def packed_low_first(codes: np.ndarray, bits: int) -> np.ndarray:
    """Several codes of the last dimension in a byte, the first in its lowest bits; that of the last byte is 0."""
    each = 8 // bits
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % each)])
    parts = padded.reshape(*codes.shape[:-1], -1, each) << (bits * np.arange(each, dtype=np.uint8))
    return np.bitwise_or.reduce(parts, axis=-1)


def unsigned(codes: Tensor) -> np.ndarray:
    """Codes as uint8 or uint16."""
    array = codes.cpu().numpy()
    return array.view(np.uint16) if array.dtype == np.int16 else array
