"""Types of GGUF files that have our grids, as bytes (layouts: ggml-common.h of llama.cpp):

    Q4_1, Q5_1    w = d q + m                32 values; d, m float16
    Q2_K, Q4_K    w = d s q - dmin t         256 values; d, dmin float16, and s, t whole numbers of each 16 or 32 values
    Q8_0          w = d q                    32 values; d float16, q from -128 on, so that 0 is on the grid

With s = t = 1 a block of the second is one grid, too: d = step and dmin = -lo. The last has grids whose lo / step is
whole, as of symmetric ones, in q = code + lo / step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bitfront.exports.blocks import Blocks, relative
from bitfront.quant.storage.packed import Packed
from bitfront.quant.storage.scales import EXACTLY

HALF, FLOAT = "F16", "F32"


def q4_1(q: np.ndarray, d: np.ndarray, m: np.ndarray) -> list[np.ndarray]:
    """The parts of blocks of 32 codes, uint8 ``[blocks, bytes]`` each.

    Args:
        q: codes, uint8 ``[blocks, 32]``.
        d, m: float16 ``[blocks, 1]``.
    """
    return [_bytes(d), _bytes(m), _interleaved(q, 16, 4)]


def q5_1(q: np.ndarray, d: np.ndarray, m: np.ndarray) -> list[np.ndarray]:
    """Likewise; the fifth bits stand before the others."""
    high = np.packbits(q >> 4, axis=1, bitorder="little")
    return [_bytes(d), _bytes(m), high, _interleaved(q & 15, 16, 4)]


def q2_k(q: np.ndarray, d: np.ndarray, m: np.ndarray) -> list[np.ndarray]:
    """Of 256; s in the lower and t in the upper half of a byte."""
    return [_same(q, [0x11] * 16), _interleaved(q, 32, 2), _bytes(d), _bytes(-m)]


def q4_k(q: np.ndarray, d: np.ndarray, m: np.ndarray) -> list[np.ndarray]:
    """Of 256; the first four s and t have a byte each, the others half of one (and two bits in the first, here 0)."""
    return [_bytes(d), _bytes(-m), _same(q, [1] * 8 + [0x11] * 4), _interleaved(q, 32, 4)]


def q8_0(q: np.ndarray, d: np.ndarray, m: np.ndarray) -> list[np.ndarray]:
    """Of 32; m is a multiple of d, float32."""
    zero = np.rint(m / np.where(d == 0, 1, d.astype(np.float32)))
    return [_bytes(d), (q + zero).astype(np.int8).view(np.uint8)]


@dataclass(frozen=True)
class Type:
    """One of them.

    Attributes:
        name: as GGUF has it.
        bits: of a code.
        size: values of a block.
        parts: as ``q4_1``.
        needs: of a grid, for messages.
    """

    name: str
    bits: int
    size: int
    parts: Callable[[np.ndarray, np.ndarray, np.ndarray], list[np.ndarray]]
    needs: str = "that all of 256 values of a row have"

    def encoded(self, blocks: Blocks) -> tuple[np.ndarray, float]:
        """The bytes of each row, uint8 ``[rows, bytes]``, and how far float16 moves values, in steps at most."""
        d, m = blocks.step.half(), blocks.lo.half()
        if self.parts is q8_0:
            m = d.float() * (blocks.lo / d.float()).nan_to_num(0).round().clamp(-128, 127 - blocks.largest)
        codes = blocks.codes.astype(np.uint8).reshape(-1, self.size)
        data = np.concatenate(self.parts(codes, *(x.numpy().reshape(-1, 1) for x in (d, m))), axis=1)
        return data.reshape(len(blocks.codes), -1), blocks.moved(m.float(), d.float())


TYPES = (
    *(Type("Q2_K", 2, 256, q2_k), Type("Q4_K", 4, 256, q4_k), Type("Q4_1", 4, 32, q4_1), Type("Q5_1", 5, 32, q5_1)),
    Type("Q8_0", 8, 32, q8_0, "with 0 on it (quant.symmetric=true)"),
)


def fitting(packed: Packed) -> Type | None:
    """The smallest type for codes of a tensor's widths; None for those that none has."""
    return next((kind for kind in TYPES if int(packed.bits.max()) <= kind.bits), None)


def smallest(packed: Packed) -> tuple[str, np.ndarray, float] | None:
    """A tensor in the smallest type that has its codes, or else its values as floats.

    Returns:
        The type, the data ``[rows, ...]``, and how far that moves values, at most, in steps of their grids; None where
        the codes have a type and its blocks do not fit the groups.
    """
    wide_enough = [kind for kind in TYPES if int(packed.bits.max()) <= kind.bits]
    cut = [(kind, blocks) for kind in wide_enough if (blocks := Blocks.of(packed, kind.size))]
    for kind, blocks in cut:
        data, moved = kind.encoded(blocks)
        if moved < EXACTLY:
            return kind.name, data, moved
    return _floats(packed) if cut or not wide_enough else None


def _floats(packed: Packed) -> tuple[str, np.ndarray, float]:
    """As float16, or as float32 where that would move them too far."""
    lo, step, _ = Packed.grid(packed.bits, packed.lo, packed.span, len(packed.codes))
    groups = packed.codes * step + lo
    moved = relative((groups.half().float() - groups).abs(), step, lo)
    values = packed.decode()
    return (HALF, values.half().numpy(), moved) if moved < EXACTLY else (FLOAT, values.numpy(), 0.0)


def _interleaved(q: np.ndarray, apart: int, bits: int) -> np.ndarray:
    """Codes that stand so far apart in one byte, the first in its lowest bits."""
    parts = q.reshape(len(q), -1, 8 // bits, apart) << (bits * np.arange(8 // bits, dtype=np.uint8)[:, None])
    return np.bitwise_or.reduce(parts, axis=2).reshape(len(q), -1)


def _bytes(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.astype("<f2")).view(np.uint8)


def _same(q: np.ndarray, values: list[int]) -> np.ndarray:
    return np.tile(np.array(values, np.uint8), (len(q), 1))
