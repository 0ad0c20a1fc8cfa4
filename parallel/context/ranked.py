"""Positions by their order alone: all that a causal mask asks, in fewer ranges than there are chunks; pure numbers.

The two chunks of a zigzag rank are one range to its own keys, and to those of any other rank. So each hop is one call
of a kernel, where its chunks apart would be two or three.
"""

from itertools import pairwise

from meshwright.parallel.context.join import Pieces

__all__ = ["ranked"]


def ranked(queries: Pieces, keys: Pieces) -> tuple[Pieces, Pieces]:
    """Numbers in the same order, without the gaps that nobody of both is in.

    >>> ranked((range(2, 4), range(12, 14)), (range(0, 2), range(14, 16)))
    ((range(2, 6),), (range(0, 2), range(6, 8)))
    """
    every = sorted({*queries, *keys}, key=lambda piece: piece.start)
    apart = all(one.stop <= other.start for one, other in pairwise(every))
    if not apart or any(piece.step != 1 for piece in every):
        return queries, keys
    numbers: dict[range, int] = {}
    begin = 0
    for piece in every:
        numbers[piece] = begin
        begin += len(piece)
    return _merged(queries, numbers), _merged(keys, numbers)


def _merged(pieces: Pieces, numbers: dict[range, int]) -> Pieces:
    found: list[range] = []
    for piece in pieces:
        start = numbers[piece]
        if found and found[-1].stop == start:
            found[-1] = range(found[-1].start, start + len(piece))
        else:
            found.append(range(start, start + len(piece)))
    return tuple(found)
