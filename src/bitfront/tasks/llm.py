"""Pretrained causal language models, quantized after their training and measured as the papers do that: perplexity of a
text in windows that share no token (GPTQ, arXiv 2210.17323; decoupleQ, arXiv 2404.12759).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from bitfront.ranges import Ranges
from bitfront.tasks.text import OwnText


@dataclass(kw_only=True)
class LanguageModel(OwnText):
    """A network that transformers has saved, on a text.

    Attributes:
        embedding_bits: of the embeddings of the tokens, at the input and at the output, which are a fifth and more of a
            small network and are usually left wider than the rest; 0 for as many as all have.
    """

    primary: ClassVar[tuple[str, bool]] = ("ppl", False)
    singly: ClassVar[bool] = True
    ranges: ClassVar[Ranges] = {"embedding_bits": "0..8"}

    embedding_bits: int

    def layers(self, net: nn.Module) -> dict[str, dict[str, Any]]:
        tables = [module for module in net.modules() if isinstance(module, nn.Embedding)]
        head = getattr(net, "get_output_embeddings", lambda: None)()  # of transformers' networks
        wide = {id(module.weight) for module in (*tables, head) if module is not None}
        names = [name for name, p in net.named_parameters() if id(p) in wide]
        return {name: {"bits": self.embedding_bits} for name in names} if self.embedding_bits else {}
