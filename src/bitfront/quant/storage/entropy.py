"""Symbols in as many bits as they carry: range asymmetric numeral systems (rANS; Duda 2013, arXiv 1311.2540), in lanes
that numpy works on together.

    encode:  x <- (x // f) M + c + x mod f,      decode:  x <- f (x // M) + x mod M - c

``f`` of ``M = 2**12`` is the frequency of a symbol, ``c`` that of all smaller ones; a state that leaves
``[2**16, 2**32)`` gives or takes 16 bits. As bytes:

    number of symbols - 1 (1 byte) | f of each (2 bytes) | states of the lanes (4 bytes) | words of 16 bits
"""

from __future__ import annotations

import numpy as np

from bitfront.errors import ArtifactError

BITS = 12
M = 1 << BITS
LANE = 1024  # symbols of a lane; its state costs 4 bytes
LEAST = 10  # bytes that ``encode`` takes for whatever has two symbols
LOW, WORD = np.uint64(1 << 16), np.uint64(16)


def encode(symbols: np.ndarray) -> np.ndarray:
    """Encode ``[n]`` symbols, each 0..255.

    Returns:
        uint8, shorter than the symbols where these are not evenly spread.
    """
    f = _frequencies(np.bincount(symbols))
    c = np.cumsum(f) - f
    lanes = -(-len(symbols) // LANE)
    rows = np.full(lanes * LANE, f.argmax(), np.uint8)  # what fills the last lanes costs least
    rows[: len(symbols)] = symbols
    rows = rows.reshape(LANE, lanes)[: -(-len(symbols) // lanes)]
    x = np.full(lanes, LOW)
    words = []
    for row in rows[::-1]:  # the last symbol in is the first one out
        each = f[row]
        full = x >= each << np.uint64(32 - BITS)
        words.append(x[full].astype("<u2"))
        x[full] >>= WORD
        x = (x // each << np.uint64(BITS)) + x % each + c[row]
    head = [np.array([len(f) - 1], np.uint8), f.astype("<u2").view(np.uint8), x.astype("<u4").view(np.uint8)]
    return np.concatenate([*head, *(w.view(np.uint8) for w in words[::-1])])


def decode(data: np.ndarray, n: int) -> np.ndarray:
    """The inverse of ``encode``: uint8 ``[n]``.

    Raises:
        ArtifactError: no ``n`` symbols were encoded so.
    """
    k, lanes = int(data[0]) + 1 if data.size else 1, -(-n // LANE)
    body = data[1 + 2 * k + 4 * lanes :]
    f = data[1 : 1 + 2 * k].copy()
    if data.size < 1 + 2 * k + 4 * lanes or body.size % 2 or int((f := f.view("<u2")).sum(dtype=np.int64)) != M:
        raise ArtifactError("a table of widths is none; the file is damaged")
    f, symbol = f.astype(np.uint64), np.repeat(np.arange(k, dtype=np.uint8), f)
    c = np.cumsum(f) - f
    x = data[1 + 2 * k : 1 + 2 * k + 4 * lanes].copy().view("<u4").astype(np.uint64)
    words, at = body.copy().view("<u2").astype(np.uint64), 0
    rows = np.empty((-(-n // lanes), lanes), np.uint8)
    for row in rows:
        slot = x & np.uint64(M - 1)
        row[:] = symbol[slot.astype(np.int64)]
        x = f[row] * (x >> np.uint64(BITS)) + slot - c[row]
        low = np.flatnonzero(x < LOW)
        if at + low.size > words.size:
            raise ArtifactError("a table of widths is too short; the file is damaged")
        x[low] = x[low] << WORD | words[at : at + low.size]
        at += low.size
    if at != words.size or (x != LOW).any():
        raise ArtifactError("a table of widths is too long; the file is damaged")
    return rows.reshape(-1)[:n]


def estimate(counts: np.ndarray) -> int:
    """About how many bytes ``encode`` takes for symbols of these counts."""
    f, n = _frequencies(counts), int(counts.sum())
    return 1 + 2 * len(f) + 3 * -(-n // LANE) + int((counts * (BITS - np.log2(np.maximum(f, 1)))).sum() / 8)


def _frequencies(counts: np.ndarray) -> np.ndarray:
    """Of M, uint64, none 0 that has a count."""
    f = np.where(counts > 0, np.maximum(counts * M // counts.sum(), 1), 0)
    f[f.argmax()] += M - f.sum()  # at least M / 256, less at most 255 that were raised to 1
    return f.astype(np.uint64)
