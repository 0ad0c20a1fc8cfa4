"""Columns of a bias over all positions: those of some of them."""

from itertools import accumulate

import torch
from torch import Tensor

from meshwright.parallel.context.join import Pieces

__all__ = ["columns_at", "place_columns"]


def columns_at(bias: Tensor, positions: Pieces) -> Tensor:
    """The columns at some positions; a bias with one column is the same for all.

    >>> columns_at(torch.arange(8), (range(1, 3), range(6, 8)))
    tensor([1, 2, 6, 7])
    """
    if bias.shape[-1] == 1:
        return bias
    parts = [bias[..., each.start : each.stop : each.step] for each in positions]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1) if parts else bias[..., :0]


def place_columns(bias: Tensor, columns: Tensor, positions: Pieces) -> None:
    """Adds columns to those at some positions.

    >>> whole = torch.zeros(5)
    >>> place_columns(whole, torch.ones(2), (range(1, 5, 2),))
    >>> whole
    tensor([0., 1., 0., 1., 0.])
    """
    if bias.shape[-1] == 1:
        bias.add_(columns)
        return
    for stop, each in zip(accumulate(map(len, positions)), positions, strict=True):
        bias[..., each.start : each.stop : each.step].add_(columns[..., stop - len(each) : stop])
