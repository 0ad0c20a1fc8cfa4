"""Which blocks there are to compute: a plan as a value, made from a mask and positions.

Queries outside, keys inside. Blocks begin where masks say that they had better (documents), leave out keys that no
query of theirs can see, and are cut by what calls cost (`bands`). Where only elements tell, cells are looked at.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor

from meshwright.parallel.blockwise.bands import Limits, Part, grid, split
from meshwright.parallel.blockwise.cells import parts_of
from meshwright.parallel.blockwise.diagonals import EMPTY, FULL
from meshwright.parallel.blockwise.mask import Mask, Sketch
from meshwright.parallel.blockwise.positions import Pieces

__all__ = ["Look", "Tile", "tiles_of"]

Look: TypeAlias = Callable[[int | None, range, range], Tensor]

_LEAST = 64  # what begins closer than this to what began before shares its block


@dataclass(frozen=True)
class Tile:
    """One block.

    Args:
        sample: the one sample it is about; None for all.
        rows: places of its queries among those that are here.
        columns: places of its keys.
        queries: positions of its queries.
        keys: positions of its keys.
        sketch: FULL, a band of diagonals, or None where only elements tell.
        first: no block before it has one of its queries.
    """

    sample: int | None
    rows: slice
    columns: slice
    queries: range
    keys: range
    sketch: Sketch
    first: bool = False

    def part(self, part: Part) -> "Tile":
        """A block within this one."""
        rows, columns, sketch = part.within(self.rows, self.columns)
        queries, keys = self.queries[part.rows], self.keys[part.columns]
        return replace(self, rows=rows, columns=columns, queries=queries, keys=keys, sketch=sketch)


def tiles_of(mask: Mask | None, queries: Pieces, keys: Pieces, *, limits: Limits, look: Look) -> Iterator[Tile]:
    """Every block in which some pair may attend, by sample, then query, then key.

    Args:
        mask: which pairs attend; None is all.
        queries: positions of the queries that are here.
        keys: positions of the keys.
        limits: sizes and costs of blocks.
        look: sample and positions of queries and keys -> bool [..., queries, keys], asked where only elements tell.
    """
    samples: Sequence[int | None] = [None] if mask is None or mask.rows == 1 else range(mask.rows)
    for sample in samples:
        own = mask if mask is None or sample is None else mask.row(sample)
        reached = 0
        for area in _areas(own, queries, keys):
            for part in _parts(area, limits, lambda *at, sample=sample: look(sample, *at)):
                tile = replace(area.part(part), sample=sample)
                yield replace(tile, first=tile.rows.start >= reached)
                reached = max(reached, tile.rows.stop)


def _parts(area: Tile, limits: Limits, look: Callable[[range, range], Tensor]) -> Iterator[Part]:
    rows, columns = len(area.queries), len(area.keys)
    if area.sketch is not None:
        yield from split(area.sketch, rows=rows, columns=columns, limits=limits)
        return
    for down, right in grid(rows, columns, limits):
        size = len(area.queries[down]), len(area.keys[right])
        seen = look(area.queries[down], area.keys[right])
        for part in parts_of(seen.expand(*seen.shape[:-2], *size), limits):
            yield part.within(down, right)


def _areas(mask: Mask | None, queries: Pieces, keys: Pieces) -> Iterator[Tile]:
    """Rectangles that are cut where the mask says so, without those that are empty."""
    for rows, query_range in _segments(mask, queries, of_keys=False):
        span = None if mask is None else mask.span(query_range)
        for columns, key_range in _segments(mask, keys, of_keys=True, span=span):
            sketch = FULL if mask is None else mask.sketch(query_range, key_range)
            if sketch is not EMPTY:
                yield Tile(None, rows, columns, query_range, key_range, sketch)


def _segments(
    mask: Mask | None, pieces: Pieces, *, of_keys: bool, span: range | None = None
) -> Iterator[tuple[slice, range]]:
    """Consecutive places, and the positions there, within `span`."""
    begin = 0
    for piece in pieces:
        first, last = (
            (0, len(piece)) if span is None else (bisect_left(piece, each) for each in (span.start, span.stop))
        )
        inside = piece[first:last]
        cuts = [0]
        for cut in () if mask is None else mask.cuts(inside, of_keys=of_keys):
            if min(cut - cuts[-1], len(inside) - cut) >= _LEAST:
                cuts.append(cut)
        for start, stop in zip(cuts, [*cuts[1:], len(inside)], strict=True):
            if start < stop:
                yield slice(begin + first + start, begin + first + stop), inside[start:stop]
        begin += len(piece)
