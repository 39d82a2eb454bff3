"""Language modelling: how well a causal transformer predicts the next token of a text."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from bitfront.data.corpus import Corpus, Windows, generated
from bitfront.data.text import load
from bitfront.errors import BitfrontError
from bitfront.models import named
from bitfront.models.transformer_lm import TransformerLM
from bitfront.ranges import Ranges
from bitfront.tasks.core import Task

FACTOR = 4  # by which a band of rarer words has fewer dimensions


class Perplexity(MeanMetric):
    """Exponential of a mean of losses in nats. (torchmetrics' own wants the probabilities of all words.)"""

    def compute(self) -> Tensor:
        return super().compute().exp()


@dataclass(kw_only=True)
class Language(Task):
    """A transformer that predicts the next token.

    Bits per byte compare across vocabularies: all bytes of a split count, each token is predicted once.

    Attributes:
        data: "docstrings" (prose from installed packages), "generated" (a chain of tokens), or a key of
            ``bitfront.data.text.FILES``, which lie in data_root.
        vocabulary: number of tokens.
        context: tokens that the network sees at once.
        overlap: how many of them, in evaluation, are there as context of the others only. -1: windows share no token,
            none predicts its first, and what is left at the end does not count, as papers on quantization measure.
        tokens: to train on in an epoch, in windows at random places; 0 for the whole text.
        valid_tokens, test_tokens: to validate and test on, the first ones; 0 for all.
        dim, depth, heads: of the transformer.
        dropout, attention_dropout, relu_dropout, softmax_dropout, layerdrop: in training, of ``TransformerLM``.
        cutoffs: where the bands of rarer words begin that have fewer dimensions; none for one band.
        final_norm: a norm behind the last layer.
    """

    primary: ClassVar[tuple[str, bool]] = ("bpb", False)

    data: str
    vocabulary: int
    context: int
    overlap: int
    tokens: int
    valid_tokens: int
    dim: int
    depth: int
    heads: int
    dropout: float
    attention_dropout: float = 0.0
    relu_dropout: float = 0.0
    softmax_dropout: float = 0.0
    layerdrop: float = 0.0
    cutoffs: list[int] = field(default_factory=list)
    final_norm: bool = True
    test_tokens: int = 0
    ranges: ClassVar[Ranges] = {
        "vocabulary": "2..",
        "context": "2..",
        "overlap": "-1..",
        "tokens": "0..",
        "valid_tokens": "0..",
        "test_tokens": "0..",
        "dim": "1..",
        "depth": "1..",
        "heads": "1..",
        "dropout": "[0, 1)",
        "attention_dropout": "[0, 1)",
        "relu_dropout": "[0, 1)",
        "softmax_dropout": "[0, 1)",
        "layerdrop": "[0, 1)",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, fits in {
            "heads": self.heads > 0 and self.dim % (2 * self.heads) == 0,
            "overlap": -1 <= self.overlap < self.context,
            "tokens": self.tokens >= 0,
            "valid_tokens": self.valid_tokens >= 0,
            "test_tokens": self.test_tokens >= 0,
            "cutoffs": [*self.cutoffs, self.vocabulary] == sorted({0, *self.cutoffs, self.vocabulary} - {0}),
            **{n: 0 <= getattr(self, n) < 1 for n in vars(self) if n.endswith(("dropout", "layerdrop"))},
        }.items():
            if not fits:
                raise BitfrontError(
                    f"task.{name}={getattr(self, name)} does not fit: heads divide dim into even parts, overlap is "
                    "-1 or more and less than context, tokens are not negative, cutoffs rise up to vocabulary, "
                    "dropouts are in 0..1"
                )

    @cached_property
    def corpus(self) -> Corpus:
        """All splits: what is missing of the last is noticed before the training."""
        if self.data == "generated":
            return generated(self.vocabulary)
        return load(Path(self.data_root), self.data, self.vocabulary)

    def model(self) -> nn.Module:
        return TransformerLM(
            vocabulary=self.vocabulary,
            dim=self.dim,
            depth=self.depth,
            heads=self.heads,
            context=self.context,
            cutoffs=self.cutoffs,
            factor=FACTOR,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            relu_dropout=self.relu_dropout,
            softmax_dropout=self.softmax_dropout,
            layerdrop=self.layerdrop,
            final_norm=self.final_norm,
        )

    def dataset(self, split: str) -> Windows:
        if split == "train":
            return Windows(self.corpus.streams[split], self.context, drawn=self.tokens)
        apart = self.overlap < 0
        return Windows(self.measured(split)[apart:], self.context - apart, self.overlap)

    def measured(self, split: str) -> Tensor:
        """The tokens of a split that are measured on, behind the one before them.

        Raises:
            BitfrontError: there are fewer than a window has, and none may be left over.
        """
        stream = self.corpus.streams[split]
        most = {"valid": self.valid_tokens, "test": self.test_tokens}.get(split, 0)
        n = min(most or len(stream) - 1, len(stream) - 1)
        if self.overlap < 0 and not (n := n // self.context * self.context):
            raise BitfrontError(f"{split} has fewer tokens than a window; lower task.context={self.context}")
        return stream[: n + 1]

    def undisturbed(self, dataset: Windows) -> Windows:
        return replace(dataset, drawn=0)

    def losses(self, net: nn.Module, tokens: Tensor) -> Tensor:
        """Of each of the tokens ``[batch, time + 1]`` but the first, in nats, ``[batch, time]``."""
        return net(tokens[:, :-1], tokens[:, 1:])

    def loss(self, net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, new = batch
        return self.losses(net, tokens)[new].mean()

    def answers(self, net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits: Tensor = named.logits(self.use(net, batch))
        return logits[batch[1]]

    def use(self, net: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
        return net(batch[0][:, :-1])

    def metrics(self, **options: Any) -> MetricCollection:
        names = {"bpb": MeanMetric, "ppl": Perplexity, "loss": MeanMetric}
        return MetricCollection({name: kind(**options) for name, kind in names.items()}, compute_groups=False)

    def update(self, metrics: MetricCollection, net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        tokens, new = batch
        losses = self.losses(net, tokens)[new]
        size = self.corpus.sizes.to(tokens.device)[tokens[:, 1:][new]].sum()
        metrics["bpb"].update(losses.sum() / (math.log(2) * size), weight=size)
        for name in ("ppl", "loss"):
            metrics[name].update(losses.mean(), weight=len(losses))

    def evaluate(
        self, net: nn.Module, split: str, device: torch.device | str = "cpu", shared: bool = True
    ) -> dict[str, float]:
        """All metrics; here also per word and end of line of the published text, as WikiText's perplexities are."""
        measured = super().evaluate(net, split, device, shared)
        return measured | {"word_ppl": 2 ** (measured["bpb"] * self.corpus.word_size(split))}


@dataclass(kw_only=True)
class WikiText103(Language):
    """Words of WikiText-103 by the recipe of Baevski and Auli (arXiv 1809.10853), as fairseq has it."""

    primary: ClassVar[tuple[str, bool]] = ("ppl", False)

    @property
    def summed(self) -> int:  # type: ignore[override]
        """The paper's penalty stands beside the loss summed over a window."""
        return self.context

    def drawn_loss(self, net: nn.Module, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
        tokens, new = batch
        losses: Tensor = net(tokens[:, :-1], generator)  # without a number for each of its many words
        return losses[new].sum()
