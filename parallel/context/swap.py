"""Positions exchanged for heads and back, among consecutive ranks (DeepSpeed-Ulysses, arXiv 2309.14509).

  to_heads        own positions, all heads   ->  all positions, own heads
  to_positions    all positions, own heads   ->  own positions, all heads; heads that several ranks hold are summed

Each is the other's adjoint, so that both may be differentiated as often as asked. Several tensors are one exchange;
what a rank keeps is not sent.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import Function

from meshwright.parallel.context.axis import ContextAxis, Shares
from meshwright.parallel.context.join import Joined
from meshwright.parallel.layout import Range

__all__ = ["Swap", "parts_at", "to_heads", "to_positions"]

_Shape: TypeAlias = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Swap:
    """Who holds what.

    Args:
        axis: the ranks that exchange.
        joined: their positions.
        heads: of each tensor, the heads of each rank.
    """

    axis: ContextAxis
    joined: Joined
    heads: tuple[tuple[Range, ...], ...]

    def shapes(self, tensors: Sequence[Tensor], *, of_heads: bool) -> list[list[_Shape]]:
        """Of each rank's shares, those with this rank's heads or those with its positions; none of its own."""
        me = self.axis.rank
        found: list[list[_Shape]] = []
        for rank, size in enumerate(self.joined.sizes):
            own = [
                (each.shape[0], _width(heads[me if of_heads else rank]), size, each.shape[3])
                for each, heads in zip(tensors, self.heads, strict=True)
            ]
            if not of_heads:
                own = [(batch, kinds, self.joined.sizes[me], width) for batch, kinds, _, width in own]
            found.append([] if rank == me else own)
        return found


def to_heads(swap: Swap, *tensors: Tensor) -> tuple[Tensor, ...]:
    """All positions of this rank's heads.

    Args:
        swap: who holds what.
        tensors: [batch, heads, own positions, d], of one dtype; sizes but the positions may differ.
    """
    return _ToHeads.apply(swap, *tensors)  # type: ignore[no-any-return, no-untyped-call]


def to_positions(swap: Swap, *tensors: Tensor) -> tuple[Tensor, ...]:
    """All heads of this rank's positions.

    Args:
        swap: who holds what.
        tensors: [batch, own heads, all positions, d].
    """
    return _ToPositions.apply(swap, *tensors)  # type: ignore[no-any-return, no-untyped-call]


class _ToHeads(Function):
    @staticmethod
    def forward(ctx: Any, swap: Swap, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.swap = swap
        me, places = swap.axis.rank, swap.joined.places
        sent = _Cut(tensors[0], swap.shapes(tensors, of_heads=False))
        for rank, number, share in sent:
            share.copy_(_heads(tensors[number], swap.heads[number][rank]))
        received = _exchanged(swap, sent, swap.shapes(tensors, of_heads=True))
        total = sum(swap.joined.sizes)
        whole = []
        for each, heads in zip(tensors, swap.heads, strict=True):
            whole.append(each.new_empty(each.shape[0], _width(heads[me]), total, each.shape[3]))
            for at, part in parts_at(_heads(each, heads[me]), places[me]):
                whole[-1][:, :, at].copy_(part)
        for rank, number, share in received:
            for at, part in parts_at(share, places[rank]):
                whole[number][:, :, at].copy_(part)
        return tuple(whole)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, *to_positions(ctx.swap, *gradients)


class _ToPositions(Function):
    @staticmethod
    def forward(ctx: Any, swap: Swap, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.swap = swap
        me, places = swap.axis.rank, swap.joined.places
        sent = _Cut(tensors[0], swap.shapes(tensors, of_heads=True))
        for rank, number, share in sent:
            for at, part in parts_at(share, places[rank]):
                part.copy_(tensors[number][:, :, at])
        received = _exchanged(swap, sent, swap.shapes(tensors, of_heads=False))
        whole = [_sums(each, heads, swap.joined.sizes[me]) for each, heads in zip(tensors, swap.heads, strict=True)]
        for each, total, heads in zip(tensors, whole, swap.heads, strict=True):
            for at, part in parts_at(_heads(total, heads[me]), places[me]):
                part.add_(each[:, :, at]) if _held_often(heads) else part.copy_(each[:, :, at])
        for rank, number, share in received:
            heads = swap.heads[number]
            part = _heads(whole[number], heads[rank])
            part.add_(share) if _held_often(heads) else part.copy_(share)
        return tuple(total.to(each.dtype) for each, total in zip(tensors, whole, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, *to_heads(ctx.swap, *gradients)


class _Cut:
    """Shares of several tensors for several ranks, in one piece of memory."""

    def __init__(self, like: Tensor, shapes: list[list[_Shape]]) -> None:
        self.shares = Shares.empty(like, [sum(map(prod, own)) for own in shapes])
        self._shapes = shapes

    def __iter__(self) -> Iterator[tuple[int, int, Tensor]]:
        """Rank, number of the tensor, share."""
        begin = 0
        for rank, own in enumerate(self._shapes):
            for number, shape in enumerate(own):
                yield rank, number, self.shares.memory[begin : begin + prod(shape)].view(shape)
                begin += prod(shape)


def _exchanged(swap: Swap, sent: _Cut, shapes: list[list[_Shape]]) -> _Cut:
    received = _Cut(sent.shares.memory, shapes)
    swap.axis.exchange(received.shares, sent.shares).wait()
    return received


def _sums(tensor: Tensor, heads: tuple[Range, ...], size: int) -> Tensor:
    """Room for all heads; zeros, in float32 or wider, where several ranks add to one."""
    shape = (tensor.shape[0], max(stop for _, stop in heads), size, tensor.shape[3])
    if not _held_often(heads):
        return tensor.new_empty(shape)
    return tensor.new_zeros(shape, dtype=torch.promote_types(tensor.dtype, torch.float32))


def _held_often(heads: tuple[Range, ...]) -> bool:
    return any(one[1] > other[0] for one, other in pairwise(heads))


def _width(of: Range) -> int:
    return of[1] - of[0]


def _heads(tensor: Tensor, heads: Range) -> Tensor:
    return tensor[:, slice(*heads)]


def parts_at(tensor: Tensor, places: Sequence[slice]) -> Iterator[tuple[slice, Tensor]]:
    """Where each piece of a rank's positions is among all, and that piece."""
    begin = 0
    for at in places:
        size = len(range(at.start, at.stop, at.step or 1))
        yield at, tensor[:, :, begin : begin + size]
        begin += size
