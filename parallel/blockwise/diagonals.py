"""A block of a mask as a band of diagonals: what causal masks and windows are in any block of positions."""

from enum import Enum
from typing import Final, NamedTuple

import torch
from torch import Tensor

__all__ = ["EMPTY", "FULL", "Diagonals", "Uniform", "diagonals"]


class Uniform(Enum):
    """A block in which no pair, or every pair, may attend."""

    EMPTY = "empty"
    FULL = "full"


EMPTY: Final = Uniform.EMPTY
FULL: Final = Uniform.FULL


class Diagonals(NamedTuple):
    """Pairs (i, j) of places in a block [rows, columns] with `low <= j - i <= high`."""

    low: int
    high: int

    def tensor(self, rows: int, columns: int, device: torch.device | str = "cpu") -> Tensor:
        """The pairs as a bool tensor [rows, columns].

        >>> Diagonals(0, 1).tensor(2, 3).int()
        tensor([[1, 1, 0],
                [0, 1, 1]], dtype=torch.int32)
        """
        ones = torch.ones(rows, columns, dtype=torch.bool, device=device)
        return ones.tril_(self.high).triu_(self.low)


def diagonals(low: int, high: int, *, rows: int, columns: int) -> Diagonals | Uniform:
    """The band `low <= j - i <= high` of a block, or that it is none or all of it.

    >>> diagonals(-9, 0, rows=4, columns=4)
    Diagonals(low=-3, high=0)
    >>> diagonals(-9, 9, rows=4, columns=4)
    <Uniform.FULL: 'full'>
    """
    low, high = max(low, 1 - rows), min(high, columns - 1)
    if low > high:
        return EMPTY
    return FULL if (low, high) == (1 - rows, columns - 1) else Diagonals(low, high)
