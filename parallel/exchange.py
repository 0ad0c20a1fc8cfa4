"""Autograd pairs along one mesh axis: what a collective does to a value, and its adjoint to the gradient.

  name            value                       gradient
  enter           unchanged                   summed over ranks        (f of Megatron-LM, arXiv 1909.08053)
  leave           summed over ranks           unchanged                (g)
  gather          shares joined               summed, own share kept   (sequence parallel, arXiv 2205.05198)
  scatter_sum     summed, own share kept      shares joined
  cut             own share kept              shares joined
  join            shares joined               own share kept

`enter` and `gather` stand before work that each rank does on its own slice; `cut` and `join` stand around
work that every rank does alike.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import Function

from meshwright.parallel.context.dealing import Dealing

__all__ = ["Axis", "cut", "enter", "gather", "join", "leave", "rows", "scatter_sum"]


class Axis(Protocol):
    """The ranks along one mesh axis, as this rank sees them."""

    @property
    def rank(self) -> int:
        """Position of this rank along the axis."""
        ...

    @property
    def size(self) -> int:
        """Degree of the axis."""
        ...

    @property
    def dealing(self) -> Dealing:
        """Which part of a dealt dim each rank holds."""
        ...

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums `tensor` over the axis in place (it must be contiguous) and returns it."""
        ...

    def largest(self, tensor: Tensor) -> Tensor:
        """Element-wise maximum over the axis in place."""
        ...

    def gather(self, tensor: Tensor, sizes: list[int], dim: int) -> Tensor:
        """Joins the shares of all ranks along `dim`; `sizes` lists each rank's."""
        ...

    def scatter_sum(self, tensor: Tensor, sizes: list[int], dim: int) -> Tensor:
        """Sums over the axis and keeps this rank's share along `dim`."""
        ...


def enter(tensor: Tensor, axis: Axis) -> Tensor:
    """Hands the same value to work that differs by rank; gradients are summed."""
    return _Enter.apply(tensor, axis) if tensor.requires_grad else tensor  # type: ignore[no-untyped-call]


def leave(tensor: Tensor, axis: Axis) -> Tensor:
    """Sums partial results of the ranks, in place."""
    return _Leave.apply(tensor, axis)  # type: ignore[no-any-return, no-untyped-call]


def gather(tensor: Tensor, axis: Axis, dim: int, full: int) -> Tensor:
    """Joins shares along `dim` (of size `full`) before work that differs by rank."""
    return _Gather.apply(tensor, axis, dim, full, True)  # type: ignore[no-any-return, no-untyped-call]


def join(tensor: Tensor, axis: Axis, dim: int, full: int) -> Tensor:
    """Joins shares along `dim` (of size `full`) before work that all ranks do alike."""
    return _Gather.apply(tensor, axis, dim, full, False)  # type: ignore[no-any-return, no-untyped-call]


def scatter_sum(tensor: Tensor, axis: Axis, dim: int) -> Tensor:
    """Sums partial results and keeps this rank's share along `dim`."""
    return _Scatter.apply(tensor, axis, dim, True)  # type: ignore[no-any-return, no-untyped-call]


def cut(tensor: Tensor, axis: Axis, dim: int) -> Tensor:
    """Keeps this rank's share along `dim` of a value that all ranks hold."""
    return _Scatter.apply(tensor, axis, dim, False)  # type: ignore[no-any-return, no-untyped-call]


def _own(tensor: Tensor, axis: Axis, dim: int) -> Tensor:
    return rows(tensor, axis.dealing.pieces(tensor.shape[dim], axis.rank), dim)


def rows(tensor: Tensor, pieces: tuple[range, ...], dim: int) -> Tensor:
    """Positions of `pieces` in their order, in memory of their own whose order dropout masks follow."""
    parts = [tensor[(*[slice(None)] * dim, slice(each.start, each.stop, each.step))] for each in pieces]
    if len(parts) == 1:
        return parts[0].clone()
    return torch.cat(parts, dim) if parts else tensor.narrow(dim, 0, 0).clone()


def _joined(tensor: Tensor, axis: Axis, dim: int, *, full: int) -> Tensor:
    """The shares of all ranks in the order of positions."""
    dealing = axis.dealing
    whole = axis.gather(tensor, dealing.sizes(full), dim)
    if dealing.kind == "contiguous":
        return _fresh(whole)
    ordered, start = torch.empty_like(whole), 0
    for each in (piece for rank in range(axis.size) for piece in dealing.pieces(full, rank)):
        ordered[(*[slice(None)] * dim, slice(each.start, each.stop, each.step))] = whole.narrow(dim, start, len(each))
        start += len(each)
    return ordered


def _scattered(tensor: Tensor, axis: Axis, dim: int) -> Tensor:
    """Sums over the axis; this rank's positions."""
    full, dealing = tensor.shape[dim], axis.dealing
    if dealing.kind != "contiguous":
        pieces = tuple(piece for rank in range(axis.size) for piece in dealing.pieces(full, rank))
        tensor = rows(tensor, pieces, dim)
    return _fresh(axis.scatter_sum(tensor, dealing.sizes(full), dim))


def _fresh(tensor: Tensor) -> Tensor:
    """A tensor that is no view: models may change what they get in place."""
    return tensor.clone() if tensor._is_view() else tensor


class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.axis.sum(gradients[0].clone(memory_format=torch.contiguous_format)), None


class _Leave(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        if not tensor.is_contiguous():
            return axis.sum(tensor.contiguous())
        ctx.mark_dirty(tensor)
        return axis.sum(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        tensor, axis, dim, full, summed = inputs
        ctx.axis, ctx.dim, ctx.full, ctx.summed = axis, dim, full, summed
        return _joined(tensor, axis, dim, full=full)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        share = _scattered(gradient, ctx.axis, ctx.dim) if ctx.summed else _own(gradient, ctx.axis, ctx.dim)
        return share, None, None, None, None


class _Scatter(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        tensor, axis, dim, summed = inputs
        ctx.axis, ctx.dim, ctx.full = axis, dim, tensor.shape[dim]
        return _scattered(tensor, axis, dim) if summed else _own(tensor, axis, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _joined(gradients[0], ctx.axis, ctx.dim, full=ctx.full), None, None, None
