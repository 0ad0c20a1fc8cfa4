"""Attention in a run on shapes: what fused kernels keep and compute, and what this library's kernels do by blocks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from meshwright.parallel.blockwise.answer import attend_to
from meshwright.parallel.blockwise.calls import AttentionCall
from meshwright.parallel.blockwise.mask import Band
from meshwright.parallel.blockwise.sizes import Blockwise
from meshwright.parallel.operations import precision_of
from meshwright.parallel.work import FUSED_BACKWARD, Attention, Sent, besides

__all__ = ["Fetched", "OwnAttention", "Shared", "attend_fused"]

Fetched = Callable[[Tensor, Tensor, Tensor], tuple[Sequence[Sent], Sequence[Sent]]]
"""What a rank sends for one attention, from its query, key and value [..., heads, positions, width]."""


Given = tuple[Tensor, Tensor, Tensor]

_WHOLE = Band(None, None)
_MOST_BLOCKS = 16  # of queries, and of keys, that are gone through one by one


@dataclass(frozen=True)
class Shared:
    """How a sequence is shared by ranks.

    Args:
        num_keys: how many times as many keys as it is given attention meets.
        fetched: what is sent for an attention of given query, key and value, forward and backward.
    """

    num_keys: int
    fetched: Fetched


class OwnAttention:
    """Computes calls as this library's kernels would, wherever a plug sends them.

    Those that torch has a fused kernel for keep their inputs, their output and one number a query. Others are run
    block by block, on shapes, of which there are few: how large blocks are decides what they take.

    Args:
        tracer: that counts.
        sizes: of blocks.
        shared: of a sequence that ranks share.
    """

    def __init__(self, tracer: Any, sizes: Blockwise | None, shared: Shared | None) -> None:
        self._tracer, self._sizes, self._shared = tracer, sizes or Blockwise(), shared

    def __call__(self, asked: AttentionCall) -> Tensor:
        """[b, heads, s_q, d_v]."""
        if self._shared is None and _is_plain(asked):
            return self._by_blocks(asked)
        band = asked.mask if isinstance(asked.mask, Band) else _WHOLE
        given = asked.query, asked.key, asked.value
        return attend_fused(self._tracer, given, band=band, shared=self._shared)

    def _by_blocks(self, asked: AttentionCall) -> Tensor:
        mask = asked.mask if isinstance(asked.mask, Band) else None  # others would be asked for values
        query_block = max(self._sizes.query_block, -(-asked.query.shape[2] // _MOST_BLOCKS))
        kv_block = max(self._sizes.kv_block, -(-asked.key.shape[2] // _MOST_BLOCKS))
        return attend_to(replace(asked, mask=mask), replace(self._sizes, query_block=query_block, kv_block=kv_block))


def _is_plain(asked: AttentionCall) -> bool:
    """Whether no fused kernel computes a call (see `blockwise.chunk`)."""
    return asked.dropout_p > 0 or asked.softcap is not None or asked.bias is not None


def _share(band: Band, length: int) -> float:
    """Of all pairs of a sequence, those in a band; what lies on its border counts half, as in a causal triangle.

    >>> _share(Band(None, None), 4), _share(Band(None, 0), 4), _share(Band(2, 0), 4)
    (1.0, 0.5, 0.375)
    """
    outside = (length - min(side, length) for side in (band.left, band.right) if side is not None)
    return 1.0 - sum(rows**2 for rows in outside) / 2 / length**2


def attend_fused(
    tracer: Any,
    given: Given,
    *,
    band: Band = _WHOLE,
    mask: Tensor | None = None,
    shared: Shared | None = None,
) -> Tensor:
    """Attention [..., heads, queries, width] that keeps its inputs, its output and one number a query.

    Args:
        tracer: that counts.
        given: query, key and value [..., heads, positions, width]; those two may have fewer heads.
        band: of scores that are computed.
        mask: that is read, and kept, as scores.
        shared: of a sequence that ranks share.
    """
    query, key, value = given
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (each.to(torch.get_autocast_dtype("cpu")) for each in given)
    wider = 1 if shared is None else shared.num_keys
    share = _share(band, query.shape[-2] * wider)
    seen = query[..., 0].numel() * key.shape[-2] * wider * share
    more = besides(share, key.shape[-2] * wider, borders=sum(side is not None for side in (band.left, band.right)))
    flops = 2 * seen * (query.shape[-1] + value.shape[-1])
    sent = ((), ()) if shared is None else shared.fetched(query, key, value)
    masks = [] if mask is None else [mask]
    read_bytes = sum(each.numel() * each.itemsize for each in masks)
    asked = _Asked(tracer, Attention(flops, seen, precision_of(query), more), read_bytes, sent)
    found: Tensor = _Attend.apply(asked, query, key, value, *masks)  # type: ignore[no-untyped-call]
    return found


@dataclass(frozen=True)
class _Asked:
    """One attention: who counts it, what it computes, its mask, and what is sent for it forward and backward."""

    tracer: Any
    attention: Attention
    mask_bytes: int
    sent: tuple[Sequence[Sent], Sequence[Sent]]

    def count(self, *, backward: bool = False) -> None:
        """Counts one direction."""
        tally = self.tracer.tally()
        if tally is None:
            return
        factor = FUSED_BACKWARD if backward else 1.0
        tally.attentions.append(replace(self.attention, flops=factor * self.attention.flops))
        tally.operations += 1
        tally.moved_bytes += self.mask_bytes
        tally.sent += self.sent[backward]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, asked: _Asked, *given: Tensor) -> Tensor:
        query, _, value, *_ = given
        output = _positions_first(query, value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(*given[:3], output, sums, *given[3:])
        ctx.asked = asked
        asked.count()
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.asked.count(backward=True)
        made = [torch.empty_like(each) for each in ctx.saved_tensors[:3]]
        return None, *made, *(None for _ in ctx.saved_tensors[5:])


def _positions_first(query: Tensor, width: int) -> Tensor:
    """An output in the order that kernels write it, [..., queries, heads, width], seen as the inputs are."""
    if query.dim() < 3:
        return query.new_empty((*query.shape[:-1], width))
    *outer, heads, queries, _ = query.shape
    return query.new_empty((*outer, queries, heads, width)).transpose(-3, -2)
