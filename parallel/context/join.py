"""The positions of several ranks put together, in as few ranges as they make; pure numbers.

Kernels are fastest on long ranges: chunks that meet become one, and stripes that fill a range are woven into it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Joined", "Pieces", "join_pieces"]

Pieces: TypeAlias = tuple[range, ...]


@dataclass(frozen=True)
class Joined:
    """Positions of several ranks together.

    Args:
        pieces: where they are in the sequence.
        places: for each rank, and each of its pieces, the places that it takes among them.
        sizes: positions of each rank.
    """

    pieces: Pieces
    places: tuple[tuple[slice, ...], ...]
    sizes: tuple[int, ...]


def join_pieces(ranks: Sequence[Pieces]) -> Joined:
    """Puts the pieces of several ranks together.

    >>> join_pieces([(range(0, 2), range(6, 8)), (range(2, 4), range(4, 6))]).pieces
    (range(0, 8),)
    >>> join_pieces([(range(0, 8, 2),), (range(1, 8, 2),)]).places
    ((slice(0, 7, 2),), (slice(1, 8, 2),))
    """
    every = sorted((piece for pieces in ranks for piece in pieces), key=lambda piece: piece[0])
    sizes = tuple(sum(map(len, pieces)) for pieces in ranks)
    total = sum(sizes)
    if every and max(piece[-1] for piece in every) - every[0][0] + 1 == total:
        first = every[0][0]
        woven = tuple(tuple(slice(each[0] - first, each[-1] - first + 1, each.step) for each in own) for own in ranks)
        return Joined((range(first, first + total),), woven, sizes)
    begins: dict[range, int] = {}
    pieces: list[range] = []
    begin = 0
    for piece in every:
        begins[piece] = begin
        begin += len(piece)
        meets = pieces and pieces[-1].step == piece.step == 1 and pieces[-1].stop == piece.start
        if meets:
            pieces[-1] = range(pieces[-1].start, piece.stop)
        else:
            pieces.append(piece)
    places = tuple(tuple(slice(begins[each], begins[each] + len(each)) for each in own) for own in ranks)
    return Joined(tuple(pieces), places, sizes)
