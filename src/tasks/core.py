"""A task: network, data, loss, metrics and training recipe of one benchmark. Plain PyTorch, knows no quantization."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Sampler
from torchmetrics import MetricCollection

from src.errors import BitfrontError

SORTED = 50  # batches among whose samples those of like length find together


@dataclass(kw_only=True)
class Task:
    """One benchmark. The fields here are the recipe that every task has; subclasses add what defines the problem.

    Attributes:
        data_root: folder of the data sets (layouts: README).
        seed: of the initial weights, the order of the data and the augmentation.
        smoke: shrink network, data and recipe to seconds, on generated data and no files.
        epochs, batch_size, lr, weight_decay: the training recipe; batch_size is over all processes.
        warmup: share of the steps with a linearly rising learning rate, before a cosine to zero.
        pretrained: ``initial`` is trained already, so that the float cell only measures it.
        clip: largest norm of the gradient of what the recipe's optimizer trains; 0 for any.
        ema: decay per step of an average of the weights, which then is what is validated and kept; 0 for none.
        keep: the network of the "last" epoch, or of the "best" by the primary metric on the validation split, or by the
            "loss" there.
        max_size: MB that the best may have at most; 0 for any.
        repeats: how often a sample is drawn in a row, each time augmented anew ("repeated augmentation", arXiv
            1901.09335); an epoch has as many draws as there are samples.
        workers: processes that load data, whose augmentation depends on their number; 0 loads it in this one.
    """

    primary: ClassVar[tuple[str, bool]]  # name of the headline metric; whether higher is better
    percent: ClassVar[tuple[str, ...]] = ()  # metrics given in percent
    singly: ClassVar[bool] = False  # whether samples of validation and test are too large, or too unlike, for a batch
    summed: ClassVar[int] = 1  # of how many terms the loss is the mean, where a penalty is meant for their sum

    data_root: str
    seed: int
    smoke: bool
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    warmup: float
    pretrained: bool = False
    clip: float = 0.0
    ema: float = 0.0
    keep: str = "last"
    max_size: float = 0.0
    repeats: int = 1
    workers: int = 0
    _splits: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr"):
            if getattr(self, name) <= 0:
                raise BitfrontError(f"train.{name} is positive, got {getattr(self, name)}")
        for name, fits in {
            "seed": self.seed >= 0,
            "train.clip": self.clip >= 0,
            "train.ema": 0 <= self.ema < 1,
            "train.keep": self.keep in ("last", "best", "loss"),
            "train.max_size": self.max_size >= 0,
            "train.repeats": self.repeats >= 1,
            "train.workers": self.workers >= 0,
        }.items():
            if not fits:
                raise BitfrontError(f"{name}={getattr(self, name.removeprefix('train.'))} is out of range")
        if self.smoke:
            self.epochs, self.batch_size, self.workers = min(self.epochs, 2), min(self.batch_size, 32), 0

    def model(self) -> nn.Module:
        """A fresh float network; the caller seeds."""
        raise NotImplementedError

    def initial(self) -> nn.Module:
        """The network that a run begins with: fresh, or pretrained; the caller seeds."""
        return self.model()

    def dataset(self, split: str) -> Any:
        """The "train", "valid" or "test" split: has a length; indexing with a list of integers gives a batch."""
        raise NotImplementedError

    def loss(self, net: nn.Module, batch: Any) -> Tensor:
        """The training loss of a batch, a scalar."""
        raise NotImplementedError

    def metrics(self, **options: Any) -> MetricCollection:
        """Fresh metrics, named as in the record.

        Args:
            options: of torchmetrics, for each of them.
        """
        raise NotImplementedError

    def update(self, metrics: MetricCollection, net: nn.Module, batch: Any) -> None:
        """Add the network's predictions on a batch to the metrics."""
        raise NotImplementedError

    def calibration(self, samples: int, batch_size: int) -> list[Any]:
        """Training samples for post-training quantization, in a fixed random order; all, if there are fewer."""
        dataset = self.undisturbed(self.dataset("train"))
        order = np.random.default_rng(self.seed).permutation(len(dataset))[:samples].tolist()
        return [dataset[order[start : start + batch_size]] for start in range(0, len(order), batch_size)]

    def undisturbed(self, dataset: Any) -> Any:
        """A training set without its augmentation."""
        return dataset

    def blocks(self, net: nn.Module) -> list[str] | None:
        """Names of the modules that post-training quantization works on one after the other; None finds them."""
        return None

    def valid(self, batch: Any) -> Tensor | None:
        """The share of each sample that is not padding, ``[samples]`` in 0..1; None where nothing is padded."""
        return None

    def lengths(self, dataset: Any) -> Sequence[int] | None:
        """Of each sample, where batches are to be of samples alike in length; None where that does not matter."""
        return None

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The network's optimizer: AdamW, no decay of vectors (norms, biases)."""
        groups: dict[float, list[nn.Parameter]] = {}
        for p in parameters:
            groups.setdefault(self.weight_decay if p.dim() > 1 else 0.0, []).append(p)
        return torch.optim.AdamW([{"params": ps, "weight_decay": decay} for decay, ps in groups.items()], lr=self.lr)

    def lr_factor(self, step: int, steps: int) -> float:
        """Learning rate as a share of ``lr`` after ``step`` of ``steps``."""
        progress = min(step / steps, 1.0)
        if progress < self.warmup:
            return (progress + 1e-3) / (self.warmup + 1e-3)
        return 0.5 * (1 + math.cos(math.pi * progress))

    def loader(self, split: str, epoch: int = 0, shared: bool = True, parts: int = 1) -> DataLoader:
        """Batches of a split.

        Args:
            split: "train" is shuffled by (seed, epoch).
            epoch: of the training.
            shared: out over the processes; else each process draws all.
            parts: that a batch comes in.
        """
        if split not in self._splits:
            self._splits[split] = self.dataset(split)
        dataset = self._splits[split]
        rank, world = processes() if shared else (0, 1)
        if self.batch_size % (world * parts):
            among = f"{world} processes" + (f" and {parts} parts" if parts > 1 else "")
            raise BitfrontError(f"train.batch_size={self.batch_size} does not divide among {among}")
        training = split == "train"
        size = 1 if self.singly and not training else self.batch_size // world
        seed, repeats = (self.seed, self.repeats) if training else (None, 1)
        options: dict[str, Any] = {"parts": parts, "repeats": repeats, "lengths": self.lengths(dataset)}
        batches = EpochBatches(len(dataset), size, seed, rank, world, **options)
        batches.set_epoch(epoch)
        options = {"batch_size": None, "generator": batches.generator, "num_workers": self.workers}
        return DataLoader(dataset, sampler=batches, **options)

    @torch.no_grad()
    def evaluate(
        self, net: nn.Module, split: str, device: torch.device | str = "cpu", shared: bool = True
    ) -> dict[str, float]:
        """All metrics of a network on a split.

        Args:
            net: on ``device``.
            split: "train", "valid" or "test".
            device: where to compute.
            shared: out over the processes; else this process alone measures all, and gets the same digits as a run
                in one process.
        """
        training = net.training
        net.eval()
        metrics = self.metrics(sync_on_compute=shared).to(device)
        for batch in self.loader(split, shared=shared):
            self.update(metrics, net, to_device(batch, device))
        net.train(training)
        return {name: value.item() * (100 if name in self.percent else 1) for name, value in metrics.compute().items()}


def processes() -> tuple[int, int]:
    """Number of this process, and of all that train together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class EpochBatches(Sampler[list[int]]):
    """Lists of indices, one per batch, that depend on (seed, epoch) alone, so that a resumed run repeats them.

    Args:
        n: size of the data set.
        batch_size: of one process, which draws its share of the indices.
        seed: shuffles, and repeats a few indices so that all processes have full batches; None keeps the order, and
            every index is drawn once.
        rank, world: number of this process, and of all.
        parts: that each batch comes in, of equal size but for one sample; a batch that is too small repeats some.
        repeats: of each index, spread over the processes; the epoch ends after ``n`` draws.
        lengths: of the samples: those of a batch are then alike in length, over all processes.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int | None,
        rank: int = 0,
        world: int = 1,
        *,
        parts: int = 1,
        repeats: int = 1,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.n, self.batch_size, self.seed, self.rank, self.world = n, batch_size, seed, rank, world
        self.parts, self.repeats = parts, repeats
        self.lengths = None if lengths is None else np.asarray(lengths)
        # For the loader, which would else draw from the global generator, at a time that differs after a restart.
        self.generator = torch.Generator()
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; the trainer calls this."""
        self.epoch = epoch
        draws = np.random.SeedSequence([self.seed or 0, epoch, self.rank])
        self.generator.manual_seed(int(draws.generate_state(1)[0]))  # of the loader's processes

    def indices(self) -> list[int]:
        """This process's share."""
        if self.seed is None:
            order = np.arange(self.n) if self.lengths is None else np.argsort(self.lengths, kind="stable")
            return order[self.rank :: self.world].tolist()
        rng = np.random.default_rng([self.seed, self.epoch])
        order = np.repeat(rng.permutation(self.n), self.repeats)[: self.n]
        if self.lengths is not None:
            order = self._alike(order, self.lengths, rng)
        order = np.resize(order, -(-self.n // self.world) * self.world)
        return order[self.rank :: self.world].tolist()

    def _alike(self, order: np.ndarray, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Sorted by length within some batches, whose order is random."""
        size = self.batch_size * self.world
        parts = np.split(order, range(SORTED * size, self.n, SORTED * size))
        order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
        full = self.n // size * size
        return np.concatenate([rng.permutation(order[:full].reshape(-1, size)).ravel(), order[full:]])

    def __iter__(self) -> Iterator[list[int]]:
        for batch in BatchSampler(self.indices(), self.batch_size, drop_last=False):
            whole = np.resize(batch, max(len(batch), self.parts))
            yield from (part.tolist() for part in np.array_split(whole, self.parts))

    def __len__(self) -> int:
        return -(-len(self.indices()) // self.batch_size) * self.parts


def to_device(batch: Any, device: torch.device | str) -> Any:
    """Move a tensor, or a tuple of them."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    return tuple(to_device(part, device) for part in batch)
