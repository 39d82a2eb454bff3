"""The order in which a task's data come, and the processes that read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from bitfront.errors import BitfrontError

SORTED = 50  # batches among whose samples those of like length find together


class EpochBatches(Sampler[list[int]]):
    """Lists of indices, one per batch, that depend on (seed, epoch) alone, so that a resumed run repeats them.

    Args:
        n: size of the data set.
        batch_size: of one process, which draws its share of the indices.
        seed: shuffles, and repeats a few indices so that all processes have full batches; None keeps the order, and
            every index is drawn once.
        rank, world: number of this process, and of all.
        parts: that each batch comes in, of equal size but for one sample. To a last batch that is too small for them,
            or, in training, for two samples in each, which batch norms need, the epoch's first samples are added.
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
        order = self.indices()
        least = self.parts if self.seed is None else min(2 * self.parts, self.batch_size)
        for batch in BatchSampler(order, self.batch_size, drop_last=False):
            whole = batch if len(batch) >= least else np.resize([*batch, *order], least)
            yield from (part.tolist() for part in np.array_split(whole, self.parts))

    def __len__(self) -> int:
        return -(-len(self.indices()) // self.batch_size) * self.parts


class Loader(DataLoader[Any]):
    """Batches of a data set whose other processes, if it has some, say what is wrong as clearly as this one.

    Args:
        dataset: gives the batch of a list of indices.
        options: of a ``DataLoader``.
    """

    def __init__(self, dataset: Any, **options: Any) -> None:
        super().__init__(_Told(dataset) if options["num_workers"] else dataset, batch_size=None, **options)

    def __iter__(self) -> Any:
        try:
            for batch in super().__iter__():
                if isinstance(batch, BitfrontError):
                    raise batch
                yield batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise BitfrontError(
                "a process that loads data has died, as where the memory is full; the same command goes on with "
                "fewer train.workers or a smaller train.batch_size"
            ) from None


class _Told(Dataset[Any]):
    """A data set that gives its errors in place of batches: raised in another process, they come with its traceback."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, indices: list[int]) -> Any:
        try:
            return self.dataset[indices]
        except BitfrontError as error:
            return error
