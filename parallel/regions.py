"""Tensor-parallel regions: matrices that may be dealt by columns, then a matrix by rows, and one sum after it.

A region is a set of matrices (columns) whose products reach exactly one other matrix (the row), which nothing
else reaches (Megatron-LM, arXiv 1909.08053, section 3). Attention is a region cut into heads, a feed-forward
block one cut into single features; neither is recognised by name.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.parallel.errors import WrapError
from meshwright.parallel.layout import Range, Split, deal
from meshwright.parallel.watch import Matrix, Segment, Sight

__all__ = ["Heads", "Region", "column_split", "find_regions", "head_shares", "row_split"]


@dataclass(frozen=True)
class Heads:
    """Query heads and key-value heads of an attention."""

    query: int
    key_value: int

    def legal_degrees(self) -> list[int]:
        """Degrees of `tp` that these heads can be dealt over."""
        return [degree for degree in range(1, self.query + 1) if self._fits(degree)]

    def deal(self, degree: int, where: str) -> list[tuple[Range, Range]]:
        """For each rank, its query heads and its key-value heads; the latter replicated where there are too few.

        >>> Heads(4, 1).deal(2, "")
        [((0, 2), (0, 1)), ((2, 4), (0, 1))]

        Raises:
            WrapError: naming the legal degrees.
        """
        if not self._fits(degree):
            legal = ", ".join(map(str, self.legal_degrees()))
            raise WrapError(
                f"mesh axis tp={degree} does not fit {where}: {self.query} heads, {self.key_value} key-value heads; "
                f"legal degrees of tp: {legal}"
            )
        group = self.query // self.key_value
        if degree <= self.key_value:
            return [((start * group, stop * group), (start, stop)) for start, stop in deal(self.key_value, degree)]
        copies = degree // self.key_value
        shares = deal(group, copies)
        return [
            ((head * group + start, head * group + stop), (head, head + 1))
            for head in range(self.key_value)
            for start, stop in shares
        ]

    def _fits(self, degree: int) -> bool:
        few = degree > self.key_value
        return degree <= self.query and not (few and degree % self.key_value)


@dataclass(frozen=True)
class Region:
    """Columns, the row they feed, and the heads between them (None: single features)."""

    columns: tuple[Matrix, ...]
    row: Matrix
    heads: Heads | None

    @property
    def paths(self) -> tuple[str, ...]:
        """All its matrices."""
        return (*(column.path for column in self.columns), self.row.path)


def find_regions(sight: Sight) -> list[Region]:
    """Regions in the order in which the model calls them; a matrix lies in at most one."""
    readers: dict[str, set[str]] = {}
    for matrix in sight.matrices.values():
        for path in matrix.fed_by:
            readers.setdefault(path, set()).add(matrix.path)
    regions: list[Region] = []
    taken: set[str] = set()
    for row in sight.matrices.values():
        columns = [each for each in sight.matrices.values() if each.path in row.fed_by]
        ours = {each.path for each in columns}
        if not columns or row.path in sight.scored or taken & (ours | {row.path}):
            continue
        if ours & (sight.leaked | sight.scored | {row.path}):
            continue
        if any(readers[path] != {row.path} for path in ours):
            continue
        region = _region(columns, row)
        if region is not None:
            regions.append(region)
            taken |= ours | {row.path}
    return regions


def _region(columns: Sequence[Matrix], row: Matrix) -> Region | None:
    cut = {segment.count for column in columns for segment in column.segments if segment.count != segment.size}
    if not cut:
        sizes = {segment.size for column in columns for segment in column.segments}
        return Region(tuple(columns), row, None) if sizes == {row.inputs} else None
    heads = Heads(max(cut), min(cut))
    fits = all(_heads_of(segment, heads) is not None for column in columns for segment in column.segments)
    if not fits or heads.query % heads.key_value or row.inputs % heads.query:
        return None
    return Region(tuple(columns), row, heads)


def _heads_of(segment: Segment, heads: Heads) -> int | None:
    """How many heads a segment holds: as cut, or (single features, such as gates) one part per query head."""
    count = segment.count if segment.count != segment.size else heads.query
    return count if count in (heads.query, heads.key_value) and segment.size % count == 0 else None


def column_split(region: Region, column: Matrix, degree: int) -> Split:
    """How the features of a column's product are dealt."""
    if region.heads is None:
        shares = [
            [_moved(deal(part.size, degree)[rank], part.start) for part in column.segments] for rank in range(degree)
        ]
        return Split.of(0, column.outputs, shares)
    dealt = region.heads.deal(degree, region.row.path)
    held: list[list[Range]] = []
    for query, key_value in dealt:
        held.append([])
        for part in column.segments:
            count = _heads_of(part, region.heads)
            assert count is not None, part
            unit = part.size // count
            first, last = query if count == region.heads.query else key_value
            held[-1].append((part.start + first * unit, part.start + last * unit))
    return Split.of(0, column.outputs, held)


def row_split(region: Region, degree: int) -> Split:
    """How the inputs of a region's row are dealt."""
    if region.heads is None:
        return Split.even(0, region.row.inputs, degree)
    unit = region.row.inputs // region.heads.query
    dealt = region.heads.deal(degree, region.row.path)
    return Split.of(0, region.row.inputs, [[(first * unit, last * unit)] for (first, last), _ in dealt])


def head_shares(region: Region, degree: int) -> list[tuple[Range, Range]]:
    """Query heads and key-value heads of each rank, for a region that has heads."""
    assert region.heads is not None, region.row.path
    return region.heads.deal(degree, region.row.path)


def _moved(share: Range, start: int) -> Range:
    return share[0] + start, share[1] + start
