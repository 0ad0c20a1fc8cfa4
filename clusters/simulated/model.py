"""A transformer as numbers: its parameters, its matrix products, what its other operations read and write.

Two conventions of model FLOPs are in use and differ by half of the attention: papers of 2021 to 2024 count all scores,
newer reports only those below the diagonal. A multiplication and an addition are two FLOPs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from meshwright.parallel.work import Product

__all__ = ["Product", "Transformer"]


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """A decoder of equal layers.

    Args:
        layers: blocks of attention and feed-forward.
        hidden: width.
        heads: query heads.
        kv_heads: key and value heads.
        ffn: inner width of the feed-forward (of one expert, where there are experts).
        vocab: rows of the embedding.
        sequence: tokens of a sequence.
        gated: three matrices in the feed-forward instead of two.
        tied: embedding and head share their matrix.
        experts: feed-forwards that a router chooses among; 0 for none.
        top_k: experts of a token.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    sequence: int
    gated: bool = False
    tied: bool = False
    experts: int = 0
    top_k: int = 0

    def __post_init__(self) -> None:
        if min(self.layers, self.hidden, self.heads, self.kv_heads, self.ffn, self.sequence) < 1 or self.vocab < 0:
            raise ValueError(f"sizes of a transformer are positive, not {self}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads do not share {self.kv_heads} key and value heads evenly")
        if bool(self.experts) != bool(self.top_k) or self.top_k > self.experts:
            raise ValueError(f"a token goes to top_k of the experts: {self.top_k} of {self.experts}")

    @property
    def head_dim(self) -> int:
        """Width of one head: hidden / heads, rounded down."""
        return self.hidden // self.heads

    @property
    def kv_width(self) -> int:
        """Width of all keys."""
        return self.head_dim * self.kv_heads

    @property
    def attention_parameters(self) -> int:
        """Matrices of one layer's attention."""
        return self.hidden * (2 * self.hidden + 2 * self.kv_width)

    @property
    def expert_parameters(self) -> int:
        """Matrices of one feed-forward."""
        return self.hidden * self.ffn * (3 if self.gated else 2)

    @property
    def layer_parameters(self) -> int:
        """Matrices and vectors of one layer, all its experts included."""
        vectors = 2 * self.hidden if self.gated else 9 * self.hidden + self.ffn
        router = self.hidden * self.experts
        return self.attention_parameters + self.expert_parameters * max(1, self.experts) + router + vectors

    @property
    def embedding_parameters(self) -> int:
        """Of the table of tokens; the head has as many again unless they are tied."""
        return self.vocab * self.hidden

    @property
    def last_norm_parameters(self) -> int:
        """Of the norm behind the last layer."""
        return self.hidden * (1 if self.gated else 2)

    @property
    def parameters(self) -> int:
        """All of them, without a table of positions.

        >>> gpt = Transformer(layers=96, hidden=12288, heads=96, kv_heads=96, ffn=49152, vocab=51200, sequence=2048,
        ...                   tied=True)
        >>> round(gpt.parameters / 1e9, 1)
        174.6
        """
        tables = self.embedding_parameters * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + self.last_norm_parameters + tables

    def layer_flops(self, *, causal: bool = False) -> float:
        """Model FLOPs of one layer for one token, forward: 2 for each matrix element, 4 h s for the scores.

        Args:
            causal: count half of the scores.
        """
        active = self.attention_parameters + self.expert_parameters * max(1, self.top_k)
        return 2 * active + 4 * self.hidden * self.sequence * (0.5 if causal else 1.0)

    def flops_per_token(self, *, causal: bool = False, recompute: bool = False) -> float:
        """Model FLOPs of a token, forward and backward: 6 N + 12 L h s, the head counted once and the table not.

        Narayanan et al. (arXiv 2104.04473, equation 3): 96 B s l h^2 (1 + s / 6h + V / 16lh) with `recompute`.

        Args:
            causal: count half of the scores.
            recompute: count the second forward of the layers, as "hardware FLOPs" do.
        """
        passes = 4 if recompute else 3
        return passes * self.layers * self.layer_flops(causal=causal) + 6 * self.hidden * self.vocab

    def linear_products(self, tokens: int, tp: int = 1) -> Iterator[Product]:
        """Products with weights of one layer's forward on one rank, experts aside.

        Args:
            tokens: that the rank computes.
            tp: ranks that share each matrix.
        """
        yield Product(tokens, max(1, (self.hidden + 2 * self.kv_width) // tp), self.hidden)
        yield Product(tokens, self.hidden, max(1, self.hidden // tp))
        if not self.experts:
            yield from self.ffn_products(tokens, tp)

    def ffn_products(self, tokens: int, tp: int = 1, batch: int = 1) -> Iterator[Product]:
        """Products of the feed-forward, or of `batch` experts with `tokens` each."""
        inner = max(1, self.ffn // tp)
        yield Product(tokens, inner * (2 if self.gated else 1), self.hidden, batch)
        yield Product(tokens, self.hidden, inner, batch)

    def score_products(self, sequences: int, queries: int, tp: int = 1) -> Iterator[Product]:
        """Products of queries with keys and of weights with values, scores kept in memory.

        Args:
            sequences: of a micro-batch.
            queries: positions of a sequence that the rank holds; it sees all keys.
            tp: ranks that share the heads.
        """
        batch = max(1, sequences * self.heads // tp)
        yield Product(queries, self.sequence, self.head_dim, batch)
        yield Product(queries, self.head_dim, self.sequence, batch)
