"""Which positions of a sequence each rank of `cp` holds; exact for every length, without padding.

  contiguous   rank r holds chunk r of N                 causal work (2N - 1)/N of the ideal on the last rank
  zigzag       chunks r and 2N - 1 - r of 2N             the same work on every rank
  striped      positions r, r + N, r + 2N, ...           work within a factor 1 + 1/c, for c positions per rank

(Ring attention, arXiv 2310.01889; striped, arXiv 2311.09431.)
"""

from dataclasses import dataclass
from typing import Literal, get_args

from meshwright.parallel.errors import WrapError, nearest
from meshwright.parallel.layout import deal

__all__ = ["Dealing", "DealingKind"]

DealingKind = Literal["contiguous", "zigzag", "striped"]


@dataclass(frozen=True)
class Dealing:
    """How positions are dealt over `degree` ranks.

    >>> Dealing("zigzag", 2).pieces(9, 0)
    (range(0, 3), range(7, 9))
    >>> Dealing("striped", 2).pieces(5, 1)
    (range(1, 5, 2),)

    Raises:
        WrapError: for an unknown kind.
    """

    kind: DealingKind
    degree: int

    def __post_init__(self) -> None:
        if self.kind not in get_args(DealingKind):
            raise WrapError(f"no sequence is dealt {self.kind!r}; {nearest(self.kind, get_args(DealingKind))}")

    def pieces(self, full: int, rank: int) -> tuple[range, ...]:
        """Positions of one rank, in its order; pieces without positions are left out."""
        if self.kind == "striped":
            found = [range(rank, full, self.degree)]
        elif self.kind == "zigzag":
            chunks = deal(full, 2 * self.degree)
            found = [range(*chunks[rank]), range(*chunks[2 * self.degree - 1 - rank])]
        else:
            found = [range(*deal(full, self.degree)[rank])]
        return tuple(each for each in found if len(each))

    def size(self, full: int, rank: int) -> int:
        """Positions that one rank holds."""
        return sum(map(len, self.pieces(full, rank)))

    def sizes(self, full: int) -> list[int]:
        """Positions that each rank holds."""
        return [self.size(full, rank) for rank in range(self.degree)]
