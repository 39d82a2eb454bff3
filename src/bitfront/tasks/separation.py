"""Separation of music into its sources."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from bitfront.data.audio import REMIXED, Excerpts, Form, Song, Whole, excerpt_length, level, songs, tones
from bitfront.data.music import music
from bitfront.errors import BitfrontError
from bitfront.processes import processes
from bitfront.ranges import Ranges
from bitfront.tasks.batches import Loader
from bitfront.tasks.core import Task
from bitfront.tasks.sdr import FramewiseSDR, GlobalSDR

NETWORKS = ("demucs", "hdemucs", "htdemucs")


@dataclass(kw_only=True)
class Separator(Task):
    """A network that gives each source of a mixture, trained with the L1 loss. It maps mixtures ``[batch, channels,
    length]`` to ``[batch, sources, channels, length]``.

    Attributes:
        segment, stride: seconds of a training excerpt, and to the next; see ``Excerpts`` for what the network gets.
        repeat: how often an epoch goes through the excerpts.
        repitch: probability of a change of pitch and tempo.
        window, overlap: seconds that are separated at once in evaluation, and the share of them that two windows have
            in common, where they fade into each other.
        shifts: on the test split, the mean over so many starts of the song within half a second.
        museval: whether the test split gets BSSEval v4 too, which takes as long as the music at 44.1 kHz.
        network: "demucs", "hdemucs" or "htdemucs", of the demucs package.
        demucs, hdemucs, htdemucs: arguments of their constructors.
    """

    primary: ClassVar[tuple[str, bool]] = ("nsdr", True)
    singly: ClassVar[bool] = True

    segment: float
    stride: float
    repeat: int = 1
    repitch: float = 0.0
    window: float
    overlap: float
    shifts: int = 1
    museval: bool = False
    network: str = "demucs"
    demucs: dict[str, Any] = field(default_factory=dict)
    hdemucs: dict[str, Any] = field(default_factory=dict)
    htdemucs: dict[str, Any] = field(default_factory=dict)
    ranges: ClassVar[Ranges] = {
        "repitch": "[0, 1]",
        "overlap": "[0, 1)",
        "repeat": "1..",
        "segment": "(0, inf)",
        "shifts": "1..",
        "stride": "(0, inf)",
        "window": "(0, inf)",
    }

    def check_length(self) -> None:
        """Refuse excerpts of which nothing is left, and windows that a network does not take.

        Raises:
            BitfrontError: naming the option.
        """
        if self.length <= 0:
            raise BitfrontError(
                f"task.segment={self.segment} is no longer than task.stride={self.stride}, and a network gets the "
                "difference; give a longer one"
            )
        longest = self.length / self.form.samplerate
        if self.network == "htdemucs" and self.window > longest:
            raise BitfrontError(f"htdemucs sees {longest} s in training and no more later; set task.window={longest}")

    @property
    def form(self) -> Form:
        """Of the songs."""
        raise NotImplementedError

    def songs(self) -> dict[str, list[Song]]:
        """All splits."""
        raise NotImplementedError

    @property
    def length(self) -> int:
        """Samples of what the network is trained on."""
        return excerpt_length(self._samples(self.segment), self._samples(self.stride), self.repitch)

    def _samples(self, seconds: float) -> int:
        return round(seconds * self.form.samplerate)

    def model(self) -> nn.Module:
        from demucs.demucs import Demucs
        from demucs.hdemucs import HDemucs
        from demucs.htdemucs import HTDemucs

        kind, form = {"demucs": Demucs, "hdemucs": HDemucs, "htdemucs": HTDemucs}[self.network], self.form
        about = {"samplerate": form.samplerate, "segment": Fraction(self.length, form.samplerate)}
        return kind(form.sources, audio_channels=form.channels, **about, **getattr(self, self.network))

    def dataset(self, split: str) -> Excerpts | Whole:
        found = self.songs()[split]
        if split != "train":
            return Whole(found, self.form.sources)
        segment, stride = self._samples(self.segment), self._samples(self.stride)
        return Excerpts(found, self.form.sources, self.form.samplerate, segment, stride, self.repitch, self.repeat)

    def loader(self, split: str, epoch: int = 0, shared: bool = True, parts: int = 1) -> Loader:
        """As of every task.

        Raises:
            BitfrontError: a process's part of a batch does not go into the groups whose sources are swapped.
        """
        size = self.recipe.batch_size // (parts * (processes()[1] if shared else 1))
        if split == "train" and size % REMIXED:
            raise BitfrontError(
                f"sources are swapped between {REMIXED} samples, and each process gets {size} at once; make "
                f"train.batch_size / trainer.devices / trainer.accumulate_grad_batches a multiple of {REMIXED}"
            )
        return super().loader(split, epoch, shared, parts)

    def undisturbed(self, dataset: Excerpts) -> Excerpts:
        return replace(dataset, disturbed=False, repeat=1)

    def loss(self, net: nn.Module, batch: Tensor) -> Tensor:
        return self.divergence(self.answers(net, batch), batch)

    def answers(self, net: nn.Module, batch: Tensor) -> Tensor:
        """The sources ``[batch, sources, channels, samples]`` of their sum."""
        sources: Tensor = net(batch.sum(1))
        return sources

    def drawn_loss(self, net: nn.Module, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Samples times random signs, as of noise of one strength."""
        answers = self.answers(net, batch)
        signs = torch.randint(0, 2, answers.shape, generator=generator).to(answers) * 2 - 1
        return (answers * signs).sum()

    def divergence(self, answers: Tensor, wanted: Tensor) -> Tensor:
        """Mean absolute difference of the samples."""
        return nn.functional.l1_loss(answers, wanted)

    def metrics(self, **options: Any) -> MetricCollection:
        metrics: dict[str, Any] = {"loss": MeanMetric(**options), "global": GlobalSDR(self.form.sources, **options)}
        if self.museval:
            metrics["framewise"] = FramewiseSDR(self.form.sources, self.form.samplerate, **options)
        return MetricCollection(metrics, compute_groups=False)

    def update(self, metrics: MetricCollection, net: nn.Module, batch: Tensor) -> None:
        mixture, references = batch[0], batch[1:]
        starts = [k * self.form.samplerate // (2 * self.shifts) for k in range(self.shifts)]
        estimates = separate(net, mixture, self._samples(self.window), self.overlap, starts)
        metrics["loss"].update((estimates - references).abs().mean() / level(mixture)[1])
        metrics["global"].update(references, estimates, mixture)
        if self.museval:
            metrics["framewise"].update(references, estimates)

    def evaluate(
        self, net: nn.Module, split: str, device: torch.device | str = "cpu", shared: bool = True
    ) -> dict[str, float]:
        """As of every task. BSSEval and shifts, which take long, are left out on the validation split."""
        task = copy.copy(self)
        if split != "test":
            task.museval, task.shifts = False, 1
        return super(Separator, task).evaluate(net, split, device, shared)


@dataclass(kw_only=True)
class Separation(Separator):
    """A network of the demucs package on a public data set, or generated music.

    Attributes:
        data: "music" (generated), "tones" (one for each source), or a folder of ``data_root`` in the layout of
            MUSDB18-HQ.
        sources: names of the files beside the mixture.
        valid_songs: songs of the training folder that are the validation split; none takes the folder ``valid``.
        samplerate, audio_channels: of the files.
    """

    data: str
    sources: list[str]
    valid_songs: list[str]
    samplerate: int
    audio_channels: int
    ranges: ClassVar[Ranges] = {"samplerate": "1..", "audio_channels": "1.."}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.network not in NETWORKS:
            raise BitfrontError(f"there is no task.network={self.network}; choices: {', '.join(NETWORKS)}")
        self.check_length()

    @property
    def form(self) -> Form:
        return Form(self.sources, self.samplerate, self.audio_channels)

    def songs(self) -> dict[str, list[Song]]:
        if self.data == "tones":
            kind = self.sources, self.samplerate, self.audio_channels, 2 * self.segment
            return {split: tones(split, *kind) for split in ("train", "valid", "test")}
        root = Path(self.data_root)
        folder = music(root) if self.data == "music" else root / self.data
        return songs(folder, self.sources, self.valid_songs, self.samplerate, self.audio_channels)


def separate(net: nn.Module, mixture: Tensor, window: int, overlap: float, starts: Sequence[int] = (0,)) -> Tensor:
    """Estimate the sources of a whole song.

    Args:
        net: gives ``[batch, sources, channels, length]`` of mixtures ``[batch, channels, length]``, normalized by their
            mean and standard deviation.
        mixture: ``[channels, length]``.
        window, overlap: see ``in_windows``.
        starts: samples of silence before the song, for each of which it is separated; the mean counts.

    Returns:
        ``[sources, channels, length]``.
    """
    mean, std = level(mixture)
    x = (mixture - mean) / std
    total = torch.zeros((), device=x.device)
    for start in starts:
        total = total + in_windows(net, nn.functional.pad(x, (start, 0)), window, overlap)[..., start:]
    return total / len(starts) * std + mean


def in_windows(net: nn.Module, x: Tensor, window: int, overlap: float) -> Tensor:
    """What a network gives for an input ``[channels, length]`` of any length, ``[sources, channels, length]``.

    Args:
        net: maps batches.
        x: its input.
        window: samples at once; the last window ends with the input.
        overlap: share of a window that the next one has, too, where they fade into each other.
    """
    length = x.shape[-1]
    last = max(length - window, 0)
    slope = torch.arange(1, min(window, length) + 1, device=x.device)
    weight = torch.minimum(slope, slope.flip(0)).to(x)
    weights, total = torch.zeros(length, device=x.device), torch.zeros((), device=x.device)
    for start in [*range(0, last, max(int((1 - overlap) * window), 1)), last]:
        part = net(x[None, :, start : start + window])[0]
        total = total if total.dim() else part.new_zeros(*part.shape[:-1], length)
        total[..., start : start + window] += part * weight
        weights[start : start + window] += weight
    return total / weights
