"""The vocabulary dealt over `tp`: embeddings and heads by rows, cross entropy without the full scores.

A head returns `DealtScores`: this rank's columns of the scores, in the shape of all of them. What models do with scores
on the way to the loss works on the columns; cross entropy is computed from them with two small sums (Megatron-LM,
arXiv 1909.08053, section 3); anything else joins them first (see `scores`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional

from meshwright.parallel.exchange import Axis, enter, join, leave
from meshwright.parallel.following import Call
from meshwright.parallel.layout import Range, Split
from meshwright.parallel.scores import Scores
from meshwright.parallel.targets import Targets

__all__ = ["DealtHead", "DealtScores", "deal_head", "deal_lookup", "own_range"]


def deal_lookup(table: nn.Module, split: Split, axis: Axis) -> None:
    """Makes an embedding look up the rows this rank holds and sum over ranks; the module's own forward still runs."""
    ((start, stop),) = split.held[axis.rank]
    padding = getattr(table, "padding_idx", None)
    if padding is not None:
        table.padding_idx = padding - start if start <= padding < stop else None  # type: ignore[assignment]

    table.forward = _DealtLookup(table.forward, axis, start, stop)


@dataclass(frozen=True)
class _DealtLookup:
    """The forward of an embedding whose rows are dealt."""

    forward: Callable[[Tensor], Tensor]
    axis: Axis
    start: int
    stop: int

    def __call__(self, ids: Tensor) -> Tensor:
        """[...] -> [..., features]"""
        outside = (ids < self.start) | (ids >= self.stop)
        found = self.forward((ids - self.start).masked_fill(outside, 0))
        return leave(found.masked_fill(outside.unsqueeze(-1), 0.0), self.axis)


def deal_head(head: nn.Module, split: Split, axis: Axis) -> None:
    """Makes a head compute the scores of the rows this rank holds."""
    head.forward = DealtHead(head, axis, split.size)


@dataclass(frozen=True)
class DealtHead:
    """The forward of a head whose rows are dealt."""

    head: nn.Module
    axis: Axis
    vocabulary: int

    def __call__(self, hidden: Tensor) -> Tensor:
        """This rank's columns of the scores of rows [..., inputs]."""
        weight, bias = self.head.weight, self.head.bias
        assert isinstance(weight, Tensor), type(weight)
        assert not isinstance(bias, nn.Module), type(bias)
        return DealtScores.of(functional.linear(enter(hidden, self.axis), weight, bias), self.axis, self.vocabulary)


def own_range(vocabulary: int, axis: Axis) -> Range:
    """The classes that this rank holds."""
    ((start, stop),) = Split.even(0, vocabulary, axis.size).held[axis.rank]
    return start, stop


class DealtScores(Scores):
    """Columns of scores [..., vocabulary] on one rank, in the shape of all of them."""

    axis: Axis

    @classmethod
    def of(cls, columns: Tensor, axis: Axis, vocabulary: int) -> "DealtScores":
        """Wraps a rank's columns."""
        scores = cls.holding(columns, vocabulary)
        scores.axis = axis
        return scores

    def like(self, held: Tensor) -> "DealtScores":
        """Columns of other rows."""
        return DealtScores.of(held, self.axis, self.vocabulary)

    def make_whole(self, func: Any) -> Tensor:
        """The columns of all ranks, joined."""
        del func
        columns = self.held()
        return join(columns, self.axis, columns.dim() - 1, self.vocabulary)

    def own(self, row: Tensor) -> Tensor:
        """This rank's columns of a row."""
        start, stop = own_range(self.vocabulary, self.axis)
        return row[start:stop]

    def each(self, call: Call) -> Any:
        """Works on the columns."""
        columns = self.held()
        made = call.on(columns)
        return self if made is columns else self.of_rows(made)

    def entropy(self, target: Tensor, ignore_index: int, reduction: str) -> Any:
        """From the columns, with two small sums."""
        targets = Targets.of(target, ignore_index, own_range(self.vocabulary, self.axis), classes=self.vocabulary)
        return _CrossEntropy.apply(self.held(), targets, self.axis, reduction)  # type: ignore[no-untyped-call]


class _CrossEntropy(Function):
    """Cross entropy of scores [rows, vocabulary] dealt by columns.

    `items` is the number of targets that count, under the name that `loss.items_of_graph` asks for.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        columns, targets, axis, reduction = inputs
        largest = axis.largest(columns.detach().amax(-1))
        powers = (columns - largest.unsqueeze(-1)).exp_()
        own = columns.gather(1, targets.place.unsqueeze(1)).squeeze(1)
        sums = axis.sum(torch.stack([powers.sum(-1), (own - largest).masked_fill(~targets.mine, 0.0)]))
        losses = (sums[0].log() - sums[1]).masked_fill(~targets.counted, 0.0)
        ctx.items, ctx.targets, ctx.reduction = targets.items, targets, reduction
        ctx.save_for_backward(powers.div_(sums[0].unsqueeze(-1)))
        result: Tensor = targets.reduce(losses, reduction)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (shares,) = ctx.saved_tensors
        rows = ctx.targets.spread(gradients[0], ctx.reduction).to(shares.dtype)
        result = shares * rows.unsqueeze(-1)
        result.scatter_add_(1, ctx.targets.place.unsqueeze(1), -(rows * ctx.targets.mine).unsqueeze(1))
        return result, None, None, None
