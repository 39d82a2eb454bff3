"""What a file's header says of a packed tensor, believed only after it has been checked: a file may come from anyone.
Starts without torch."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitfront.errors import ArtifactError

MAX_BITS = 15  # codes fit int16
MAX_TABLE = 8
DIMENSIONS = 64  # of a tensor, and more
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Layout:
    """Of one entry.

    Attributes:
        shape: of the tensor.
        group_size: codes of a group, its padding included.
        lowest, highest: widths of groups, in bits.
        scales: how many pairs of numbers stand behind the codes.
        dtype: of these.
        rows, table: as in ``Packed``.
        coded: bytes of the entropy-coded widths; 0 where they are bit planes.
        view, axes: as in ``Packed``.
    """

    shape: tuple[int, ...]
    group_size: int
    lowest: int
    highest: int
    scales: int
    dtype: str
    rows: int
    table: int
    coded: int
    view: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()

    @classmethod
    def read(cls, told: Mapping[str, Any], nbytes: int) -> Layout:
        """Check that a tensor can look so.

        Args:
            told: as ``Packed.layout`` writes it.
            nbytes: length of the entry, which bounds the memory that its tensor may take.

        Raises:
            ArtifactError: it cannot.
        """
        try:
            (lowest, highest), rest = told["bits"], [told.get(key, 0) for key in ("rows", "table", "coded")]
            shape, size, scales = tuple(told["shape"]), told["group_size"], told["scales"]
            order = [tuple(told.get(key, ())) for key in ("view", "axes")]
            layout = cls(shape, size, lowest, highest, scales, told["dtype"], *rest, *order)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"a layout of the header is incomplete ({error!r}); the file is damaged") from None
        whole = (*shape, layout.group_size, lowest, highest, layout.scales, *rest, *order[0], *order[1])
        short = len(whole) < DIMENSIONS and all(type(n) is int and n <= 8 * nbytes for n in whole)
        if not short or not layout._holds(nbytes):  # products of long numbers would take minutes
            said = reprlib.repr(dict(told)) if short else "of the header"
            raise ArtifactError(f"no tensor has the layout {said} in {nbytes:,} bytes; the file is damaged")
        return layout

    @property
    def size(self) -> int:
        """Values of the tensor."""
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Values that are cut into groups together."""
        return self.size // max(self.rows, 1)

    @property
    def groups(self) -> int:
        """Of the tensor."""
        return max(self.rows, 1) * -(-self.columns // self.group_size)

    @property
    def lines(self) -> int:
        """As in ``Packed``; 1 of a number."""
        seen = self.view or self.shape or (1,)
        return self.rows or seen[self.axes[0] if self.axes else 0]

    def _holds(self, nbytes: int) -> bool:
        ranges = (
            all(n > 0 for n in (*self.shape, *self.view, self.group_size, self.scales))
            and 1 <= self.lowest <= self.highest <= MAX_BITS
            and self.dtype in DTYPES
            and self.rows >= 0
            and 0 <= self.table <= MAX_TABLE
            and self.coded >= 0
        )
        if not ranges or (self.rows and (self.size % self.rows or self.group_size > self.columns)):
            return False
        seen = self.view or self.shape
        if math.prod(seen) != self.size or ((self.axes or self.view) and sorted(self.axes) != [*range(len(seen))]):
            return False
        if self.table and (not self.shape or self.scales % self.lines):
            return False
        stored = self.size if self.rows else self.groups * self.group_size  # codes
        return self.groups % self.scales == 0 and stored * self.lowest <= 8 * nbytes
