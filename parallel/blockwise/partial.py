"""The two halves of attention, over some of the keys: what rings and other dealt sequences are built of.

Forward over chunks of keys gives partial results that are merged, in any order; backward by way of each chunk needs the
merged result alone. The numbers do not depend on how keys are dealt, but for the order of sums.

>>> from meshwright.parallel.blockwise.masks import causal
>>> tokens, scoring = torch.randn(1, 2, 8, 4), Scoring(mask=causal())
>>> late = tokens[:, :, 4:]
>>> near = Chunk(late, late, late, queries=(range(4, 8),), keys=(range(4, 8),))
>>> far = Chunk(late, tokens[:, :, :4], tokens[:, :, :4], queries=(range(4, 8),), keys=(range(4),))
>>> whole = Chunk(tokens, tokens, tokens, queries=(range(8),), keys=(range(8),))
>>> both = partial_forward(far, scoring, so_far=partial_forward(near, scoring))
>>> torch.allclose(both.out, partial_forward(whole, scoring).out[:, :, 4:], atol=1e-6)
True
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.parallel.blockwise.block import BlockGradients, Upstream
from meshwright.parallel.blockwise.chunk import Chunk, Work, bias_of, columns_of, rows_of
from meshwright.parallel.blockwise.kernels import block_backward, block_forward
from meshwright.parallel.blockwise.merge import Partial, empty_partial, merge_into
from meshwright.parallel.blockwise.scoring import Scoring
from meshwright.parallel.blockwise.tiles import Tile

__all__ = ["Chunk", "Gradients", "Partial", "Scoring", "Upstream", "partial_backward", "partial_forward"]


@dataclass(eq=False)
class Gradients:
    """Gradients of a chunk's tensors, in float32 or wider, to be added to; `bias` is None where there is none."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None


@torch.no_grad()
def partial_forward(chunk: Chunk, scoring: Scoring, so_far: Partial | None = None) -> Partial:
    """Attention of a chunk's queries over its keys, merged in place into `so_far` where that is given.

    Returns:
        Output [batch, heads, queries, d_v] and log-sum-exp [batch, heads, queries], in float32 or wider; 0 and -inf for
        queries that attend to none of the keys.
    """
    result = so_far or empty_partial(chunk.query, chunk.value.shape[-1])
    work = Work(chunk, scoring, fused=True)
    for tile in work.tiles:
        part, rows = block_forward(work.block(tile)), Partial(*(rows_of(each, tile) for each in result))
        if tile.first and so_far is None:
            rows.out.copy_(part.out)
            rows.lse.copy_(part.lse)
        else:
            merge_into(rows, part)
    return result


def partial_backward(
    chunk: Chunk, scoring: Scoring, upstream: Upstream, *, so_far: Gradients | None = None, with_bias: bool = True
) -> Gradients:
    """Gradients by way of a chunk's keys, added in place to `so_far` where that is given.

    Where gradients are enabled, all of it is plain torch, and differentiable.

    Args:
        chunk: what forward was given.
        scoring: likewise.
        upstream: gradients of output and log-sum-exp, and these themselves, over all chunks.
        so_far: what other chunks gave.
        with_bias: whether the chunk's bias, if it has one, wants a gradient, which fused kernels do not give.
    """
    found = so_far or no_gradients(chunk, with_bias=with_bias)
    with_bias = found.bias is not None
    work = Work(chunk, scoring, fused=not with_bias and not torch.is_grad_enabled())
    for tile in work.tiles:
        grad_out, grad_lse, out, lse = upstream
        grad_lse = None if grad_lse is None else rows_of(grad_lse, tile)
        rows = Upstream(rows_of(grad_out, tile), grad_lse, rows_of(out, tile), rows_of(lse, tile))
        _add(found, tile, block_backward(work.block(tile), rows, with_bias=with_bias))
    return found


def no_gradients(chunk: Chunk, *, with_bias: bool) -> Gradients:
    """Zeros to add gradients to."""
    dtype = torch.promote_types(chunk.query.dtype, torch.float32)
    query, key, value = (torch.zeros_like(each, dtype=dtype) for each in (chunk.query, chunk.key, chunk.value))
    bias = chunk.bias if with_bias else None
    return Gradients(query, key, value, None if bias is None else torch.zeros_like(bias, dtype=dtype))


def _add(found: Gradients, tile: Tile, made: BlockGradients) -> None:
    rows_of(found.query, tile).add_(made.query)
    columns_of(found.key, tile).add_(made.key)
    columns_of(found.value, tile).add_(made.value)
    if found.bias is not None and made.bias is not None:
        own = bias_of(found.bias, tile)
        own.add_(made.bias.sum_to_size(own.shape))
