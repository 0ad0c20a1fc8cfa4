"""One block of attention: some queries, some keys, and what stands between them."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from meshwright.parallel.blockwise.diagonals import Diagonals

__all__ = ["Allowed", "Block", "BlockGradients", "Upstream"]


class Allowed:
    """Pairs of a block that may attend, bool, broadcastable to [batch, heads, n, m], and what kernels ask about them.

    Answers are kept, since blocks of one shape share a mask.
    """

    def __init__(self, pairs: Tensor) -> None:
        self.pairs = pairs.reshape(*(1,) * (4 - pairs.dim()), *pairs.shape)
        self._scores: dict[torch.dtype, Tensor] = {}

    def scores(self, dtype: torch.dtype) -> Tensor:
        """0 where allowed and -inf elsewhere."""
        if dtype not in self._scores:
            empty = torch.zeros_like(self.pairs, dtype=dtype)
            self._scores[dtype] = empty.masked_fill_(~self.pairs, -torch.inf)
        return self._scores[dtype]

    @cached_property
    def dead(self) -> Tensor:
        """Rows without a key, [1 or batch, 1 or heads, 1 or n]."""
        return ~self.pairs.any(-1)


@dataclass(frozen=True, eq=False)
class Block:
    """Some queries and some keys.

    Args:
        query: [batch, heads, n, d].
        key: [batch, kv_heads, m, d].
        value: [batch, kv_heads, m, d_v].
        scale: of the products.
        softcap: bound of scaled products.
        band: of diagonals, which are allowed.
        allowed: which pairs are, where that is no band.
        bias: added to scores, broadcastable to [batch, heads, n, m].
        kept: factors of probabilities (dropout), likewise.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    softcap: float | None = None
    band: Diagonals | None = None
    allowed: Allowed | None = None
    bias: Tensor | None = None
    kept: Tensor | None = None

    def pairs(self) -> Tensor | None:
        """Pairs that may attend; None is all of them."""
        if self.band is not None:
            return self.band.tensor(self.query.shape[2], self.key.shape[2], self.query.device)
        return None if self.allowed is None else self.allowed.pairs

    @property
    def causal(self) -> bool:
        """Whether the band is a triangle: as many keys as queries, each allowed from its own place on."""
        return self.query.shape[2] == self.key.shape[2] and self.band == (1 - self.query.shape[2], 0)


class Upstream(NamedTuple):
    """What backward of a block is given: gradients of some rows of the result over all keys, and that result.

    Attributes:
        grad_out: [batch, heads, n, d_v].
        grad_lse: [batch, heads, n]; None is 0.
        out: [batch, heads, n, d_v].
        lse: [batch, heads, n]; -inf in rows without a key.
    """

    grad_out: Tensor
    grad_lse: Tensor | None
    out: Tensor
    lse: Tensor

    def delta(self) -> Tensor:
        """rowsum(grad_out * out) - grad_lse, [batch, heads, n]"""
        delta = (self.grad_out.to(self.lse.dtype) * self.out).sum(-1)
        return delta if self.grad_lse is None else delta - self.grad_lse


class BlockGradients(NamedTuple):
    """Gradients of a block's tensors; `bias` is that of the scores, [batch, heads, n, m]."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
