"""What tasks share whose networks have tokens at their input and output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from bitfront.ranges import Ranges
from bitfront.tasks.core import Task


@dataclass(kw_only=True)
class WideEmbeddings(Task):
    """A task that leaves embeddings wider than the rest, as is usual in small networks, of which they are a fifth and
    more.

    Attributes:
        embedding_bits: of the embeddings of the tokens, at the input and at the output; 0 for as many as all have.
    """

    ranges: ClassVar[Ranges] = {"embedding_bits": "0..8"}

    embedding_bits: int

    def layers(self, net: nn.Module) -> dict[str, dict[str, Any]]:
        tables = [module for module in net.modules() if isinstance(module, nn.Embedding)]
        head = getattr(net, "get_output_embeddings", lambda: None)()  # of transformers' networks
        wide = {id(module.weight) for module in (*tables, head) if module is not None}
        names = [name for name, p in net.named_parameters() if id(p) in wide]
        return {name: {"bits": self.embedding_bits} for name in names} if self.embedding_bits else {}
