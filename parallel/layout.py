"""How one tensor dim is dealt over the ranks of a mesh axis: pure numbers, no process group.

A `Split` lists, for each rank, the ranges of the full dim it holds, so that uneven shares, fused projections (several
segments, each dealt by heads) and replicated key-value heads (a range held twice) are ordinary cases.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # shares are counted without torch, too
    from torch import Tensor

__all__ = ["Range", "Split", "deal"]

Range = tuple[int, int]
"""Start and stop (exclusive) in the full dim."""


def deal(size: int, degree: int) -> list[Range]:
    """Contiguous shares of `size` things, the first ones larger where it does not divide.

    >>> deal(7, 3)
    [(0, 3), (3, 5), (5, 7)]
    """
    each, more = divmod(size, degree)
    starts = [rank * each + min(rank, more) for rank in range(degree + 1)]
    return list(pairwise(starts))


@dataclass(frozen=True)
class Split:
    """One dim of a tensor dealt over ranks.

    Args:
        dim: which dim of the tensor.
        size: its full size.
        held: for each rank, the ranges it holds, in the order in which they lie in its local tensor.

    >>> import torch
    >>> split = Split.even(dim=0, size=5, degree=2)
    >>> split.take(torch.arange(5), 1)
    tensor([3, 4])
    >>> split.join([torch.arange(3), torch.arange(3, 5)])
    tensor([0, 1, 2, 3, 4])
    """

    dim: int
    size: int
    held: tuple[tuple[Range, ...], ...]

    @classmethod
    def even(cls, dim: int, size: int, degree: int) -> Split:
        """Contiguous shares, uneven by at most one."""
        return cls(dim, size, tuple((share,) for share in deal(size, degree)))

    @classmethod
    def of(cls, dim: int, size: int, held: Iterable[Iterable[Range]]) -> Split:
        """A split from any nested iterable of ranges; neighbours are joined and empty ranges left out."""
        return cls(dim, size, tuple(_merged(ranges) for ranges in held))

    @property
    def degree(self) -> int:
        """Number of ranks."""
        return len(self.held)

    @cached_property
    def duplicated(self) -> bool:
        """Whether some element is held by more than one rank."""
        return sum(self.local_size(rank) for rank in range(self.degree)) > self.size

    def clipped(self, start: int, stop: int) -> tuple[tuple[Range, ...], ...]:
        """What each rank holds between `start` and `stop`."""
        return tuple(
            tuple((max(first, start), min(last, stop)) for first, last in ranges if first < stop and last > start)
            for ranges in self.held
        )

    def local_size(self, rank: int) -> int:
        """Size of the dim on one rank."""
        return sum(stop - start for start, stop in self.held[rank])

    def local_shape(self, shape: Sequence[int], rank: int) -> tuple[int, ...]:
        """Shape of a rank's part of a tensor of full `shape`."""
        return (*shape[: self.dim], self.local_size(rank), *shape[self.dim + 1 :])

    @cached_property
    def intervals(self) -> tuple[tuple[Range, tuple[int, ...]], ...]:
        """The dim cut at every border of every rank: (range, ranks that hold it).

        >>> Split.of(0, 3, [[(0, 2)], [(1, 3)]]).intervals
        (((0, 1), (0,)), ((1, 2), (0, 1)), ((2, 3), (1,)))
        """
        borders = sorted({border for ranges in self.held for pair in ranges for border in pair})
        found = []
        for start, stop in pairwise(borders):
            holders = tuple(
                rank for rank, ranges in enumerate(self.held) if any(low <= start < high for low, high in ranges)
            )
            if holders:
                found.append(((start, stop), holders))
        return tuple(found)

    def local_start(self, rank: int, start: int) -> int:
        """Where position `start` of the full dim lies in a rank's local tensor, which must hold it."""
        offset = 0
        for low, high in self.held[rank]:
            if low <= start < high:
                return offset + start - low
            offset += high - low
        raise AssertionError(f"rank {rank} does not hold {start} of {self.held}")

    def take(self, full: Tensor, rank: int) -> Tensor:
        """A rank's part of a full tensor (a copy)."""
        parts = [full.narrow(self.dim, start, stop - start) for start, stop in self.held[rank]]
        if not parts:
            return full.narrow(self.dim, 0, 0).clone()
        import torch

        return torch.cat(parts, dim=self.dim)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The full tensor from every rank's part."""
        full = self._blank(parts[0])
        for place, piece in self._placed(full, parts):
            place.copy_(piece)
        return full

    def added(self, parts: Sequence[Tensor]) -> Tensor:
        """The full tensor in which elements that several ranks hold are summed."""
        full = self._blank(parts[0])
        for place, piece in self._placed(full, parts):
            place.add_(piece)
        return full

    def _blank(self, part: Tensor) -> Tensor:
        return part.new_zeros((*part.shape[: self.dim], self.size, *part.shape[self.dim + 1 :]))

    def _placed(self, full: Tensor, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for rank, part in enumerate(parts):
            for (start, stop), piece in zip(self.held[rank], self.pieces(part, rank), strict=True):
                yield full.narrow(self.dim, start, stop - start), piece

    def pieces(self, local: Tensor, rank: int) -> tuple[Tensor, ...]:
        """A rank's local tensor cut into its ranges (views)."""
        sizes = [stop - start for start, stop in self.held[rank]]
        pieces: tuple[Tensor, ...] = local.split(sizes, dim=self.dim)
        return pieces


def _merged(ranges: Iterable[Range]) -> tuple[Range, ...]:
    merged: list[Range] = []
    for start, stop in ranges:
        if start == stop:
            continue
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)
