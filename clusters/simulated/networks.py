"""What a network has to bring: below which rate another layout is best, and which rate is as good as any more.

Found by searching again at other rates, so exact to the step of the bisection; every search is helped by the layouts
that were best before.
"""

from dataclasses import dataclass, replace
from math import sqrt

from meshwright.clusters.simulated.candidates import Question
from meshwright.clusters.simulated.search import Priced, search

__all__ = ["Turn", "best_at", "sufficient", "turn"]

_SLOWEST = 64  # times slower than the given network: where the search for a turn ends
_CLOSE = 1.05  # bisection ends at rates this near to each other


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A rate below which another layout is best.

    Args:
        bytes_per_s: between nodes, per GPU and direction.
        instead: the layout that is best just below it.
    """

    bytes_per_s: float
    instead: Priced


def best_at(asked: Question, bytes_per_s: float, *, known: tuple[Priced, ...] = ()) -> Priced | None:
    """The best layout where the network has another rate; None where none fits."""
    cluster = replace(asked.cluster, network_bytes_per_s=bytes_per_s)
    found = search(replace(asked, cluster=cluster), 1, known=[each.layout for each in known])
    return found.best[0] if found.best else None


def turn(asked: Question, best: Priced) -> Turn | None:
    """The highest rate below the given one at which other degrees of tp, cp, ep and pp are best.

    Looked for between neighbouring powers of two, so a layout that is best in between and nowhere else may be missed.

    Args:
        asked: the question that `best` answers.
        best: the best layout at the given rate.
    """
    if asked.cluster.nodes == 1:
        return None
    high = asked.cluster.network
    low, other = high, best
    while other.axes == best.axes and low > asked.cluster.network / _SLOWEST:
        high, low = low, low / 2
        other = best_at(asked, low, known=(best,)) or best
    if other.axes == best.axes:
        return None
    while high / low > _CLOSE:
        middle = sqrt(high * low)
        found = best_at(asked, middle, known=(best, other)) or best
        if found.axes == best.axes:
            high = middle
        else:
            low, other = middle, found
    return Turn(bytes_per_s=high, instead=other)


def sufficient(asked: Question, best: Priced, *, within: float = 0.1) -> float | None:
    """The lowest rate at which some layout takes at most so much longer than the best one at the given rate.

    Args:
        asked: the question that `best` answers.
        best: the best layout at the given rate.
        within: 0.1 for a tenth longer.

    Returns:
        bytes per second between nodes, per GPU and direction; None where no network is needed.
    """
    if asked.cluster.nodes == 1:
        return None
    limit_s = (1 + within) * best.sequence_s
    high = asked.cluster.network
    low, known = high, best
    while low > asked.cluster.network / _SLOWEST:
        low = high / 2
        found = best_at(asked, low, known=(known,))
        if found is None or found.sequence_s > limit_s:
            break
        high, known = low, found
    else:
        return high
    while high / low > _CLOSE:
        middle = sqrt(high * low)
        found = best_at(asked, middle, known=(known,))
        if found is not None and found.sequence_s <= limit_s:
            high = middle
        else:
            low = middle
    return high
