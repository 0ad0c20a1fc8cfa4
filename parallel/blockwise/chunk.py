"""Some queries, some of the keys they may attend to, and the blocks in which that is computed."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from meshwright.parallel.blockwise.bands import Limits
from meshwright.parallel.blockwise.block import Block
from meshwright.parallel.blockwise.diagonals import Diagonals
from meshwright.parallel.blockwise.dropout import kept
from meshwright.parallel.blockwise.kernels import kernel_for
from meshwright.parallel.blockwise.mask import Frame
from meshwright.parallel.blockwise.plan import Plan, plan_for
from meshwright.parallel.blockwise.positions import Pieces
from meshwright.parallel.blockwise.scoring import Scoring
from meshwright.parallel.blockwise.tiles import Tile

__all__ = ["Chunk", "Work", "bias_of", "columns_of", "rows_of"]

# what a call costs, in pairs of one head of width 64; measured, on an H200
_CPU_CALL_COST = 2e4
_GPU_CALL_COST = 1.6e8


@dataclass(frozen=True, eq=False)
class Chunk:
    """Queries and some of the keys they may attend to.

    Args:
        query: [batch, heads, queries, d].
        key: [batch, kv_heads, keys, d]; heads is a multiple of kv_heads.
        value: [batch, kv_heads, keys, d_v].
        queries: positions of the queries.
        keys: positions of the keys.
        bias: added to scores, four dims, broadcastable to [batch, heads, queries, keys].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    queries: Pieces
    keys: Pieces
    bias: Tensor | None = None


class Work:
    """The blocks of a chunk.

    Args:
        chunk: what to compute.
        scoring: how.
        fused: whether fused kernels may compute it; they give no gradient for a bias, and no second derivative.
    """

    def __init__(self, chunk: Chunk, scoring: Scoring, *, fused: bool) -> None:
        self._chunk = chunk
        self._scoring = scoring
        self._fused = fused
        self._scale = chunk.query.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """What there is to compute."""
        return self._plan.tiles

    @cached_property
    def whole(self) -> Block | None:
        """The only block, if it is all of the chunk."""
        if len(self.tiles) != 1:
            return None
        (tile,) = self.tiles
        everything = (len(tile.queries), len(tile.keys)) == (self._chunk.query.shape[2], self._chunk.key.shape[2])
        return self.block(tile) if everything and tile.sample is None else None

    def block(self, tile: Tile) -> Block:
        """One block."""
        chunk, scoring = self._chunk, self._scoring
        key, value = columns_of(chunk.key, tile), columns_of(chunk.value, tile)
        triangle = tile.sketch == (1 - len(tile.queries), 0) and len(tile.queries) == len(tile.keys)
        band = tile.sketch if isinstance(tile.sketch, Diagonals) and (triangle or self._limits.banded) else None
        block = Block(rows_of(chunk.query, tile), key, value, self._scale, scoring.softcap, band)
        allowed = self._plan.allowed(scoring.mask, tile, self._frame) if band is None else None
        return replace(block, allowed=allowed, bias=self._bias(tile), kept=self._kept(tile))

    def _bias(self, tile: Tile) -> Tensor | None:
        parts = [] if self._chunk.bias is None else [bias_of(self._chunk.bias, tile)]
        if self._scoring.bias is not None:
            parts.append(self._scoring.bias(tile.queries, tile.keys))
        parts = [each.masked_fill(each <= torch.finfo(each.dtype).min, -torch.inf) for each in parts]
        return sum(parts[1:], parts[0]) if parts else None

    def _kept(self, tile: Tile) -> Tensor | None:
        share, seed, frame = self._scoring.dropout_p, self._scoring.dropout_seed, self._frame
        if share == 0.0:
            return None
        there = replace(frame, batch=frame.batch[_samples(tile)])
        return kept(tile.queries, tile.keys, there, seed=seed, share=share, dtype=_wide(self._chunk.query))

    @cached_property
    def _frame(self) -> Frame:
        batch, heads = self._chunk.query.shape[:2]
        samples, first = self._scoring.first_sample, self._scoring.first_head
        return Frame(range(samples, samples + batch), range(first, first + heads), self._chunk.query.device)

    @cached_property
    def _plan(self) -> Plan:
        chunk, mask = self._chunk, self._scoring.mask
        if 0 in (*chunk.query.shape, *chunk.key.shape):
            return Plan(())
        if mask is not None:
            ends = {"queries": _end(chunk.queries), "keys": _end(chunk.keys)}
            mask.check(self._frame.batch, self._frame.heads, **ends)
        return plan_for(mask, chunk.queries, chunk.keys, limits=self._limits, frame=self._frame)

    @cached_property
    def _limits(self) -> Limits:
        chunk, scoring, mask = self._chunk, self._scoring, self._scoring.mask
        plain = chunk.bias is not None or scoring.bias is not None or scoring.dropout_p > 0.0
        probe = Block(chunk.query, chunk.key, chunk.value, self._scale, scoring.softcap)
        kernel = kernel_for(probe) if self._fused and not plain else None
        cost = _CPU_CALL_COST if chunk.query.device.type == "cpu" else _GPU_CALL_COST
        many = chunk.query.shape[1] * (chunk.query.shape[0] if mask is None or mask.rows == 1 else 1)
        return Limits(
            scoring.query_block,
            scoring.kv_block,
            fused=kernel is not None,
            call_cost=cost / many,
            banded=kernel is not None and kernel.bands,
        )


def rows_of(tensor: Tensor, tile: Tile) -> Tensor:
    """The queries of a tile, of [batch, heads, queries, ...]."""
    return tensor[_samples(tile), :, tile.rows]


def columns_of(tensor: Tensor, tile: Tile) -> Tensor:
    """The keys of a tile, of [batch, heads, keys, ...]."""
    return tensor[_samples(tile), :, tile.columns]


def bias_of(bias: Tensor, tile: Tile) -> Tensor:
    """Of [batch, heads, queries, keys] what a tile is about; dims of size 1 stay."""
    wanted = (_samples(tile), slice(None), tile.rows, tile.columns)
    return bias[tuple(slice(None) if size == 1 else own for size, own in zip(bias.shape, wanted, strict=True))]


def _samples(tile: Tile) -> slice:
    return slice(None) if tile.sample is None else slice(tile.sample, tile.sample + 1)


def _end(positions: Pieces) -> int:
    return max((each[-1] + 1 for each in positions), default=0)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
