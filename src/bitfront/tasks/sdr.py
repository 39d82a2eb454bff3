"""Signal-to-distortion ratios of separated sources, in dB."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

EPSILON = 1e-7  # of the energies, for silent sources


def global_sdr(references: Tensor, estimates: Tensor) -> Tensor:
    """Of whole songs, the definition of the Music Demixing Challenge 2021 ("new SDR").

        10 log10((sum s² + 1e-7) / (sum (s - ŝ)² + 1e-7))

    Args:
        references, estimates: ``[sources, channels, length]``.

    Returns:
        ``[sources]``.
    """
    signal, error = (x.square().sum((1, 2)) + EPSILON for x in (references, references - estimates))
    return 10 * torch.log10(signal / error)


def framewise_sdr(references: Tensor, estimates: Tensor, samplerate: int) -> Tensor:
    """BSSEval v4 of one song: the median over its seconds, ``[sources]``, for tensors as above.

    Seconds in which a source or an estimate is silent do not count; NaN if there are no others.
    """
    if not all(x.any(dim=2).any(dim=1).all() for x in (references, estimates)):
        return torch.full((len(references),), torch.nan)
    signals = (x.transpose(1, 2).double().cpu().numpy() for x in (references, estimates))
    frame = {"window": samplerate, "hop": samplerate}
    sdr, *_ = museval_metrics().bss_eval(
        *signals, **frame, compute_permutation=False, framewise_filters=False, bsseval_sources_version=False
    )
    return torch.from_numpy(sdr).nanquantile(0.5, dim=1)


def museval_metrics() -> ModuleType:
    """museval's ``metrics`` module alone: the package itself cannot be imported without ffmpeg, which it does not need
    here."""
    package = importlib.util.find_spec("museval")
    assert package is not None and package.origin is not None
    spec = importlib.util.spec_from_file_location("museval_metrics", Path(package.origin).with_name("metrics.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class GlobalSDR(Metric):
    """Mean over songs: ``nsdr_<source>`` and their mean ``nsdr``, and by how much that is better than to take the
    mixture for each source, ``nsdri``.

    Args:
        sources: their names.
    """

    full_state_update = False
    total: Tensor
    mixture: Tensor
    songs: Tensor

    def __init__(self, sources: list[str], **options: Any) -> None:
        super().__init__(**options)
        self.sources = sources
        self.add_state("total", torch.zeros(len(sources)), dist_reduce_fx="sum")
        self.add_state("mixture", torch.zeros(len(sources)), dist_reduce_fx="sum")
        self.add_state("songs", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, references: Tensor, estimates: Tensor, mixture: Tensor) -> None:
        """Add a song: ``[sources, channels, length]`` twice, and ``[channels, length]``."""
        self.total += global_sdr(references, estimates)
        self.mixture += global_sdr(references, mixture.expand_as(references))
        self.songs += 1

    def compute(self) -> dict[str, Tensor]:
        mean, mixture = self.total / self.songs, self.mixture / self.songs
        summary = {"nsdr": mean.mean(), "nsdri": (mean - mixture).mean()}
        return summary | {f"nsdr_{name}": value for name, value in zip(self.sources, mean, strict=True)}


class FramewiseSDR(Metric):
    """BSSEval v4, the median over songs of the median over seconds: ``sdr_<source>`` and their mean ``sdr``.

    Args:
        sources: their names.
        samplerate: in Hz.
    """

    full_state_update = False
    medians: list[Tensor]

    def __init__(self, sources: list[str], samplerate: int, **options: Any) -> None:
        super().__init__(**options)
        self.sources, self.samplerate = sources, samplerate
        self.add_state("medians", [], dist_reduce_fx="cat")

    def update(self, references: Tensor, estimates: Tensor) -> None:
        """Add a song, ``[sources, channels, length]`` twice."""
        self.medians.append(framewise_sdr(references, estimates, self.samplerate).float().to(self.device)[None])

    def compute(self) -> dict[str, Tensor]:
        found = dim_zero_cat(self.medians)  # [songs, sources]
        median = found.nanquantile(0.5, dim=0)
        return {"sdr": median.mean()} | {f"sdr_{n}": value for n, value in zip(self.sources, median, strict=True)}
