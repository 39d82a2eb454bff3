"""Language modelling on texts of the user's own."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitfront.data import folders
from bitfront.data.corpus import Corpus, Windows, generated, tokenized
from bitfront.data.text import VERSION, byte_pairs
from bitfront.data.texts import apart, digest, encoded, read, texts
from bitfront.errors import BitfrontError
from bitfront.models import hf, named
from bitfront.tasks.language import Language

OURS = "transformer"
STARTS = ("bos_token_id", "eos_token_id")  # of a config.json, the token that stands before a text


@dataclass(kw_only=True)
class OwnText(Language):
    """Any causal network on a text file or a folder of them.

    A network of one's own maps tokens ``[batch, time]`` to logits ``[batch, time, vocabulary]``, or to an object that
    has them as ``logits``; a function that makes it may take the number as ``vocabulary``.

    Attributes:
        data: the file or folder, as ``folders.find`` finds it and ``texts`` reads it; "generated": a chain of tokens.
        fingerprint: of the files; part of a run's identity.
        network: "transformer" (``TransformerLM``), or as ``models.named.build`` takes it. One in a folder is pretrained
            and has a tokenizer, which is used; then ``vocabulary`` is that of its config.json.
        tokens: as of ``Language``, but no more than there are.
        train_data: where the text to train and calibrate on is, the first of these that is there; none: in ``data``.
    """

    fingerprint: str | None
    network: str
    train_data: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pretrained = self.network.startswith(named.FOLDER)
        if not self.pretrained:
            named.check(self.network, [] if ":" in self.network else [OURS, f"{named.FOLDER}<folder>", named.MADE])

    @cached_property
    def name(self) -> str:
        """Of the network, with the place where it was found."""
        return folders.network(self.network, self.data_root)

    @cached_property
    def content(self) -> dict[str, str]:
        """The text of each split."""
        place = folders.find(self.data, self.data_root)
        if self.train_data:
            return apart(place, folders.first(self.train_data, self.data_root, "task.train_data="))
        return texts(place, folders.memory(self.data_root, place, "text"))

    @cached_property
    def corpus(self) -> Corpus:
        if self.data == "generated":
            return generated(self.vocabulary)
        root, name = Path(self.data_root), f"text-{VERSION}-{digest(self.content)}"
        if self.pretrained:
            found = self._by_its_tokenizer(root, name)
        else:
            made = f"{name}-{self.vocabulary}"
            found = tokenized(root, made, lambda: byte_pairs(self.content, self.vocabulary))
        if (n := len(found.streams["train"]) - 1) <= self.context:
            raise BitfrontError(
                f"'{self.data}' has {n} tokens to train on, and task.context={self.context} needs more; give more text "
                "or lower task.context"
            )
        return found

    def _by_its_tokenizer(self, root: Path, name: str) -> Corpus:
        where = f"model={self.name}"
        start = next((self.settings[key] for key in STARTS if isinstance(self.settings.get(key), int)), None)
        made = f"{name}-{digest({'rules': self.rules})}-{start}"
        found = tokenized(root, made, lambda: encoded(self.content, self.rules, where, start))
        if (most := max(int(stream.max()) for stream in found.streams.values())) >= self.outputs():
            raise BitfrontError(f"{where} has token {most}, and its network only {self.outputs()} of them")
        return found

    @cached_property
    def rules(self) -> str:
        """Of the tokenizer of a network in a folder."""
        return hf.tokenizer(self.name)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The config.json of a network in a folder."""
        return hf.settings(self.name)

    @property
    def precision(self) -> torch.dtype:
        """Of the parameters of a network in a folder."""
        return torch.float32

    def outputs(self) -> int:
        """The number of tokens."""
        return int(self.settings["vocab_size"]) if self.pretrained else self.vocabulary

    def model(self) -> nn.Module:
        return self._built(False)

    def initial(self) -> nn.Module:
        return self._built(self.pretrained)

    def _built(self, pretrained: bool) -> nn.Module:
        if self.network == OURS:
            return super().model()
        outputs = self.outputs()
        given = {"vocabulary": outputs}
        network = named.build(self.name, pretrained=pretrained, given=given, dtype=self.precision)
        if config := getattr(network, "config", None):
            config.use_cache = False  # for generation, which there is none of
        tokens = torch.zeros(2, self.context, dtype=torch.long)
        tokens[1, -1] = 1
        remedy = f"task.context={self.context} tokens come at once, of {outputs} (task.vocabulary)"
        found = named.check_outputs(network, self.network, tokens, (2, self.context, outputs), remedy)
        if looks_ahead(found):
            raise BitfrontError(f"model={self.network} is not causal: what it says of a token depends on later ones")
        return network

    def dataset(self, split: str) -> Windows:
        if split != "train":
            return super().dataset(split)
        stream = self.corpus.streams[split]
        return Windows(stream, self.context, drawn=min(self.tokens or len(stream) - 1, len(stream) - 1))

    def losses(self, net: nn.Module, tokens: Tensor) -> Tensor:
        if self.network == OURS:
            return super().losses(net, tokens)
        logits, words = named.logits(net(tokens[:, :-1])).float(), tokens[:, 1:]
        # Flat: many times faster than over a dimension in the middle.
        return nn.functional.cross_entropy(logits.flatten(0, 1), words.flatten(), reduction="none").view_as(words)

    def evaluate(
        self, net: nn.Module, split: str, device: torch.device | str = "cpu", shared: bool = True
    ) -> dict[str, float]:
        """As of every language task. A tokenizer that is there already has no size for each token, so that bits per
        byte are by how many bytes a token has in the mean, of those that are measured."""
        measured = super().evaluate(net, split, device, shared)
        if not self.pretrained:
            return measured
        text, bits = self.said(split), measured["loss"] / math.log(2) * (len(self.measured(split)) - 1)
        words = len(text.split()) + text.count("\n")
        return measured | {"bpb": bits / len(text.encode()), "word_ppl": 2 ** (bits / words)}

    def said(self, split: str) -> str:
        """What the tokens that are measured stand for, by its tokenizer."""
        stream = self.measured(split)
        if len(stream) == len(self.corpus.streams[split]):
            return self.content[split]
        return str(read(self.rules, f"model={self.name}").decode(stream[1:].tolist(), skip_special_tokens=False))


def looks_ahead(logits: Tensor) -> bool:
    """Whether the logits of two texts, ``[2, time, tokens]``, which differ in the last token, differ before it."""
    one, other = logits[:, :-1]
    return not torch.allclose(one, other, rtol=1e-4, atol=1e-5)
