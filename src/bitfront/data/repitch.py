"""Changes of pitch and tempo, an augmentation of music."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

SEQUENCE, SEEK, OVERLAP = 0.080, 0.020, 0.010  # seconds: of a piece, of the search for its place, of the fade


def repitch(wav: Tensor, semitones: int, tempo: float, samplerate: int) -> Tensor:
    """Change pitch and tempo, each without the other.

    The official Demucs calls the program ``soundstretch`` for this; here the same is done by overlapping pieces of the
    signal where they fit best (Verhelst and Roelands 1993, WSOLA), followed by resampling.

    Args:
        wav: ``[sources, channels, length]``; each source is stretched for itself.
        semitones: higher.
        tempo: percent faster.
        samplerate: in Hz.

    Returns:
        ``[sources, channels, length / (1 + tempo / 100)]``, up to a few samples.
    """
    from torchaudio.functional import resample

    ratio = Fraction(2 ** (semitones / 12)).limit_denominator(100)
    speed = (1 + tempo / 100) / float(ratio)
    stretched = torch.stack([torch.from_numpy(stretch(source.numpy(), speed, samplerate)) for source in wav])
    return resample(stretched, ratio.numerator, ratio.denominator)


def stretch(wav: np.ndarray, speed: float, samplerate: int) -> np.ndarray:
    """Change the tempo of a signal ``[channels, length]`` by a factor; the pitch stays."""
    sequence, seek, overlap = (int(seconds * samplerate) for seconds in (SEQUENCE, SEEK, OVERLAP))
    step = sequence - overlap
    length = round(wav.shape[1] / speed)
    pieces = -(-length // step)
    padded = np.pad(wav, ((0, 0), (0, int(pieces * step * speed) + seek + sequence - wav.shape[1])))
    mono, fade = padded.mean(0), np.linspace(0, 1, overlap, endpoint=False, dtype=wav.dtype)
    stretched = np.zeros((len(wav), pieces * step + overlap), wav.dtype)
    at = 0
    for k in range(pieces):
        if k:  # where the signal goes on most like behind the last piece
            start = int(k * step * speed)
            tail, candidates = mono[at + step : at + sequence], mono[start : start + seek + overlap]
            power = np.convolve(candidates**2, np.ones(overlap, wav.dtype), "valid")
            at = start + int(np.argmax(np.correlate(candidates, tail, "valid") / np.sqrt(power + 1e-8)))
        piece = padded[:, at : at + sequence].copy()
        if k:
            piece[:, :overlap] *= fade
        piece[:, -overlap:] *= 1 - fade
        stretched[:, k * step : k * step + sequence] += piece
    return stretched[:, :length]
