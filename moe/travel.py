"""Rows that travel between ranks and gradients that travel back: pairs of collectives, each the other's adjoint.

  exchange        uneven all-to-all          gradient: the same with its splits swapped
  gather_rows     rows of all ranks          gradient: summed over ranks, own rows kept
  scatter_rows    summed, own rows kept      gradient: rows of all ranks

Tensors that travel together are one node of the autograd graph, so that all ranks come to the collectives of a backward
in one order. All ranks must take part, those without rows too, and ask for the gradients of the same tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from meshwright.moe.axes import RowAxis

__all__ = ["Splits", "exchange", "gather_rows", "packed", "scatter_rows", "unpacked"]


@dataclass(frozen=True)
class Splits:
    """Rows for and from each rank of an axis.

    >>> Splits((1, 2), (3, 0)).back
    Splits(sent=(3, 0), received=(1, 2))
    """

    sent: tuple[int, ...]
    received: tuple[int, ...]

    @property
    def back(self) -> "Splits":
        """Of the way back."""
        return Splits(self.received, self.sent)


def exchange(axis: RowAxis, splits: Splits, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Sends rows of several tensors in one message to each rank.

    Args:
        axis: the ranks.
        splits: rows for each of them and from each.
        tensors: [rows, ...], of any dtypes; those of floats have gradients.
    """
    return _Exchange.apply(axis, splits, *tensors)  # type: ignore[no-any-return, no-untyped-call]


def gather_rows(axis: RowAxis, sizes: Sequence[int], *tensors: Tensor) -> tuple[Tensor, ...]:
    """The rows of all ranks, in order of ranks.

    Args:
        axis: the ranks.
        sizes: rows of each of them.
        tensors: [own rows, ...], of any dtypes; those of floats have gradients.
    """
    return _Gather.apply(axis, tuple(sizes), *tensors)  # type: ignore[no-any-return, no-untyped-call]


def scatter_rows(axis: RowAxis, sizes: Sequence[int], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Sums over all ranks and keeps own rows; shapes as in `gather_rows`, the other way round."""
    return _Scatter.apply(axis, tuple(sizes), *tensors)  # type: ignore[no-any-return, no-untyped-call]


class _Exchange(Function):
    @staticmethod
    def forward(ctx: Any, axis: RowAxis, *inputs: Any) -> tuple[Tensor, ...]:
        splits, *tensors = inputs
        ctx.axis, ctx.splits = axis, splits
        arrived = unpacked(axis.exchange(packed(tensors), splits.sent, splits.received), tensors)
        ctx.mark_non_differentiable(*(each for each in arrived if not each.is_floating_point()))
        return arrived

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        wanted = [number for number in range(len(gradients)) if ctx.needs_input_grad[number + 2]]
        found = dict(zip(wanted, exchange(ctx.axis, ctx.splits.back, *map(gradients.__getitem__, wanted)), strict=True))
        return None, None, *map(found.get, range(len(gradients)))


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, axis: RowAxis, *inputs: Any) -> tuple[Tensor, ...]:
        sizes, *tensors = inputs
        ctx.axis, ctx.sizes = axis, sizes
        whole = tuple(_gathered(axis, sizes, each) for each in tensors)
        ctx.mark_non_differentiable(*(each for each in whole if not each.is_floating_point()))
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        wanted = [number for number in range(len(gradients)) if ctx.needs_input_grad[number + 2]]
        parts = scatter_rows(ctx.axis, ctx.sizes, *map(gradients.__getitem__, wanted))
        found = dict(zip(wanted, parts, strict=True))
        return None, None, *map(found.get, range(len(gradients)))


class _Scatter(Function):
    @staticmethod
    def forward(ctx: Any, axis: RowAxis, *inputs: Any) -> tuple[Tensor, ...]:
        sizes, *tensors = inputs
        ctx.axis, ctx.sizes = axis, sizes
        if axis.size == 1 or max(sizes) == 0:
            return tuple(each.clone() for each in tensors)
        return tuple(axis.scatter_sum(each, list(sizes), 0).clone() for each in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, None, *gather_rows(ctx.axis, ctx.sizes, *gradients)


def _gathered(axis: RowAxis, sizes: tuple[int, ...], tensor: Tensor) -> Tensor:
    if axis.size == 1 or max(sizes) == 0:
        return tensor.clone()
    return axis.gather(tensor, list(sizes), 0)


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """A single tensor as it is; of several, the bytes of each row side by side."""
    if len(tensors) == 1:
        return tensors[0]
    flat = [each.reshape(len(each), prod(each.shape[1:])) for each in tensors]
    # one row may be called contiguous whatever its strides are; a clone has those that a view of bytes needs
    return torch.cat([each.clone(memory_format=torch.contiguous_format).view(torch.uint8) for each in flat], 1)


def unpacked(rows: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What `packed` made one of, of the dtypes and widths of other tensors."""
    if len(like) == 1:
        return (rows.view_as(rows),)
    widths = [prod(each.shape[1:]) * each.element_size() for each in like]
    parts = [part.clone(memory_format=torch.contiguous_format) for part in rows.split(widths, 1)]
    return tuple(
        part.view(each.dtype).reshape(len(part), *each.shape[1:]) for part, each in zip(parts, like, strict=True)
    )
