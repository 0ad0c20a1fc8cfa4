"""How a band of diagonals is cut into calls of a kernel: by what they cost.

Some kernels take any band. Others take whole rectangles, triangles (all keys up to a query's own place), and anything
else under a mask, where pairs that are masked cost as much as others. For these a causal rectangle is one whole and one
triangle, and a window is strips of rows: each under one mask, or with the columns that all its rows see apart from the
two ends.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from meshwright.parallel.blockwise.diagonals import EMPTY, FULL, Diagonals, Uniform, diagonals

__all__ = ["Limits", "Part", "grid", "split", "total_cost"]

# measured on CPU, forward and backward together, in pairs of a whole rectangle
_MASKED = 1.15  # what a pair costs under a mask
_DIAGONAL = 256.0  # pairs of a row that a triangle costs beside its half
_GATHER = 20.0  # what merging the results of a row, or adding those of a column, costs


@dataclass(frozen=True)
class Limits:
    """What blocks are cut for.

    Args:
        query_block: most queries of a block of which scores, or a mask, exist.
        kv_block: most keys of one.
        fused: of whole rectangles and triangles no scores exist, so these may be of any size.
        call_cost: what a call costs besides its pairs, in pairs.
        banded: whether the kernel takes any band of diagonals, and computes little else.
    """

    query_block: int
    kv_block: int
    fused: bool
    call_cost: float
    banded: bool = False


class Part(NamedTuple):
    """A block within a block: places of its rows and columns, and what is known of it."""

    rows: slice
    columns: slice
    sketch: Diagonals | Uniform | None

    def within(self, rows: slice, columns: slice) -> "Part":
        """The same in a block that the given one is a part of."""
        return self._replace(rows=_moved(self.rows, rows.start), columns=_moved(self.columns, columns.start))

    def cost(self, limits: Limits) -> float:
        """In pairs."""
        rows, columns = self.rows.stop - self.rows.start, self.columns.stop - self.columns.start
        triangle = rows == columns and self.sketch == (1 - rows, 0)
        of_row = columns * (1.0 if self.sketch is FULL else _MASKED)
        if triangle:
            of_row = min(columns, columns / 2 + _DIAGONAL)
        elif limits.banded and isinstance(self.sketch, Diagonals):
            of_row = min(columns, self.sketch.high - self.sketch.low + _DIAGONAL)
        return float(rows * of_row + (rows + columns) * _GATHER + limits.call_cost)


def total_cost(parts: Iterable[Part], limits: Limits) -> float:
    """Of several parts, in pairs."""
    return float(sum(each.cost(limits) for each in parts))


def split(sketch: Diagonals | Uniform, *, rows: int, columns: int, limits: Limits) -> list[Part]:
    """Parts that hold every pair of a band, at the least cost.

    >>> limits = Limits(1024, 1024, fused=True, call_cost=5000.0)
    >>> for part in split(Diagonals(-63, 960), rows=64, columns=1024, limits=limits):
    ...     print(part.rows, part.columns, part.sketch)
    slice(0, 64, None) slice(0, 960, None) Uniform.FULL
    slice(0, 64, None) slice(960, 1024, None) Diagonals(low=-63, high=0)
    """
    if not isinstance(sketch, Diagonals):
        return [] if sketch is EMPTY else _whole(slice(0, rows), slice(0, columns), limits)
    band = _Band(sketch.low, sketch.high, rows, columns)
    if limits.banded:
        return [band.trimmed()]
    heights = [1 << power for power in range(6, 20) if 1 << power < min(limits.query_block, rows)]
    best = min((*heights, limits.query_block), key=lambda height: band.about(height, limits))
    strips, triangle = band.strips(best, limits), band.triangle() if limits.fused else []
    return triangle if triangle and total_cost(triangle, limits) <= total_cost(strips, limits) else strips


def grid(rows: int, columns: int, limits: Limits) -> Iterator[tuple[slice, slice]]:
    """Blocks of at most `query_block` times `kv_block`."""
    for top in range(0, rows, limits.query_block):
        for left in range(0, columns, limits.kv_block):
            yield slice(top, min(top + limits.query_block, rows)), slice(left, min(left + limits.kv_block, columns))


def _whole(rows: slice, columns: slice, limits: Limits) -> list[Part]:
    if limits.fused:
        return [Part(rows, columns, FULL)]
    blocks = grid(rows.stop - rows.start, columns.stop - columns.start, limits)
    return [Part(*block, FULL).within(rows, columns) for block in blocks]


def _moved(places: slice, by: int) -> slice:
    return slice(places.start + by, places.stop + by)


class _Band(NamedTuple):
    """`low <= j - i <= high` in a block of rows i and columns j."""

    low: int
    high: int
    rows: int
    columns: int

    def part(self, rows: slice, columns: slice) -> Part:
        """What a block within the block holds."""
        ahead = columns.start - rows.start
        size = {"rows": rows.stop - rows.start, "columns": columns.stop - columns.start}
        return Part(rows, columns, diagonals(self.low - ahead, self.high - ahead, **size))

    def triangle(self) -> list[Part]:
        """Without a lower side: what all rows see, a triangle, and what rows below it see; none otherwise."""
        top, ahead = max(0, -self.high), max(0, self.high)
        right = min(self.columns, self.rows + self.high)
        if self.low > 1 - self.rows:
            return []
        below = top + right - ahead
        rows, beside = slice(top, self.rows), slice(ahead, right)
        parts = [(rows, slice(0, ahead)), (slice(top, below), beside), (slice(below, self.rows), beside)]
        return [self.part(down, right) for down, right in parts if down.start < down.stop and right.start < right.stop]

    @property
    def _lines(self) -> range:
        """Rows that see some column."""
        return range(max(0, -self.high), min(self.rows, self.columns - self.low))

    def trimmed(self) -> Part:
        """All of it, without rows and columns that are outside: the last pair of what is left is within."""
        lines = self._lines
        columns = slice(max(0, lines.start + self.low), min(self.columns, lines.stop + self.high))
        return self.part(slice(lines.start, lines.stop), columns)

    def about(self, height: int, limits: Limits) -> float:
        """What a row costs in strips of a height, judged by the one in the middle."""
        lines = self._lines
        top = max(lines.start, (lines.start + lines.stop - height) // 2)
        rows = slice(top, min(top + height, lines.stop))
        return total_cost(self._strip(rows, limits), limits) / (rows.stop - rows.start)

    def strips(self, height: int, limits: Limits) -> list[Part]:
        """Rows by `height`."""
        parts: list[Part] = []
        for top in self._lines[::height]:
            parts += self._strip(slice(top, min(top + height, self._lines.stop)), limits)
        return parts

    def _strip(self, rows: slice, limits: Limits) -> list[Part]:
        """Some rows, in the cheaper of two ways."""
        together, apart = self._masked(rows, limits), self._apart(rows, limits)
        return apart if total_cost(apart, limits) < total_cost(together, limits) else together

    def _masked(self, rows: slice, limits: Limits) -> list[Part]:
        return self._between(rows, slice(0, self.columns), limits)

    def _apart(self, rows: slice, limits: Limits) -> list[Part]:
        """The columns that all rows of a strip see, and the two ends."""
        begin, end = max(0, rows.stop - 1 + self.low), min(self.columns, rows.start + self.high + 1)
        if end < self.columns:
            end -= 1  # with its own first column the right end is a triangle
        if begin >= end:
            return self._masked(rows, limits)
        middle = _whole(rows, slice(begin, end), limits)
        left, right = slice(0, begin), slice(end, self.columns)
        return [*self._between(rows, left, limits), *middle, *self._between(rows, right, limits)]

    def _between(self, rows: slice, columns: slice, limits: Limits) -> list[Part]:
        """Those of `columns` that some row of a strip sees, by `kv_block`."""
        begin, end = max(columns.start, rows.start + self.low), min(columns.stop, rows.stop + self.high)
        steps = [slice(left, min(left + limits.kv_block, end)) for left in range(begin, end, limits.kv_block)]
        return [each for each in (self.part(rows, step) for step in steps) if each.sketch is not EMPTY]
