"""A causal transformer with layer norm before each part, and tied adaptive word input and softmax (Baevski and Auli,
arXiv 1809.10853; the hyper-parameters as in fairseq's ``transformer_lm``).

With cutoffs, words are sorted by frequency into bands, each with ``factor`` times fewer dimensions than the one before:

    x = sqrt(dim) P_b E_b[word] + position,      p(word | h) = p(band | h) softmax(E_b P_bᵀ h)[word]

``E_b`` and ``P_b`` are the same in both; the first band has no ``P`` in the softmax, where its words stand beside
the other bands. Differs from fairseq in that no row is kept for padding, since nothing is padded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

CHUNK = 4096  # words whose probabilities are computed at once


class Words(nn.Module):
    """Tied input and output of words, in bands of falling frequency.

    Args:
        vocabulary: number of words.
        dim: of the network.
        cutoffs: first word of each band but the first; none for one band, which then is a plain embedding.
        factor: by which each band has fewer dimensions than the one before.
        dropout: of what the softmax gets, and of its projections.
    """

    def __init__(self, vocabulary: int, dim: int, cutoffs: Sequence[int], factor: int, dropout: float) -> None:
        super().__init__()
        self.dim, self.dropout = dim, dropout
        self.edges = [0, *cutoffs, vocabulary]
        dims = [dim // factor**band for band in range(len(self.edges) - 1)]
        sizes = [end - start for start, end in zip(self.edges, self.edges[1:], strict=False)]
        self.embeddings = nn.ModuleList(nn.Embedding(size, d) for size, d in zip(sizes, dims, strict=True))
        self.projections = nn.ModuleList(nn.Linear(d, dim, bias=False) for d in dims if cutoffs)
        self.bands = nn.Linear(dim, len(cutoffs), bias=False) if cutoffs else None
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, words: Tensor) -> Tensor:
        """Input vectors ``[..., dim]`` of words ``[...]``."""
        if self.bands is None:
            return self.embeddings[0](words)
        x = torch.empty(*words.shape, self.dim, device=words.device)
        for band, (embedding, projection) in enumerate(zip(self.embeddings, self.projections, strict=True)):
            # Also without a word of the band, so that all parameters always have a gradient (DDP).
            chosen = self.within(words, band)
            x[chosen] = projection(embedding(words[chosen] - self.edges[band])).to(x.dtype)
        return x

    def within(self, words: Tensor, band: int) -> Tensor:
        """Which words are of a band."""
        return (words >= self.edges[band]) & (words < self.edges[band + 1])

    def logits(self, h: Tensor) -> Tensor:
        """Of all words ``[..., vocabulary]``, after the states ``h`` ``[..., dim]``."""
        head = F.linear(h, weight(self.embeddings[0]))
        if self.bands is None:
            return head
        parts = [head]
        for band, of_band in enumerate(self.bands(h).split(1, dim=-1), 1):
            low = F.linear(h, weight(self.projections[band]).t())
            parts.append(of_band + F.linear(low, weight(self.embeddings[band])).log_softmax(-1))
        return torch.cat(parts, dim=-1)

    def nll(self, h: Tensor, words: Tensor) -> Tensor:
        """Negative log-likelihood ``[n]``, in nats, of words ``[n]`` after the states ``h`` ``[n, dim]``."""
        h = F.dropout(h, self.dropout, self.training)
        head = F.linear(h, weight(self.embeddings[0]))
        if self.bands is None:
            return F.cross_entropy(head, words, reduction="none")
        head, target = torch.cat([head, self.bands(h)], dim=1), words.clone()
        chosen = [self.within(words, band) for band in range(1, len(self.embeddings))]
        for band, mask in enumerate(chosen):
            target[mask] = self.edges[1] + band
        losses = F.cross_entropy(head, target, reduction="none")
        for band, mask in enumerate(chosen, 1):
            low = F.linear(h[mask], weight(self.projections[band]).t())
            logits = F.linear(F.dropout(low, self.dropout, self.training), weight(self.embeddings[band]))
            of_word = F.cross_entropy(logits, words[mask] - self.edges[band], reduction="none")
            losses = losses.index_put((mask,), of_word, accumulate=True)
        return losses

    @torch.no_grad()
    def drawn(self, h: Tensor, generator: torch.Generator) -> Tensor:
        """Words ``[n]``, each as often as it is likely after the states ``h`` ``[n, dim]``."""

        def draw(logits: Tensor) -> Tensor:
            return torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=generator)[:, 0].to(h.device)

        head = F.linear(h, weight(self.embeddings[0]))
        if self.bands is None:
            return draw(head)
        chosen = draw(torch.cat([head, self.bands(h)], dim=1))
        words = chosen.clone()
        for band in range(1, len(self.embeddings)):
            mask = chosen == self.edges[1] + band - 1
            low = F.linear(h[mask], weight(self.projections[band]).t())
            words[mask] = self.edges[band] + draw(F.linear(low, weight(self.embeddings[band])))
        return words


def weight(layer: nn.Module) -> Tensor:
    """Of an embedding or a linear layer."""
    assert isinstance(layer, (nn.Embedding, nn.Linear))
    return layer.weight


class Layer(nn.Module):
    """Causal self-attention and a feed-forward part of four times the width, each behind its norm.

    Args:
        dim: width.
        heads: of the attention.
        dropout: of what both parts add.
        attention_dropout: of the attention's weights.
        relu_dropout: inside the feed-forward part.
    """

    def __init__(self, dim: int, heads: int, dropout: float, attention_dropout: float, relu_dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_dropout, self.relu_dropout = attention_dropout, relu_dropout
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        for linear in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(linear.weight, gain=2**-0.5)
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, time, dim]`` to the same."""
        x = x + F.dropout(self.attention(self.norm1(x)), self.dropout, self.training)
        hidden = F.dropout(F.relu(self.fc1(self.norm2(x))), self.relu_dropout, self.training)
        return x + F.dropout(self.fc2(hidden), self.dropout, self.training)

    def attention(self, x: Tensor) -> Tensor:
        """Attention of each step to itself and those before it."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        dropout = self.attention_dropout if self.training else 0.0
        heads = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out(heads.transpose(1, 2).flatten(2))


class TransformerLM(nn.Module):
    """How likely each word of a text is after those before it.

    Args:
        vocabulary: number of words.
        dim, depth, heads: width, layers, and heads of the attention.
        context: longest input.
        cutoffs, factor: of the bands of words (``Words``).
        dropout, attention_dropout, relu_dropout: of the layers (``Layer``); the first also of their input.
        softmax_dropout: of the softmax (``Words``).
        layerdrop: how often training leaves a layer out.
        final_norm: a norm behind the last layer.
    """

    def __init__(
        self,
        vocabulary: int,
        dim: int,
        depth: int,
        heads: int,
        context: int,
        cutoffs: Sequence[int] = (),
        factor: int = 4,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        relu_dropout: float = 0.0,
        softmax_dropout: float = 0.0,
        layerdrop: float = 0.0,
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        self.dim, self.dropout, self.layerdrop = dim, dropout, layerdrop
        self.words = Words(vocabulary, dim, cutoffs, factor, softmax_dropout)
        self.layers = nn.ModuleList(Layer(dim, heads, dropout, attention_dropout, relu_dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim) if final_norm else nn.Identity()
        self.register_buffer("positions", sinusoids(context, dim), persistent=False)

    def forward(self, words: Tensor, targets: Tensor | torch.Generator | None = None) -> Tensor:
        """Negative log-likelihood, in nats, of each target.

        Args:
            words: ``[batch, time]``.
            targets: ``[batch, time]``, the words that follow them; a generator for words that it draws, each as often
                as it is likely; None for any word that might.

        Returns:
            ``[batch, time]``; without targets the words' logits, ``[batch, time, vocabulary]``.
        """
        x = math.sqrt(self.dim) * self.words(words) + self.get_buffer("positions")[: words.shape[1]]
        x = F.dropout(x, self.dropout, self.training)
        for layer in self.layers:
            if self.training and self.layerdrop and torch.rand(()) < self.layerdrop:
                x = x + 0 * sum(p.sum() for p in layer.parameters())  # a gradient of zero, not none (DDP)
            else:
                x = layer(x)
        if targets is None:
            return self.words.logits(self.norm(x))
        parts = self.norm(x).flatten(0, 1).split(CHUNK)
        if isinstance(targets, torch.Generator):
            targets = torch.cat([self.words.drawn(part, targets) for part in parts]).view_as(words)
        pairs = zip(parts, targets.flatten().split(CHUNK), strict=True)
        return torch.cat([self.words.nll(*pair) for pair in pairs]).view_as(targets)


def sinusoids(context: int, dim: int) -> Tensor:
    """Positions ``[context, dim]``: sines, then cosines, of periods from 2π to 20,000π; the first position is 2, as in
    fairseq."""
    rates = torch.exp(torch.arange(dim // 2) * (-math.log(10000) / (dim // 2 - 1)))
    angles = torch.arange(2, context + 2)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
