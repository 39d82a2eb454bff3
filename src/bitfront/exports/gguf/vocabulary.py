"""The tokenizer of a network in a folder, as GGUF files have it: byte pairs, and a name for how a text is cut into
words before these (``tokenizer.ggml.pre``), by which llama.cpp knows the expression."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import gguf

from bitfront.errors import BitfrontError, first_line
from bitfront.exports.causal import Causal

CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS = {  # a tokenizer.json's steps before the pairs, and whether whole words are looked up before these
    ("words", False): "gpt-2",
    ("digits words", False): "smollm",
    (rf"{CONTRACTION}\p{{N}}{REST} bytes", False): "qwen2",
    (rf"{CONTRACTION}\p{{N}}{{1,3}}{REST} bytes", True): "llama-bpe",
}


def add(file: gguf.GGUFWriter, network: Causal) -> None:
    """Write it into a file's header.

    Args:
        file: takes it.
        network: whose it is.

    Raises:
        BitfrontError: it is of a kind that is not known here, or damaged.
    """
    rules, size = network.rules, int(network.config["vocab_size"])
    try:
        cut, (tokens, kinds) = _cut(rules), _tokens(rules, size)
        special = gguf.SpecialVocab(network.folder, load_merges=True, n_vocab=size)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise BitfrontError(
            f"the tokenizer in '{network.folder}' is none that format=gguf knows ({first_line(error)}): byte pairs as "
            f"{', '.join(CUTS.values())} have them, of no more tokens than the network; format=mlx takes any"
        ) from None
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre(cut)
    file.add_token_list(tokens)
    file.add_token_types(kinds)
    special.add_to_gguf(file, quiet=True)


def _cut(rules: Mapping[str, Any]) -> str:
    """The name of its cut."""
    model, before = rules["model"], rules["pre_tokenizer"]
    if model["type"] != "BPE" or model.get("byte_fallback") or rules.get("normalizer"):
        raise ValueError(f"{model['type']} of another kind")
    steps = [_step(step) for step in before.get("pretokenizers", [before])]
    return CUTS[" ".join(steps), bool(model.get("ignore_merges"))]


def _step(step: Mapping[str, Any]) -> str:
    """What a step does to a text, in a word or an expression."""
    if step.get("type") == "ByteLevel" and not step.get("add_prefix_space"):
        return "words" if step.get("use_regex", True) else "bytes"
    if step.get("type") == "Digits" and step.get("individual_digits"):
        return "digits"
    if step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step["pattern"].get("Regex"))
    return json.dumps(step)


def _tokens(rules: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Texts and kinds of all tokens, by number."""
    tokens, kinds = [f"[PAD{n}]" for n in range(size)], [int(gguf.TokenType.UNUSED)] * size
    added = {token["id"]: token for token in rules.get("added_tokens", ())}
    named = {n: text for text, n in rules["model"]["vocab"].items()} | {n: t["content"] for n, t in added.items()}
    for n, text in named.items():
        kind = "NORMAL" if n not in added else "CONTROL" if added[n].get("special") else "USER_DEFINED"
        tokens[n], kinds[n] = text, int(gguf.TokenType[kind])
    return tokens, kinds
