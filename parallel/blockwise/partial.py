"""The two halves of attention, over some of the keys: what rings and other dealt sequences are built of.

Forward over chunks of keys gives partial results that are merged, in any order; backward of each chunk needs the merged
result alone. The numbers do not depend on how keys are dealt, except for the order of sums.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from meshwright.parallel.blockwise.diagonals import Diagonals
from meshwright.parallel.blockwise.mask import Frame
from meshwright.parallel.blockwise.merge import Partial, empty_partial, merge_into
from meshwright.parallel.blockwise.plain import Block, plain_backward, plain_forward
from meshwright.parallel.blockwise.positions import Pieces
from meshwright.parallel.blockwise.scoring import Scoring
from meshwright.parallel.blockwise.tiles import Tile, tiles_of

__all__ = ["Chunk", "Gradients", "delta_of", "partial_backward", "partial_forward"]


@dataclass(frozen=True, eq=False)
class Chunk:
    """Queries and some of the keys they may attend to.

    Args:
        query: [batch, heads, queries, d].
        key: [batch, kv_heads, keys, d]; heads is a multiple of kv_heads.
        value: [batch, kv_heads, keys, d_v].
        queries: positions of the queries.
        keys: positions of the keys.
        bias: broadcastable to [batch, heads, queries, keys], added to scores.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    queries: Pieces
    keys: Pieces
    bias: Tensor | None = None


@dataclass(eq=False)
class Gradients:
    """Gradients of a chunk's tensors, in float32 or wider, to be added to; `bias` is None where there is none."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None


def partial_forward(chunk: Chunk, scoring: Scoring, so_far: Partial | None = None) -> Partial:
    """Attention of the chunk's queries over its keys, merged in place into `so_far` where that is given."""
    result = so_far or empty_partial(chunk.query, chunk.value.shape[-1])
    for tile, block in _blocks(chunk, scoring):
        merge_into(Partial(*(_rows(each, tile) for each in result)), plain_forward(block))
    return result


def partial_backward(
    chunk: Chunk,
    scoring: Scoring,
    grad_out: Tensor,
    *,
    result: Partial,
    grad_lse: Tensor | None = None,
    so_far: Gradients | None = None,
) -> Gradients:
    """Gradients by way of the chunk's keys, added in place to `so_far` where that is given.

    Args:
        chunk: what forward was given.
        scoring: likewise.
        grad_out: [batch, heads, queries, d_v].
        result: of all chunks, merged.
        grad_lse: [batch, heads, queries], if something was made of lse.
        so_far: what other chunks gave.
    """
    found = so_far or _no_gradients(chunk)
    delta = delta_of(grad_out, result, grad_lse)
    for tile, block in _blocks(chunk, scoring):
        rows = [_rows(each, tile) for each in (grad_out, delta, result.lse)]
        made = plain_backward(block, *rows)
        _rows(found.query, tile).add_(made.query)
        _columns(found.key, tile).add_(made.key)
        _columns(found.value, tile).add_(made.value)
        if found.bias is not None and made.bias is not None:
            own = _bias_slice(found.bias, tile)
            own.add_(made.bias.sum_to_size(own.shape))
    return found


def delta_of(grad_out: Tensor, result: Partial, grad_lse: Tensor | None) -> Tensor:
    """rowsum(grad_out * out) - grad_lse, [batch, heads, queries]."""
    delta = (grad_out.to(result.lse.dtype) * result.out).sum(-1)
    return delta if grad_lse is None else delta - grad_lse


def _no_gradients(chunk: Chunk) -> Gradients:
    dtype = torch.promote_types(chunk.query.dtype, torch.float32)
    query, key, value = (torch.zeros_like(each, dtype=dtype) for each in (chunk.query, chunk.key, chunk.value))
    bias = chunk.bias
    return Gradients(query, key, value, None if bias is None else torch.zeros_like(bias, dtype=dtype))


def _blocks(chunk: Chunk, scoring: Scoring) -> Iterator[tuple[Tile, Block]]:
    sizes = {"query_block": scoring.query_block, "kv_block": scoring.kv_block}
    scale = chunk.query.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    for tile in tiles_of(scoring.mask, chunk.queries, chunk.keys, **sizes):
        block = Block(
            _rows(chunk.query, tile), _columns(chunk.key, tile), _columns(chunk.value, tile), scale, scoring.softcap
        )
        bias = None if chunk.bias is None else _bias_slice(chunk.bias, tile)
        if scoring.bias is not None:
            made = scoring.bias(tile.queries, tile.keys)
            bias = made if bias is None else bias + made
        yield tile, replace(block, allowed=_allowed(chunk, scoring, tile), bias=bias)


def _allowed(chunk: Chunk, scoring: Scoring, tile: Tile) -> Tensor | None:
    device = chunk.query.device
    if isinstance(tile.sketch, Diagonals):
        return tile.sketch.tensor(len(tile.queries), len(tile.keys), device)
    if tile.sketch is not None or scoring.mask is None:
        return None
    sample, samples = tile.sample or 0, chunk.query.shape[0] if tile.sample is None else 1
    batch = range(scoring.first_sample + sample, scoring.first_sample + sample + samples)
    heads = range(scoring.first_head, scoring.first_head + chunk.query.shape[1])
    mask = scoring.mask if tile.sample is None else scoring.mask.row(tile.sample)
    return mask.pairs(tile.queries, tile.keys, Frame(batch, heads, device))


def _samples(tile: Tile) -> slice:
    return slice(None) if tile.sample is None else slice(tile.sample, tile.sample + 1)


def _rows(tensor: Tensor, tile: Tile) -> Tensor:
    return tensor[_samples(tile), :, tile.rows]


def _columns(tensor: Tensor, tile: Tile) -> Tensor:
    return tensor[_samples(tile), :, tile.columns]


def _bias_slice(bias: Tensor, tile: Tile) -> Tensor:
    """[batch, heads, queries, keys], dims of size 1 as they are."""
    wanted = (_samples(tile), slice(None), tile.rows, tile.columns)
    return bias[tuple(slice(None) if size == 1 else own for size, own in zip(bias.shape, wanted, strict=True))]
