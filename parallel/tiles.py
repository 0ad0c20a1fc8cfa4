"""Tensors of which ranks hold tiles: rows (dim 0) and a part of one more dim."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from meshwright.parallel.layout import Range, Split
from meshwright.parallel.part import Chunk

__all__ = ["Tiles"]


@dataclass(frozen=True)
class Tiles:
    """How a tensor is dealt along two dims over the same ranks.

    Args:
        rows: of dim 0; one range for each rank.
        columns: of another dim; any ranges, and none for a rank that holds nothing.

    >>> import torch
    >>> tiles = Tiles(Split.of(0, 4, [[(0, 4)], [(0, 4)]]), Split.of(1, 3, [[(0, 1)], [(1, 3)]]))
    >>> tiles.take(torch.arange(12).view(4, 3), 1)[0].tolist(), tiles.local_shape((4, 3), 0)
    ([1, 2], (4, 1))
    """

    rows: Split
    columns: Split

    @property
    def degree(self) -> int:
        """Number of ranks."""
        return self.rows.degree

    def local_shape(self, shape: Sequence[int], rank: int) -> tuple[int, ...]:
        """Shape of a rank's tile of a tensor of full (or any) `shape`."""
        return self.columns.local_shape(self.rows.local_shape(shape, rank), rank)

    def take(self, full: Tensor, rank: int) -> Tensor:
        """A rank's tile of a full tensor (a copy)."""
        return self.columns.take(self.rows.take(full, rank), rank)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The full tensor from every rank's tile."""
        shape = list(parts[0].shape)
        shape[0], shape[self.columns.dim] = self.rows.size, self.columns.size
        full = parts[0].new_zeros(shape)
        for rank, part in enumerate(parts):
            for chunk in self.boxes(rank, part):
                place = full
                for dim, (start, size) in enumerate(zip(chunk.offsets, chunk.values.shape, strict=True)):
                    place = place.narrow(dim, start, size)
                place.copy_(chunk.values)
        return full

    def boxes(self, rank: int, values: Tensor, held: Range | None = None) -> Iterator[Chunk]:
        """The boxes of the full tensor that a rank's values are.

        Args:
            rank: whose tile they are of.
            values: the tile, or some of its rows.
            held: which rows of the tile they are; all of them if None.
        """
        ((first, last),) = self.rows.held[rank]
        start, stop = held if held is not None else (0, last - first)
        offset = 0
        for low, high in self.columns.held[rank] if stop > start else ():
            where = [0] * values.dim()
            where[0], where[self.columns.dim] = first + start, low
            yield Chunk(tuple(where), values.narrow(self.columns.dim, offset, high - low))
            offset += high - low
