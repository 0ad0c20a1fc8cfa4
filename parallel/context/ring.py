"""Keys that travel around a ring of ranks while these compute (arXiv 2310.01889).

  forward    K, V make N - 1 hops
  backward   K, V make N - 1 hops, dK and dV follow one computation later, and their last hop is home

Nothing travels farther than somebody attends to it (`route`). In round h, rank r has the keys of rank r - h.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.parallel.context.axis import ContextAxis, Message, Round
from meshwright.parallel.context.join import Pieces
from meshwright.parallel.context.packed import Packed, Sizes
from meshwright.parallel.context.route import Route
from meshwright.parallel.context.supply import Held

__all__ = ["RingSupply"]


@dataclass(frozen=True, eq=False)
class RingSupply:
    """Keys of all ranks, one after the other.

    Args:
        axis: the ranks.
        positions: of each of them.
        route: who needs whose keys.
    """

    axis: ContextAxis
    positions: tuple[Pieces, ...]
    route: Route

    def keys(self, own: Packed) -> Iterator[Held]:
        """The own ones first; the next ones are under way while some are used."""
        sizes = Sizes.of(own.key, own.value)
        held = own
        for hop in range(self.route.hops + 1):
            origin, following = self.origin(hop), self.origin(hop + 1)
            sends, receives, coming = [], [], held
            if self.route.travels(origin, hop + 1):
                sends = [Message(held.memory, self.peer(1))]
            if self.route.travels(following, hop + 1):
                coming = Packed.empty(own.memory, sizes, self.size(following))
                receives = [Message(coming.memory, self.peer(-1))]
            under_way = self.axis.start(sends, receives, tag=2 * hop)
            yield Held(held, self.positions[origin], self.route.needs[origin][self.axis.rank])
            under_way.wait()
            held = coming

    def way_back(self, like: Tensor, sizes: Sizes) -> "_WayBack":
        """Gradients that follow the keys."""
        wide = torch.promote_types(like.dtype, torch.float32)
        return _WayBack(self, like.new_empty(0, dtype=wide), sizes)

    def origin(self, hop: int) -> int:
        """Whose keys this rank has after a hop."""
        return self.peer(-hop)

    def peer(self, distance: int) -> int:
        """The rank so much further along the ring."""
        return (self.axis.rank + distance) % self.axis.size

    def size(self, rank: int) -> int:
        """Positions of a rank."""
        return sum(map(len, self.positions[rank]))


class _WayBack:
    """What other ranks found for the keys that are here comes while this rank computes, and is sent on with its own."""

    def __init__(self, supply: RingSupply, like: Tensor, sizes: Sizes) -> None:
        self._supply, self._like, self._sizes = supply, like, sizes
        self._hop = 0
        self._under_way = Round()
        self._coming: Packed | None = None
        self._home: Packed | None = None

    def add(self, mine: Packed | None) -> None:
        """Waits for what others found, adds, and starts sending it on, or home after the last hop."""
        supply, route, hop = self._supply, self._supply.route, self._hop
        self._under_way.wait()
        origin, before, own = supply.origin(hop), supply.origin(hop + 1), supply.axis.rank
        sends, receives = [], []
        if route.travels(origin, max(hop, 1)):
            to = supply.peer(1) if route.travels(origin, hop + 1) else origin
            sends.append(Message(self._sum(mine, origin).memory, to))
        elif hop == 0:
            self._home = mine
        self._coming = None
        if route.travels(before, hop + 1):
            self._coming = self._room(before)
            receives.append(Message(self._coming.memory, supply.peer(-1)))
        if hop == route.last[own] > 0:
            self._home = self._room(own)
            receives.append(Message(self._home.memory, supply.peer(hop)))
        self._under_way = supply.axis.start(sends, receives, tag=2 * hop + 1)
        self._hop += 1

    def home(self) -> Packed:
        """The sums for this rank's own keys, which came with the last message."""
        self._under_way.wait()
        return self._home or self._zeros(self._supply.axis.rank)

    def _sum(self, mine: Packed | None, origin: int) -> Packed:
        if mine is None:
            return self._coming or self._zeros(origin)
        if self._coming is not None:
            mine.memory.add_(self._coming.memory)
        return mine

    def _room(self, origin: int) -> Packed:
        return Packed.empty(self._like, self._sizes, self._supply.size(origin))

    def _zeros(self, origin: int) -> Packed:
        return Packed.zeros(self._like, self._sizes, self._supply.size(origin))
