"""Which heads each rank computes where positions are exchanged for heads (Ulysses); pure numbers.

Every rank holds whole groups of query heads with their key head, or part of one group with a copy of its key head.
"""

from dataclasses import dataclass

from meshwright.parallel.errors import WrapError
from meshwright.parallel.layout import Range, deal

__all__ = ["HeadDeal", "deal_heads"]


@dataclass(frozen=True)
class HeadDeal:
    """Heads of each rank, as ranges of the full ones; key heads of several ranks may be the same."""

    queries: tuple[Range, ...]
    keys: tuple[Range, ...]

    @property
    def even(self) -> bool:
        """Whether every rank computes equally many heads."""
        return len({stop - start for start, stop in self.queries}) == 1


def deal_heads(heads: int, kv_heads: int, degree: int) -> HeadDeal:
    """Deals query heads, and with them key heads.

    >>> deal_heads(8, 2, 4)
    HeadDeal(queries=((0, 2), (2, 4), (4, 6), (6, 8)), keys=((0, 1), (0, 1), (1, 2), (1, 2)))
    >>> deal_heads(6, 3, 2)
    HeadDeal(queries=((0, 4), (4, 6)), keys=((0, 2), (2, 3)))

    Raises:
        WrapError: for more ranks than heads.
    """
    if degree > heads:
        raise WrapError(
            f"{heads} heads cannot be dealt over {degree} ranks; choose Ulysses over at most {heads} ranks, and rings "
            "for the rest (cp_kind: hybrid), or cp_kind: ring"
        )
    group = heads // kv_heads
    if kv_heads >= degree:
        keys = deal(kv_heads, degree)
        return HeadDeal(tuple((start * group, stop * group) for start, stop in keys), tuple(keys))
    queries, own = [], []
    for head, (first, last) in enumerate(deal(degree, kv_heads)):
        for start, stop in deal(group, last - first):
            queries.append((head * group + start, head * group + stop))
            own.append((head, head + 1))
    return HeadDeal(tuple(queries), tuple(own))
