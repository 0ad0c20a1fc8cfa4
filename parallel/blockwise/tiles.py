"""Which blocks there are to compute: a plan as a value, made from a mask and positions alone."""

from collections.abc import Iterator
from dataclasses import dataclass

from meshwright.parallel.blockwise.diagonals import EMPTY, FULL
from meshwright.parallel.blockwise.mask import Mask, Sketch
from meshwright.parallel.blockwise.positions import Pieces

__all__ = ["Tile", "tiles_of"]


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
    """

    sample: int | None
    rows: slice
    columns: slice
    queries: range
    keys: range
    sketch: Sketch


def tiles_of(mask: Mask | None, queries: Pieces, keys: Pieces, *, query_block: int, kv_block: int) -> Iterator[Tile]:
    """Every block in which some pair may attend, queries outside and keys inside."""
    samples: list[int | None] = [None] if mask is None or mask.rows == 1 else list(range(mask.rows))
    for sample in samples:
        own = mask if mask is None or sample is None else mask.row(sample)
        for rows, query_range in _blocks(queries, query_block):
            for columns, key_range in _blocks(keys, kv_block):
                sketch = FULL if own is None else own.sketch(query_range, key_range)
                if sketch is not EMPTY:
                    yield Tile(sample, rows, columns, query_range, key_range, sketch)


def _blocks(pieces: Pieces, size: int) -> Iterator[tuple[slice, range]]:
    begin = 0
    for piece in pieces:
        for start in range(0, len(piece), size):
            part = piece[start : start + size]
            yield slice(begin + start, begin + start + len(part)), part
        begin += len(piece)
