"""Pretrained causal language models, quantized after their training and measured as the papers do that: perplexity of a
text in windows that share no token (GPTQ, arXiv 2210.17323; decoupleQ, arXiv 2404.12759).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bitfront.tasks.embeddings import WideEmbeddings
from bitfront.tasks.text import OwnText


@dataclass(kw_only=True)
class LanguageModel(WideEmbeddings, OwnText):
    """A network that transformers has saved, on a text."""

    primary: ClassVar[tuple[str, bool]] = ("ppl", False)
    singly: ClassVar[bool] = True
