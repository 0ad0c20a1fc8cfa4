"""Attention of queries that stay where they are to keys that are brought to them, and gradients that are brought back.

Backward by way of some keys needs the output and log-sum-exp over all of them alone, so that it may take them in any
order. Sums are in float32 or wider, also those that travel.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import Function

from meshwright.parallel.blockwise.attention import without_autocast
from meshwright.parallel.blockwise.mask import Band
from meshwright.parallel.blockwise.merge import Partial, empty_partial, merge_into
from meshwright.parallel.blockwise.partial import Chunk, Gradients, Scoring, Upstream, partial_backward, partial_forward
from meshwright.parallel.context.columns import columns_at, place_columns
from meshwright.parallel.context.join import Pieces
from meshwright.parallel.context.packed import Packed, Sizes
from meshwright.parallel.context.ranked import ranked
from meshwright.parallel.errors import WrapError

__all__ = ["Held", "Return", "Supply", "Wanted", "attend_supplied"]


class Held(NamedTuple):
    """Keys and values that are here for a while.

    Attributes:
        packed: these.
        positions: of them.
        wanted: whether this rank attends to any; otherwise `packed` may hold anything.
    """

    packed: Packed
    positions: Pieces
    wanted: bool


class Return(Protocol):
    """The way back of gradients of keys and values."""

    def add(self, mine: Packed | None) -> None:
        """Takes what this rank adds by way of the keys it holds, in the order in which they came."""
        ...

    def home(self) -> Packed:
        """The sums over all ranks, for this rank's own keys."""
        ...


class Supply(Protocol):
    """How keys come."""

    def keys(self, own: Packed) -> Iterator[Held]:
        """All keys, in parts; each part may be used until the next one is asked for."""
        ...

    def way_back(self, like: Tensor, sizes: Sizes) -> Return:
        """For the gradients of as many keys."""
        ...


@dataclass(frozen=True, eq=False)
class Wanted:
    """What is not a tensor.

    Args:
        queries: positions of this rank's queries.
        scoring: how they score keys.
        supply: how keys come.
    """

    queries: Pieces
    scoring: Scoring
    supply: Supply

    def chunk(self, held: Held, query: Tensor, bias: Tensor | None) -> Chunk:
        """The queries and some keys."""
        own = None if bias is None else columns_at(bias, held.positions)
        queries, keys = self.queries, held.positions
        if self._by_order:
            queries, keys = ranked(queries, keys)
        return Chunk(query, held.packed.key, held.packed.value, queries, keys, own)

    @property
    def _by_order(self) -> bool:
        """Whether only the order of positions counts."""
        scoring = self.scoring
        causal = scoring.mask is None or scoring.mask == Band(None, 0)
        return causal and scoring.bias is None and scoring.dropout_p == 0.0


def attend_supplied(
    query: Tensor, key: Tensor, value: Tensor, *, bias: Tensor | None, sinks: Tensor | None, wanted: Wanted
) -> Tensor:
    """Attention of this rank's queries to the keys of all ranks.

    Args:
        query: [batch, heads, own positions, d].
        key: [batch, kv_heads, own positions, d].
        value: [batch, kv_heads, own positions, d_v].
        bias: four dims, broadcastable to [batch, heads, own positions, all positions].
        sinks: [heads].
        wanted: the rest.
    """
    return _Attention.apply(query, key, value, bias, sinks, wanted)  # type: ignore[no-any-return, no-untyped-call]


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        query, key, value, bias, sinks, wanted = inputs
        own = Packed.of(key, value)
        found: Partial | None = None
        for held in wanted.supply.keys(own):
            if held.wanted:
                found = partial_forward(wanted.chunk(held, query, bias), wanted.scoring, found)
        found = found or empty_partial(query, value.shape[-1])
        if sinks is not None:
            nothing = empty_partial(query, value.shape[-1])
            merge_into(found, nothing._replace(lse=nothing.lse.copy_(sinks.unsqueeze(-1))))
        out = found.out.to(query.dtype)
        ctx.save_for_backward(query, own.memory, bias, sinks, out, found.lse)
        ctx.wanted, ctx.sizes = wanted, Sizes.of(key, value)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise WrapError(
                "attention to keys of other ranks has no second derivative; without create_graph=True, or with "
                "cp_kind: ulysses, gradients are there"
            )
        query, memory, bias, sinks, out, lse = ctx.saved_tensors
        own = Packed.within(memory, ctx.sizes, query.shape[2])
        upstream = Upstream(gradients[0], None, out, lse)
        found = _Sums(query, bias if ctx.needs_input_grad[3] else None)
        way_back = ctx.wanted.supply.way_back(query, ctx.sizes)
        with without_autocast(query.device.type):
            for held in ctx.wanted.supply.keys(own):
                chunk = ctx.wanted.chunk(held, query, bias) if held.wanted else None
                scoring, at = ctx.wanted.scoring, held.positions
                way_back.add(None if chunk is None else found.add(chunk, scoring, upstream, columns=at))
            grad = way_back.home()
            of_sinks = None if sinks is None else _of_sinks(sinks, upstream)
        made = (found.query, grad.key, grad.value, found.bias, of_sinks)
        given = (query, own.key, own.value, bias, sinks)
        return *(None if new is None else new.to(old.dtype) for new, old in zip(made, given, strict=True)), None


def _of_sinks(sinks: Tensor, upstream: Upstream) -> Tensor:
    lse = upstream.lse.masked_fill(upstream.lse == -torch.inf, 0.0)
    return -((sinks.unsqueeze(-1) - lse).exp() * upstream.delta()).sum((0, 2))


class _Sums:
    """Gradients of what stays: queries and bias."""

    def __init__(self, query: Tensor, bias: Tensor | None) -> None:
        wide = torch.promote_types(query.dtype, torch.float32)
        self.query = torch.zeros_like(query, dtype=wide)
        self.bias = None if bias is None else torch.zeros_like(bias, dtype=wide)

    def add(self, chunk: Chunk, scoring: Scoring, upstream: Upstream, *, columns: Pieces) -> Packed:
        """Computes by way of some keys; returns their gradients. A bias has them in these columns."""
        keys = Packed.zeros(self.query, Sizes.of(chunk.key, chunk.value), chunk.key.shape[2])
        bias = None
        if self.bias is not None and chunk.bias is not None:
            bias = torch.zeros_like(chunk.bias, dtype=self.bias.dtype)
        so_far = Gradients(self.query, keys.key, keys.value, bias)
        partial_backward(chunk, scoring, upstream, so_far=so_far, with_bias=bias is not None)
        if self.bias is not None and bias is not None:
            place_columns(self.bias, bias, columns)
        return keys
