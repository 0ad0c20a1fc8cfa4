"""Where tokens stand in the whole sequence: ranges, several of them where a rank holds several chunks."""

from collections.abc import Sequence
from typing import TypeAlias

from meshwright.parallel.errors import WrapError

__all__ = ["Pieces", "Positions", "pieces_of"]

Positions: TypeAlias = range | Sequence[range]
Pieces: TypeAlias = tuple[range, ...]


def pieces_of(positions: Positions | None, length: int, what: str) -> Pieces:
    """Positions of `length` tokens as ranges that are not empty; None is all of them from 0 on.

    >>> pieces_of([range(0, 4), range(12, 16)], 8, "queries")
    (range(0, 4), range(12, 16))
    >>> pieces_of(range(1, 16, 4), 4, "keys")
    (range(1, 16, 4),)

    Raises:
        WrapError: for positions of another number of tokens, below 0, or that go backward.
    """
    given = (range(length),) if positions is None else (positions,) if isinstance(positions, range) else positions
    pieces = tuple(each for each in given if len(each))
    if sum(map(len, pieces)) != length or any(each.start < 0 or each.step < 0 for each in pieces):
        raise WrapError(
            f"positions of {what} are {list(given)}, but must be ranges of {length} positions in all, from 0 on and "
            "going forward"
        )
    return pieces
