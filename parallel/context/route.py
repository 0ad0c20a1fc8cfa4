"""How far the keys of each rank travel around a ring: as far as somebody attends to them; pure numbers.

All ranks make the same route from the same mask and positions, so that every message has both its ends.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

__all__ = ["Route"]


@dataclass(frozen=True)
class Route:
    """Who needs whose keys.

    Args:
        needs: for each origin, and each rank, whether the rank attends to keys of the origin.
    """

    needs: tuple[tuple[bool, ...], ...]

    @classmethod
    def of(cls, degree: int, needs: Callable[[int, int], bool]) -> "Route":
        """Asks `needs(origin, rank)` of every pair.

        >>> Route.of(3, lambda origin, rank: origin <= rank).last
        (2, 1, 0)
        """
        return cls(tuple(tuple(needs(origin, rank) for rank in range(degree)) for origin in range(degree)))

    @property
    def degree(self) -> int:
        """Ranks of the ring."""
        return len(self.needs)

    @cached_property
    def last(self) -> tuple[int, ...]:
        """For each origin the last hop that its keys make; rank `origin + hop` has them after it."""
        size = self.degree
        return tuple(
            max((hop for hop in range(size) if own[(origin + hop) % size]), default=0)
            for origin, own in enumerate(self.needs)
        )

    @cached_property
    def hops(self) -> int:
        """Hops until nothing travels."""
        return max(self.last, default=0)

    def travels(self, origin: int, hop: int) -> bool:
        """Whether the keys of an origin make a hop, from 1 on."""
        return hop <= self.last[origin % self.degree]
