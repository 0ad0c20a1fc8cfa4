"""How evenly causal attention is spread over the ranks of a ring, in scores; pure numbers.

Ranks compute one hop after the other, and each hop takes as long as its slowest rank.
"""

from fractions import Fraction

from meshwright.parallel.context.dealing import Dealing
from meshwright.parallel.context.join import Pieces

__all__ = ["causal_scores", "critical_path"]


def critical_path(dealing: Dealing, length: int) -> Fraction:
    """Scores of the slowest rank of each hop, against what each rank would have of an even spread.

    For chunks that are long: (2 N - 1)/N of contiguous ones, 1 of zigzag, 1 + 1/c of stripes of c positions.

    >>> [round(float(critical_path(Dealing(kind, 4), 4096)), 3) for kind in ("contiguous", "zigzag", "striped")]
    [1.75, 1.0, 1.001]
    """
    pieces = [dealing.pieces(length, rank) for rank in range(dealing.degree)]
    slowest = sum(
        max(causal_scores(own, pieces[(rank - hop) % dealing.degree]) for rank, own in enumerate(pieces))
        for hop in range(dealing.degree)
    )
    return Fraction(slowest * dealing.degree, length * (length + 1) // 2)


def causal_scores(queries: Pieces, keys: Pieces) -> int:
    """Pairs of a query and a key that is not after it.

    >>> causal_scores((range(4),), (range(4),))
    10
    """
    return sum(_pairs(one, other) for one in queries for other in keys)


def _pairs(queries: range, keys: range) -> int:
    """Keys up to position p: (p - first) // step + 1 of them, at least none and at most all."""
    if queries.step != keys.step:
        return sum(min(max((each - keys.start) // keys.step + 1, 0), len(keys)) for each in queries)
    ahead = (queries.start - keys.start) // keys.step + 1  # keys that the first query sees, were there enough
    first = max(0, -ahead)
    rising = min(len(queries), len(keys) - ahead)  # from here on a query sees all keys
    ramp = range(ahead + first, ahead + rising)
    below = len(ramp) * (ramp[0] + ramp[-1]) // 2 if ramp else 0
    return below + max(0, len(queries) - max(rising, 0)) * len(keys)
