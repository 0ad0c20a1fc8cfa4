"""Keys that travel around a ring of ranks while these compute (arXiv 2310.01889).

  forward    K, V make N - 1 hops
  backward   K, V make N - 1 hops, dK and dV follow one computation later, and their last hop is home

After hop h, rank r has the keys of rank r - h. Nothing travels farther than somebody attends to it (`route`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.parallel.context.axis import ContextAxis, Shares
from meshwright.parallel.context.join import Pieces
from meshwright.parallel.context.packed import Packed, Sizes
from meshwright.parallel.context.route import Route
from meshwright.parallel.context.supply import Held
from meshwright.parallel.pending import Pending

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
        carrier, route = _Carrier(self, own.memory, Sizes.of(own.key, own.value)), self.route
        held: Packed | None = own
        for hop in range(route.hops + 1):
            origin, following = self.origin(hop), self.origin(hop + 1)
            sent = {self.peer(1): held} if held and route.travels(origin, hop + 1) else {}
            wanted = {self.peer(-1): following} if route.travels(following, hop + 1) else {}
            coming, under_way = carrier.exchange(sent, wanted) if hop < route.hops else ({}, Pending(None))
            yield Held(held or own, self.positions[origin], wanted=route.needs[origin][self.axis.rank])
            under_way.wait()
            held = coming.get(self.peer(-1))

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


class _Carrier:
    """Sends keys, or gradients of keys, in tensors like a given one."""

    def __init__(self, supply: RingSupply, like: Tensor, sizes: Sizes) -> None:
        self._axis, self._like, self._sizes = supply.axis, like, sizes
        self._positions = [sum(map(len, pieces)) for pieces in supply.positions]

    def exchange(self, sent: Mapping[int, Packed], wanted: Mapping[int, int]) -> tuple[dict[int, Packed], Pending]:
        """Starts one round.

        Args:
            sent: what goes to a rank; one at most.
            wanted: from which rank comes what belongs to which one's positions.
        """
        degree = self._axis.size
        out = Shares.for_some(self._like, {}, degree)
        for rank, each in sent.items():
            out = Shares(each.memory, [each.memory.numel() if other == rank else 0 for other in range(degree)])
        sizes = {source: self._sizes.elements(self._positions[origin]) for source, origin in wanted.items()}
        received = Shares.for_some(self._like, sizes, degree)
        under_way = self._axis.exchange(received, out)
        return {source: self._packed(received.of(source), origin) for source, origin in wanted.items()}, under_way

    def zeros(self, origin: int) -> Packed:
        """Sums to which nobody has added."""
        return Packed.zeros(self._like, self._sizes, self._positions[origin])

    def _packed(self, memory: Tensor, origin: int) -> Packed:
        return Packed.within(memory, self._sizes, self._positions[origin])


class _WayBack:
    """What other ranks found for the keys that are here comes while this rank computes, and is sent on with its own."""

    def __init__(self, supply: RingSupply, like: Tensor, sizes: Sizes) -> None:
        self._supply, self._carrier = supply, _Carrier(supply, like, sizes)
        self._hop = 0
        self._under_way = Pending(None)
        self._sent: dict[int, Packed] = {}
        self._coming: Packed | None = None
        self._home: Packed | None = None

    def add(self, mine: Packed | None) -> None:
        """Waits for what others found, adds, and starts sending it on, or home after the last hop."""
        supply, route, hop = self._supply, self._supply.route, self._hop
        self._under_way.wait()
        self._hop += 1
        if route.hops == 0:
            self._home = mine
            return
        origin, before, own = supply.origin(hop), supply.origin(hop + 1), supply.axis.rank
        wanted, self._sent = {}, {}
        if route.travels(origin, max(hop, 1)):
            to = supply.peer(1) if route.travels(origin, hop + 1) else origin
            self._sent = {to: self._sum(mine, origin)}
        elif hop == 0:
            self._home = mine
        if route.travels(before, hop + 1):
            wanted[supply.peer(-1)] = before
        if hop == route.last[own] > 0:
            wanted[supply.peer(hop)] = own
        received, self._under_way = self._carrier.exchange(self._sent, wanted)
        self._coming = received.get(supply.peer(-1)) if route.travels(before, hop + 1) else None
        if hop == route.last[own] > 0:
            self._home = received[supply.peer(hop)]

    def home(self) -> Packed:
        """The sums for this rank's own keys, which came with the last message."""
        self._under_way.wait()
        return self._home or self._carrier.zeros(self._supply.axis.rank)

    def _sum(self, mine: Packed | None, origin: int) -> Packed:
        if mine is None:
            return self._coming or self._carrier.zeros(origin)
        if self._coming is not None:
            mine.memory.add_(self._coming.memory)
        return mine
