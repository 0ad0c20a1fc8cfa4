"""Which cells of a product are tested: enough to hold every row and every column, and all of them in `make matrix`."""

import os
from collections.abc import Iterable
from itertools import product
from typing import TypeVar

__all__ = ["alternating", "beyond"]

Row = TypeVar("Row")
Column = TypeVar("Column")

_ALL = bool(os.environ.get("MESHWRIGHT_MATRIX"))


def alternating(rows: Iterable[Row], columns: Iterable[Column], every: int = 2) -> list[tuple[Row, Column]]:
    """Each `every`-th cell, shifted by one from row to row, so that no row and no column is without one.

    >>> alternating("ab", [1, 2, 3, 4])
    [('a', 1), ('a', 3), ('b', 2), ('b', 4)]
    """
    numbered = product(enumerate(rows), enumerate(columns))
    return [(row, column) for (i, row), (j, column) in numbered if _ALL or (i + j) % every == 0]


def beyond(*cells: Row) -> tuple[Row, ...]:
    """Cells whose mechanisms others hold too: nothing, but for `make matrix`."""
    return cells if _ALL else ()
