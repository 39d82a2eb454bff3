"""Pretrained causal language models, quantized after their training and measured as the papers do that: perplexity of a
text in windows that share no token (GPTQ, arXiv 2210.17323; decoupleQ, arXiv 2404.12759).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from bitfront.models import hf
from bitfront.ranges import Ranges
from bitfront.tasks.embeddings import WideEmbeddings
from bitfront.tasks.text import OwnText


@dataclass(kw_only=True)
class LanguageModel(WideEmbeddings, OwnText):
    """A network that transformers has saved, on a text.

    Attributes:
        dtype: of the parameters: "auto", as they were saved, "float32", "float16" or "bfloat16".
    """

    ranges: ClassVar[Ranges] = {"dtype": ("auto", "float32", "float16", "bfloat16")}

    dtype: str = "auto"
    primary: ClassVar[tuple[str, bool]] = ("ppl", False)
    singly: ClassVar[bool] = True

    @property
    def precision(self) -> torch.dtype:
        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        return hf.stored_dtype(self.name) if self.pretrained else torch.float32
