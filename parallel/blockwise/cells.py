"""Blocks within a block of which only the elements tell."""

from collections.abc import Iterator
from itertools import groupby

from torch import Tensor
from torch.nn import functional

from meshwright.parallel.blockwise.bands import Limits, Part, total_cost
from meshwright.parallel.blockwise.diagonals import FULL

__all__ = ["parts_of"]

_CELL = 64


def parts_of(pairs: Tensor, limits: Limits) -> list[Part]:
    """Parts that hold every pair, at a low cost: all of it, or runs of cells that are not empty.

    Args:
        pairs: bool [..., rows, columns].
        limits: what parts are made for.

    >>> import torch
    >>> pairs = torch.zeros(128, 192, dtype=torch.bool)
    >>> pairs[:64, 64:] = True
    >>> parts_of(pairs, Limits(1024, 1024, fused=True, call_cost=100.0))
    [Part(rows=slice(0, 64, None), columns=slice(64, 192, None), sketch=<Uniform.FULL: 'full'>)]
    """
    rows, columns = pairs.shape[-2:]
    some, every = (each.reshape(-1, rows, columns) for each in (pairs, pairs))
    kinds = _cells(some.any(0), empty=False).any(3).any(1).int() + _cells(every.all(0), empty=True).all(3).all(1).int()
    table: list[list[int]] = kinds.tolist()
    if all(kind == 2 for line in table for kind in line):
        return [Part(slice(0, rows), slice(0, columns), FULL)]
    by_cells = list(_runs(table, (rows, columns), limits))
    whole = [Part(slice(0, rows), slice(0, columns), None)]
    return min(by_cells, whole, key=lambda parts: total_cost(parts, limits))


def _cells(pairs: Tensor, *, empty: bool) -> Tensor:
    """[rows of cells, rows, columns of cells, columns], with `empty` beyond the edge."""
    rows, columns = pairs.shape
    padded = functional.pad(pairs, (0, -columns % _CELL, 0, -rows % _CELL), value=empty)
    return padded.reshape(-1, _CELL, padded.shape[1] // _CELL, _CELL)


def _runs(table: list[list[int]], size: tuple[int, int], limits: Limits) -> Iterator[Part]:
    """Rows of cells that are alike together; in them runs, joined where one call is cheaper than two."""
    top = 0
    for line, alike in groupby(table):
        bottom = min(top + _CELL * len(list(alike)), size[0])
        found: list[Part] = []
        left = 0
        for kind, run in groupby(line):
            right = min(left + _CELL * len(list(run)), size[1])
            if kind:
                found.append(Part(slice(top, bottom), slice(left, right), FULL if kind == 2 else None))
                _join(found, limits)
            left = right
        yield from found
        top = bottom


def _join(found: list[Part], limits: Limits) -> None:
    if len(found) < 2:
        return
    one, other = found[-2:]
    both = one._replace(columns=slice(one.columns.start, other.columns.stop), sketch=None)
    if both.cost(limits) <= total_cost((one, other), limits):
        found[-2:] = [both]
