"""Packed tensors: codes of 1 to 15 bits, and the one rule that turns them into weights.

A weight tensor is cut into groups of consecutive values; group ``g`` has its own width ``bits[g]``:

    w = lo + span * code / (2**bits - 1),        code in {0, ..., 2**bits - 1}

``lo`` and ``span`` are shared by the whole tensor, a row or a group. Every method of the suite ends in this form, and
evaluation is defined by it. As bytes, a tensor is

    widths of the groups | codes of all groups of the smallest width | ... of the largest width | lo | span

in the order of ``ordered``, where codes are bit planes: plane ``i`` holds bit ``i`` of every code. The widths are bit
planes too, or ``entropy``'s bytes if these are fewer. ``lo`` and ``span`` are floats each, or ``scales``' few bits: bit
planes | tops of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitfront.errors import ArtifactError
from bitfront.quant.storage import entropy
from bitfront.quant.storage.layout import Layout
from bitfront.quant.storage.scales import coarse, fine, told

_CHUNK = 1 << 16  # codes per step of packing, so that the planes stay in the processor's cache


def grouped(w: Tensor, group_size: int) -> Tensor:
    """View a weight as groups of consecutive values.

    Args:
        w: any shape.
        group_size: ``n`` for groups of n values in memory order, ``-1`` for one group per row (first
            dimension), ``0`` for one group in all. Where n does not divide the size, the last value is
            repeated to fill the last group.

    Returns:
        ``[groups, values per group]``; differentiable in ``w``.
    """
    if group_size == 0 or (group_size == -1 and w.dim() < 2):
        return w.reshape(1, -1)
    if group_size == -1:
        return w.reshape(w.shape[0], -1)
    flat = w.reshape(-1)
    missing = -flat.numel() % group_size
    if missing:
        flat = torch.cat([flat, flat[-1:].expand(missing)])
    return flat.view(-1, group_size)


def ungrouped(groups: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of ``grouped``: drop the padding of the last group and restore the shape."""
    return groups.reshape(-1)[: shape.numel()].view(shape)


def ordered(w: Tensor, view: Sequence[int], axes: Sequence[int]) -> Tensor:
    """A tensor in the order in which it is stored, where that is not its own: rows, one for each output, that have
    their inputs together.

    Args:
        w: any shape.
        view: the shape that it is seen as, where an axis is cut in several; () for its own.
        axes: of these, in the order of storage; () for their own.
    """
    return w.reshape(tuple(view) or w.shape).permute(*axes) if axes else w


def restored(w: Tensor, shape: torch.Size, view: Sequence[int], axes: Sequence[int]) -> Tensor:
    """The inverse of ``ordered``, of values in any shape."""
    if not axes:
        return w.view(shape)
    seen = tuple(view) or tuple(shape)
    back = sorted(range(len(axes)), key=axes.__getitem__)
    return w.reshape([seen[axis] for axis in axes]).permute(back).reshape(shape).contiguous()


def pack(codes: np.ndarray, width: int) -> np.ndarray:
    """Pack codes of ``width`` bits into bit planes.

    Args:
        codes: uint8 or uint16 ``[n]``, each below ``2**width``.
        width: 0..15; 0 takes no space.

    Returns:
        uint8 ``[width * ceil(n / 8)]``, plane after plane, the lowest bit first.
    """
    planes = np.empty((width, -(-codes.size // 8)), np.uint8)
    for start in range(0, codes.size, _CHUNK):
        chunk = codes[start : start + _CHUNK]
        halves = chunk.astype(np.uint8, copy=False), (chunk >> 8).astype(np.uint8) if width > 8 else chunk
        for bit in range(width):
            plane = np.packbits(halves[bit // 8] & np.uint8(1 << bit % 8), bitorder="little")
            planes[bit, start // 8 : start // 8 + plane.size] = plane
    return planes.ravel()


def unpack(planes: np.ndarray, width: int, n: int) -> np.ndarray:
    """The inverse of ``pack``: uint8 (up to 8 bits) or uint16 ``[n]``."""
    dtype = np.uint8 if width <= 8 else np.uint16
    codes: np.ndarray = np.zeros(n, dtype)
    rows = planes.reshape(width, -(-n // 8))
    for start in range(0, n, _CHUNK):
        chunk = codes[start : start + _CHUNK]
        for bit in range(width):
            plane = rows[bit, start // 8 : (start + chunk.size + 7) // 8]
            chunk |= np.left_shift(np.unpackbits(plane, count=chunk.size, bitorder="little"), bit, dtype=dtype)
    return codes


def packed_bytes(n: int, width: int) -> int:
    """Bytes that ``pack`` takes for ``n`` codes."""
    return width * -(-n // 8)


def kept(columns: int, group_size: int, rows: int) -> np.ndarray:
    """Which codes of ``[rows * groups of a row, group_size]`` are none of the padding of the rows, bool."""
    groups = -(-columns // group_size)
    one = np.arange(groups * group_size) < columns
    return np.tile(one.reshape(groups, group_size), (rows, 1))


@dataclass
class Packed:
    """One quantized tensor.

    Attributes:
        codes: ``[groups, group_size]``, uint8, or int16 when a group has more than 8 bits.
        bits: ``[groups]``, or ``[1]`` when all groups have the same width; uint8, 1..15.
        lo: ``[scales]`` floats, each shared by ``groups / scales`` consecutive groups.
        span: ``[scales]``, same dtype as ``lo``; negative and zero are fine.
        shape: of the tensor; the last group may be padded beyond it.
        rows: where each row is cut into groups by itself and its last group is padded, how many there are; 0 where the
            tensor is cut as a whole. The rows' padding is not stored.
        table: bits in which ``lo`` and ``span``, then float32, are stored; 0 for their own type.
        view, axes: the order in which the tensor is stored, as in ``ordered``.
    """

    codes: Tensor
    bits: Tensor
    lo: Tensor
    span: Tensor
    shape: torch.Size
    rows: int = 0
    table: int = 0
    view: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()

    @staticmethod
    def grid(bits: Tensor, lo: Tensor, span: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """First value, distance of neighbours and largest code of each group: ``[groups or 1, 1]`` each."""
        largest = (1 << bits.int()) - 1
        per_scale = groups // lo.numel()
        lo, span = (x.float().repeat_interleave(per_scale) if lo.numel() > 1 else x.float() for x in (lo, span))
        return lo[:, None], (span / largest)[:, None], largest[:, None]

    @classmethod
    @torch.no_grad()
    def nearest(cls, w: Tensor, bits: Tensor, lo: Tensor, span: Tensor, group_size: int, table: int = 0) -> Packed:
        """Round every weight to the nearest value of its group's grid (ties to the even code).

        Args:
            w: finite weights, any shape and float type.
            bits: ``[groups]`` or ``[1]``, integers 1..15.
            lo, span: ``[scales]``, as they are stored.
            group_size: as in ``grouped``.
            table: as of the attribute.
        """
        groups = grouped(w.float(), group_size)
        first, step, largest = cls.grid(bits, lo, span, len(groups))
        step = torch.where(step == 0, 1.0, step)  # a constant tensor: every code is 0
        codes = (groups - first).div_(step).round_().clamp_(min=0)
        torch.minimum(codes, largest.to(codes.dtype), out=codes)
        codes = codes.to(code_dtype(int(largest.max())))
        return cls(codes, bits.to(torch.uint8), lo.detach(), span.detach(), w.shape, 0, table)

    def to(self, device: torch.device) -> Packed:
        """On a device."""
        codes, bits, lo, span = (x.to(device) for x in (self.codes, self.bits, self.lo, self.span))
        return replace(self, codes=codes, bits=bits, lo=lo, span=span)

    def decode(self) -> Tensor:
        """The weights, float32 of ``shape``; the same bits on every device (no fused multiply-add)."""
        first, step, _ = self.grid(self.bits, self.lo, self.span, len(self.codes))
        values = self.codes.float().mul_(step).add_(first)
        if self.rows:
            values = values.view(self.rows, -1)[:, : self.shape.numel() // self.rows]
        flat, number = values.reshape(-1), self.shape.numel()
        # A slice of everything would cost two passes over the weight in training's backward.
        return restored(flat if len(flat) == number else flat[:number], self.shape, self.view, self.axes)

    def cut(self, w: Tensor) -> Tensor:
        """Numbers for each weight, as the codes lie: those of the tensor's ``shape`` as ``[groups, group_size]``; of
        padding, those before it."""
        seen = ordered(w, self.view, self.axes)
        if not self.rows:
            return grouped(seen.reshape(-1), self.codes.shape[1])
        lines = seen.reshape(self.rows, -1)
        missing = -lines.shape[1] % self.codes.shape[1]
        return torch.cat([lines, lines[:, -1:].expand(-1, missing)], 1).reshape(self.codes.shape)

    @property
    def lines(self) -> int:
        """Rows, each with grids of its own."""
        seen = self.view or self.shape or (1,)
        return self.rows or seen[self.axes[0] if self.axes else 0]

    def rule_bits(self) -> int:
        """Bits by the papers' size rule: the codes, and two numbers (of 32 bits in the papers) per scale."""
        return sum(width * n for width, n in enumerate(self.width_counts())) + 8 * self.scales_bytes

    def layout(self) -> dict[str, Any]:
        """What the header says of this tensor; with it the entry's bytes can be read."""
        return {
            "shape": list(self.shape),
            "group_size": self.codes.shape[1],
            "bits": [int(self.bits.min()), int(self.bits.max())],
            "scales": self.lo.numel(),
            "dtype": told(self.lo.dtype),
            **({"rows": self.rows} if self.rows else {}),
            **({"table": self.table} if self.table else {}),
            **({"view": list(self.view)} if self.view else {}),
            **({"axes": list(self.axes)} if self.axes else {}),
            **({"coded": len(coded)} if (coded := self._coded()) is not None else {}),
        }

    def width_counts(self) -> list[int]:
        """How many stored codes have 0, 1, 2, ... bits."""
        bits = self.bits.long().expand(len(self.codes)).cpu()
        if not self.rows:
            return (torch.bincount(bits) * self.codes.shape[1]).tolist()
        return torch.bincount(bits, torch.from_numpy(self._kept().sum(1))).long().tolist()

    def _kept(self) -> np.ndarray:
        return kept(self.shape.numel() // self.rows, self.codes.shape[1], self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the entry in the file."""
        return self._codes_bytes() + len(self._widths()) + self.scales_bytes

    @property
    def estimate(self) -> int:
        """About as many, in no time."""
        widths = torch.bincount(self.bits.long().expand(len(self.codes)).cpu() - int(self.bits.min())).numpy()
        plain = packed_bytes(len(self.codes), (len(widths) - 1).bit_length())
        return self._codes_bytes() + min(plain, entropy.estimate(widths)) + self.scales_bytes

    def _codes_bytes(self) -> int:
        return sum(packed_bytes(n, width) for width, n in enumerate(self.width_counts()))

    @property
    def scales_bytes(self) -> int:
        """Bytes of ``lo`` and ``span`` in the file."""
        if self.table:
            return 2 * (packed_bytes(self.lo.numel(), self.table) + 2 * self.lines)
        return 2 * self.lo.numel() * self.lo.itemsize

    def _offsets(self) -> np.ndarray:
        """Of the widths from the smallest one, uint8 ``[groups]``."""
        bits = np.broadcast_to(self.bits.cpu().numpy(), len(self.codes))
        return bits - bits.min()

    def _coded(self) -> np.ndarray | None:
        """The widths in fewer bytes than bit planes, if that is so."""
        offsets = self._offsets()
        plain = packed_bytes(len(offsets), int(offsets.max()).bit_length())
        coded = entropy.encode(offsets) if plain > entropy.LEAST else None
        return coded if coded is not None and len(coded) < plain else None

    def _widths(self) -> np.ndarray:
        offsets = self._offsets()
        return pack(offsets, int(offsets.max()).bit_length()) if (coded := self._coded()) is None else coded

    def to_bytes(self) -> Tensor:
        """The entry in the file, uint8 ``[bytes]``."""
        codes = self.codes.cpu().numpy()
        codes = codes.view(np.uint16) if codes.dtype == np.int16 else codes
        bits = np.broadcast_to(self.bits.cpu().numpy(), len(codes))
        lowest, highest = int(bits.min()), int(bits.max())
        parts = [self._widths()]
        stored = self._kept() if self.rows else None
        for width in np.unique(bits).tolist():
            here = codes if lowest == highest else codes[bits == width]
            if stored is not None:
                here = here[stored if lowest == highest else stored[bits == width]]
            parts.append(pack(here.ravel(), width))
        for x in (self.lo.cpu(), self.span.cpu()):
            if self.table:
                q, tops = coarse(x.view(self.lines, -1), self.table)
                parts += [pack(q.numpy().ravel(), self.table), tops.ravel().view(torch.uint8).numpy()]
            else:
                parts.append(x.contiguous().view(torch.uint8).numpy())
        return torch.from_numpy(np.concatenate(parts))

    @classmethod
    def from_bytes(cls, data: Tensor, layout: Mapping[str, Any]) -> Packed:
        """Read an entry.

        Raises:
            ArtifactError: the layout is none, or the entry is not what it says.
        """
        if data.dtype != torch.uint8 or data.dim() != 1:
            raise ArtifactError(f"an entry is {data.dtype} {list(data.shape)}, not bytes; the file is damaged")
        at = Layout.read(layout, data.numel())
        rest = data.numpy()

        def take(n: int) -> np.ndarray:
            nonlocal rest
            if n > rest.size:
                raise ArtifactError("an entry is shorter than its header says; the file is damaged, write it again")
            head, rest = rest[:n], rest[n:]
            return head

        width = (at.highest - at.lowest).bit_length()
        offsets = (
            entropy.decode(take(at.coded), at.groups)
            if at.coded
            else unpack(take(packed_bytes(at.groups, width)), width, at.groups)
        )
        bits = offsets + np.uint8(at.lowest)
        if (bits.min(), bits.max()) != (at.lowest, at.highest):
            raise ArtifactError("an entry has other widths than its header says; the file is damaged")
        stored = kept(at.columns, at.group_size, at.rows) if at.rows else None
        codes = _codes(take, bits, at.group_size, stored)
        lo, span = (_numbers(take, at) for _ in range(2))
        if rest.size:
            raise ArtifactError("an entry is longer than its header says; the file is damaged, write it again")
        if not torch.isfinite(lo.float() + span.float()).all():  # which neither may make infinite, nor both
            raise ArtifactError("an entry has scales that are not finite; the file is damaged")
        codes_tensor = torch.from_numpy(codes if at.highest <= 8 else codes.view(np.int16))
        bits_tensor = torch.from_numpy(bits[:1].copy() if at.lowest == at.highest else bits)
        return cls(codes_tensor, bits_tensor, lo, span, torch.Size(at.shape), at.rows, at.table, at.view, at.axes)


def _codes(
    take: Callable[[int], np.ndarray], bits: np.ndarray, group_size: int, stored: np.ndarray | None
) -> np.ndarray:
    """Codes ``[groups, group_size]``, read width by width; those that are not stored are 0."""
    codes: np.ndarray = np.zeros((len(bits), group_size), np.uint8 if bits.max() <= 8 else np.uint16)
    for width in np.unique(bits).tolist():
        here = np.flatnonzero(bits == width)
        if stored is None:
            n = len(here) * group_size
            codes[here] = unpack(take(packed_bytes(n, width)), width, n).reshape(-1, group_size)
        else:
            part, kept_here = np.zeros_like(codes[here]), stored[here]
            n = int(np.count_nonzero(kept_here))
            part[kept_here] = unpack(take(packed_bytes(n, width)), width, n)
            codes[here] = part
    return codes


def _numbers(take: Callable[[int], np.ndarray], at: Layout) -> Tensor:
    """``lo`` or ``span``, ``[scales]``."""
    if at.table:
        q = unpack(take(packed_bytes(at.scales, at.table)), at.table, at.scales).reshape(at.lines, -1)
        tops = torch.from_numpy(take(2 * at.lines).copy()).view(torch.float16)
        return fine(torch.from_numpy(q), tops[:, None], at.table).view(-1)
    dtype = getattr(torch, at.dtype)
    return torch.from_numpy(take(at.scales * dtype.itemsize).copy()).view(dtype)


def middle_code(bits: int) -> float:
    """The code that stands for 0 in a symmetric grid: integers -2^(b-1)..2^(b-1)-1, but ±½ for one bit."""
    return 2.0 ** (bits - 1) if bits > 1 else 0.5


def code_dtype(largest: int) -> torch.dtype:
    """The type of codes up to ``largest``."""
    return torch.uint8 if largest < 256 else torch.int16
