"""A task: network, data, loss and metrics of one benchmark. Plain PyTorch, knows no quantization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from bitfront.errors import BitfrontError
from bitfront.processes import processes
from bitfront.progress import Bar, phase
from bitfront.ranges import Ranges, of, refuse
from bitfront.tasks.batches import EpochBatches, Loader
from bitfront.tasks.recipe import Recipe


@dataclass(kw_only=True)
class Task:
    """One benchmark. The fields here are what every task has; subclasses add what defines the problem.

    Attributes:
        recipe: of the training.
        data_root: folder of the data sets (layouts: README).
        seed: of the initial weights, the order of the data and the augmentation.
        pretrained: ``initial`` is trained already, so that the float cell only measures it.
    """

    primary: ClassVar[tuple[str, bool]]  # name of the headline metric; whether higher is better
    percent: ClassVar[tuple[str, ...]] = ()  # metrics given in percent
    singly: ClassVar[bool] = False  # whether samples of validation and test are too large, or too unlike, for a batch
    summed: ClassVar[int] = 1  # of how many terms the loss is the mean, where a penalty is meant for their sum
    ranges: ClassVar[Ranges] = {"seed": "0..4294967295"}  # of the fields; subclasses have those that they add

    recipe: Recipe
    data_root: str
    seed: int
    pretrained: bool = False
    _splits: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        refuse(vars(self), of(type(self)))

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

    @property
    def answering(self) -> bool:
        """Whether it has ``answers``, which distillation and Fisher's information are of."""
        return type(self).answers is not Task.answers

    def answers(self, net: nn.Module, batch: Any) -> Tensor:
        """What the network makes of a batch, where it counts: logits ``[n, classes]``, or what ``divergence`` takes."""
        raise NotImplementedError

    def divergence(self, answers: Tensor, wanted: Tensor) -> Tensor:
        """How far answers are from those of another network, a scalar: their mean relative entropy, in nats."""
        got, wanted = (x.float().log_softmax(-1) for x in (answers, wanted))
        return nn.functional.kl_div(got, wanted, reduction="batchmean", log_target=True)

    def drawn_loss(self, net: nn.Module, batch: Any, generator: torch.Generator) -> Tensor:
        """The loss of a batch with labels drawn from what the network itself says, a scalar: the squares of its
        gradients have Fisher's information as their mean."""
        answers = self.answers(net, batch).float()
        if not torch.isfinite(answers).all():
            raise BitfrontError("the network's answers hold NaN or infinity, also before it is quantized")
        labels = torch.multinomial(answers.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
        return nn.functional.cross_entropy(answers, labels.to(answers.device), reduction="sum")

    def use(self, net: nn.Module, batch: Any) -> Any:
        """Call the network on a batch as it is called in use; what it is called with is what counts."""
        return self.loss(net, batch)

    def metrics(self, **options: Any) -> MetricCollection:
        """Fresh metrics, named as in the record.

        Args:
            options: of torchmetrics, for each of them.
        """
        raise NotImplementedError

    def update(self, metrics: MetricCollection, net: nn.Module, batch: Any) -> None:
        """Add the network's predictions on a batch to the metrics."""
        raise NotImplementedError

    def calibration(self, samples: int, batch_size: int, shared: bool = False) -> list[Any]:
        """Batches of training samples for post-training quantization, in a fixed random order; all, if there are fewer.

        Args:
            samples, batch_size: of all processes together.
            shared: whether each process has its part of each batch; else all of it.
        """
        with phase("preparing the data"):
            dataset = self.undisturbed(self.dataset("train"))
        order = np.random.default_rng(self.seed).permutation(len(dataset))[:samples].tolist()
        rank, world = processes() if shared else (0, 1)
        starts = range(rank, len(order), batch_size)  # the last batch may be too small for all to have a part
        parts = (order[start : start - rank + batch_size : world] for start in starts)
        return [dataset[part] for part in Bar(parts, total=len(starts), desc="reading the data", unit="batch")]

    def undisturbed(self, dataset: Any) -> Any:
        """A training set without its augmentation."""
        return dataset

    def blocks(self, net: nn.Module) -> list[str] | None:
        """Names of the modules that post-training quantization works on one after the other; None finds them."""
        return None

    def layers(self, net: nn.Module) -> dict[str, dict[str, Any]]:
        """Of tensors that are to have other settings than the rest, by name, where a method has one width for each and
        no size to keep: as ``Method.layers``."""
        return {}

    def valid(self, batch: Any) -> Tensor | None:
        """The share of each sample that is not padding, ``[samples]`` in 0..1; None where nothing is padded."""
        return None

    def lengths(self, dataset: Any) -> Sequence[int] | None:
        """Of each sample, where batches are to be of samples alike in length; None where that does not matter."""
        return None

    def decays(self, p: nn.Parameter) -> bool:
        """Whether AdamW lets a parameter decay: vectors (norms, biases) do not."""
        return p.dim() > 1

    def loader(self, split: str, epoch: int = 0, shared: bool = True, parts: int = 1) -> Loader:
        """Batches of a split.

        Args:
            split: "train" is shuffled by (seed, epoch).
            epoch: of the training.
            shared: out over the processes; else each process draws all.
            parts: that a batch comes in.
        """
        if split not in self._splits:
            with phase(f"preparing the data ({split})"):
                self._splits[split] = self.dataset(split)
        dataset = self._splits[split]
        rank, world = processes() if shared else (0, 1)
        if self.recipe.batch_size % (world * parts):
            among = f"{world} processes" + (f" and {parts} parts" if parts > 1 else "")
            raise BitfrontError(f"train.batch_size={self.recipe.batch_size} does not divide among {among}")
        training = split == "train"
        size = 1 if self.singly and not training else self.recipe.batch_size // world
        seed, repeats = (self.seed, self.recipe.repeats) if training else (None, 1)
        options: dict[str, Any] = {"parts": parts, "repeats": repeats, "lengths": self.lengths(dataset)}
        batches = EpochBatches(len(dataset), size, seed, rank, world, **options)
        batches.set_epoch(epoch)
        return Loader(dataset, sampler=batches, generator=batches.generator, num_workers=self.recipe.workers)

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
        for batch in Bar(self.loader(split, shared=shared), desc=f"evaluating ({split})", unit="batch"):
            self.update(metrics, net, to_device(batch, device))
        net.train(training)
        return {name: value.item() * (100 if name in self.percent else 1) for name, value in metrics.compute().items()}


def to_device(batch: Any, device: torch.device | str) -> Any:
    """Move a tensor, or a tuple of them."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    return tuple(to_device(part, device) for part in batch)
