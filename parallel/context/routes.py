"""Routes of rings, from a mask and the positions of each rank; made once for a mask that lives, or an equal one."""

from functools import lru_cache
from typing import TypeAlias
from weakref import WeakKeyDictionary

from meshwright.parallel.blockwise.diagonals import EMPTY
from meshwright.parallel.blockwise.mask import Band, Mask
from meshwright.parallel.context.join import Pieces
from meshwright.parallel.context.route import Route

__all__ = ["route_for"]

_Positions: TypeAlias = tuple[Pieces, ...]

_MOST_LOOKS = 1 << 15  # at a mask, for one route: less than a tenth of a second
_KEPT_ROUTES = 8  # of one mask
_ROUTES: WeakKeyDictionary[Mask, dict[_Positions, Route]] = WeakKeyDictionary()


def route_for(mask: Mask | None, positions: _Positions) -> Route:
    """Who needs whose keys.

    Args:
        mask: the same on all ranks; None is all pairs. Where only elements tell, keys are needed.
        positions: of each rank of the ring.

    >>> from meshwright.parallel.blockwise.mask import window
    >>> route_for(window(3), tuple((range(each, each + 4),) for each in range(0, 16, 4))).last
    (1, 1, 1, 0)
    """
    if mask is None or isinstance(mask, Band):
        return _route_of_band(mask, positions)
    routes = _ROUTES.setdefault(mask, {})
    if positions not in routes:
        if len(routes) >= _KEPT_ROUTES:
            routes.pop(next(iter(routes)))
        routes[positions] = _made(mask, positions)
    return routes[positions]


@lru_cache(maxsize=16)
def _route_of_band(mask: Band | None, positions: _Positions) -> Route:
    return _made(mask, positions)


def _made(mask: Mask | None, positions: _Positions) -> Route:
    looks = sum(map(len, positions)) ** 2 * (1 if mask is None else mask.rows)

    def needs(origin: int, rank: int) -> bool:
        queries, keys = positions[rank], positions[origin]
        if mask is None or looks > _MOST_LOOKS:
            return bool(queries and keys)
        return any(mask.sketch(one, other) is not EMPTY for one in queries for other in keys)

    return Route.of(len(positions), needs)
