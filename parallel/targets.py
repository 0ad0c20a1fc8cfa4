"""Class indices as cross entropy needs them: which count, which are held here, and how losses of rows become one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.parallel.layout import Range

__all__ = ["Targets"]


@dataclass(frozen=True)
class Targets:
    """Class indices [rows] as a holder of the classes from `start` on sees them.

    Attributes:
        counted: [rows], False for ignored ones.
        mine: [rows], whether the class is held here.
        place: [rows], where; 0 for others.
        items: how many count (0-dim, float64).
    """

    counted: Tensor
    mine: Tensor
    place: Tensor
    items: Tensor

    @classmethod
    def of(cls, target: Tensor, ignore_index: int, span: Range, *, classes: int) -> "Targets":
        """Sorts out targets for the holder of `span` of all classes."""
        counted = target != ignore_index
        known = (target >= 0) & (target < classes)
        torch._assert_async((known | ~counted).all(), f"a target is no class: they go from 0 to {classes - 1}")
        mine = counted & (target >= span[0]) & (target < span[1])
        place = (target - span[0]).masked_fill(~mine, 0)
        return cls(counted, mine, place, counted.sum(dtype=torch.float64))

    def rows(self, some: slice) -> "Targets":
        """Those of some rows, beside the number of all that count."""
        return Targets(self.counted[some], self.mine[some], self.place[some], self.items)

    def reduce(self, losses: Tensor, reduction: str) -> Tensor:
        """The loss from those of rows, which are zero where ignored."""
        if reduction == "none":
            return losses
        total = losses.sum()
        return total / self.items.to(total.dtype) if reduction == "mean" else total

    def spread(self, gradient: Tensor, reduction: str) -> Tensor:
        """Gradients of the losses of rows, from that of the loss."""
        if reduction == "mean":
            gradient = gradient / self.items.to(gradient.dtype)
        return torch.where(self.counted, gradient, torch.zeros_like(gradient))
