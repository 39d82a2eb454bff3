"""Whisper (arXiv 2212.04356) as transformers has it: what it hears, writes and says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitfront.errors import BitfrontError
from bitfront.models import hf

KIND = "WhisperForConditionalGeneration"
RATE, HOP = 16000, 160  # samples per second, and per frame of the features
END, START, NO_TIMESTAMPS = "<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"
ENGLISH = ("<|en|>", "<|transcribe|>")  # in the prompt of a network that knows other languages, too
MULTILINGUAL = 51865  # tokens that such a network has at least, where nothing says what it is
TINY = {
    "d_model": 64,
    "num_mel_bins": 16,
    "max_source_positions": 50,
    "max_target_positions": 32,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 128 for side in ("encoder", "decoder")},
}


@dataclass(frozen=True)
class Writing:
    """How it writes English without timestamps.

    Attributes:
        tokenizer: of the package tokenizers.
        prompt: tokens that a text begins with.
        end: token that ends it.
        limit: tokens of a text at most, half of the decoder's positions, as OpenAI's.
        never, not_first: tokens that are not chosen: nowhere, or not as a text's first.
    """

    tokenizer: Any
    prompt: tuple[int, ...]
    end: int
    limit: int
    never: tuple[int, ...] = ()
    not_first: tuple[int, ...] = ()

    def encode(self, text: str) -> Tensor:
        """Prompt, text and end, ``[n]``."""
        return torch.tensor([*self.prompt, *self.tokenizer.encode(f" {text}", add_special_tokens=False).ids, self.end])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text, without special tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()


def writing(name: str, tokenizer: Any, config: dict[str, Any], told: dict[str, Any]) -> Writing:
    """Of a network.

    Args:
        name: of it, for messages.
        tokenizer: of the package tokenizers.
        config: its config.json.
        told: its generation_config.json, which may lack anything.

    Raises:
        BitfrontError: the tokenizer has no tokens for the prompt.
    """
    multilingual = told.get("is_multilingual", config["vocab_size"] >= MULTILINGUAL)
    words = [START, *(ENGLISH if multilingual else ()), NO_TIMESTAMPS, END]
    tokens = [tokenizer.token_to_id(word) for word in words]
    if None in tokens:
        raise BitfrontError(f"the tokenizer of model={name} has no {words[tokens.index(None)]}; give that of a Whisper")
    # transformers writes those of its usual vocabulary for a smaller one, too
    never, not_first = (
        tuple(token for token in told.get(key) or () if token < config["vocab_size"])
        for key in ("suppress_tokens", "begin_suppress_tokens")
    )
    return Writing(tokenizer, tuple(tokens[:-1]), tokens[-1], config["max_target_positions"] // 2, never, not_first)


class Features:
    """Logarithmic mel spectrogram as the network hears it: padded with silence, or cut, to its length.

    Args:
        config: its config.json.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.samples = config["max_source_positions"] * 2 * HOP  # that it hears
        made = hf.library("Whisper").WhisperFeatureExtractor
        self.extractor = made(config["num_mel_bins"], sampling_rate=RATE, hop_length=HOP)

    def __call__(self, samples: Tensor) -> Tensor:
        """``[frames, mels]`` of samples ``[time]``."""
        options = {"sampling_rate": RATE, "max_length": self.samples, "return_tensors": "pt"}
        return self.extractor(samples.numpy(), **options).input_features[0].T


@torch.no_grad()
def greedy(net: nn.Module, heard: Tensor, writing: Writing) -> list[list[int]]:
    """The tokens of the texts that a network writes, one by one the likeliest, without prompt and end.

    Args:
        net: in evaluation mode.
        heard: what its encoder gives, ``[batch, time, dim]``.
        writing: how.
    """
    x = torch.tensor(writing.prompt, device=heard.device).expand(len(heard), -1)
    done = torch.zeros(len(heard), dtype=torch.bool, device=heard.device)
    said, cache = torch.empty(len(heard), 0, dtype=torch.long, device=heard.device), None
    while said.shape[1] < writing.limit and not done.all():
        output = net(encoder_outputs=(heard,), decoder_input_ids=x, cache=cache, use_cache=True)
        scores, cache = output.logits[:, -1].clone(), output.cache
        scores[:, [*writing.never, *(() if said.shape[1] else writing.not_first)]] = -torch.inf
        x = scores.argmax(-1).masked_fill(done, writing.end)[:, None]
        said, done = torch.cat([said, x], 1), done | (x[:, 0] == writing.end)
    rows = said.tolist()
    return [row[: row.index(writing.end)] if writing.end in row else row for row in rows]


def tiny() -> tuple[str, dict[str, Any]]:
    """A tokenizer of bytes, as in a tokenizer.json, and the configuration of a network of it that hears a second."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({symbol: n for n, symbol in enumerate(symbols)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([END, START, NO_TIMESTAMPS])
    end, start = len(symbols), len(symbols) + 1
    ends = dict.fromkeys(("eos_token_id", "pad_token_id", "bos_token_id"), end)
    return made.to_str(), TINY | ends | {"decoder_start_token_id": start, "vocab_size": made.get_vocab_size()}


def fresh(config: dict[str, Any]) -> nn.Module:
    """A network of a configuration; the caller seeds."""
    transformers = hf.library("Whisper")
    return getattr(transformers, KIND)(transformers.WhisperConfig(**config))
