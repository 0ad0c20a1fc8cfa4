"""What context parallelism sends, counted exactly; without torch.

Elements that one of N ranks sends for one attention of a sequence of s positions, where all ranks hold equally many:

  kind        forward                                  backward
  Ring        2 b s h_kv (N-1)/N                       the same, and 2 b s h_kv of sums
  GatherKV    2 b s h_kv (N-1)/N                       the same, and as many of sums
  Ulysses     (2 h + 2 h_kv') b s/N (N-1)/N            the same; h_kv' = max(kv_heads, N) d
  Hybrid      Ulysses over U ranks, on s R/N positions; a ring of R = N/U on 1/U of the heads

Sums of gradients travel in float32 or wider, whatever the dtype. A ring sends less where nobody attends (`Route`).
"""

from dataclasses import dataclass

from meshwright.parallel.context.dealing import Dealing
from meshwright.parallel.context.heads import HeadDeal, deal_heads
from meshwright.parallel.context.kinds import GatherKV, Kind, ulysses_degree
from meshwright.parallel.context.route import Route
from meshwright.parallel.layout import Range

__all__ = ["Shape", "Traffic", "traffic_of"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One attention over a whole sequence.

    Args:
        batch: samples on each rank.
        length: positions of the whole sequence.
        heads: of queries.
        kv_heads: of keys and values.
        width: of a query and a key.
        value_width: of a value; that of a key where None.
    """

    batch: int
    length: int
    heads: int
    kv_heads: int
    width: int
    value_width: int | None = None

    @property
    def of_value(self) -> int:
        """Width of a value."""
        return self.width if self.value_width is None else self.value_width

    @property
    def of_pair(self) -> int:
        """Width of a key and its value."""
        return self.width + self.of_value


@dataclass(frozen=True)
class Traffic:
    """Elements that one rank sends: in the dtype of the tensors, and in that of sums.

    >>> Traffic(exchanged=2, brought=10, summed=5).sent_bytes(2)
    44
    """

    exchanged: int = 0
    brought: int = 0
    summed: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.exchanged + other.exchanged, self.brought + other.brought, self.summed + other.summed)

    def sent_bytes(self, itemsize: int) -> int:
        """For tensors whose elements have so many bytes."""
        return (self.exchanged + self.brought) * itemsize + self.summed * max(itemsize, 4)


def traffic_of(
    shape: Shape, dealing: Dealing, kind: Kind, *, rank: int, backward: bool, route: Route | None = None
) -> Traffic:
    """What one rank sends in forward or in backward.

    Args:
        shape: of the attention.
        dealing: of the sequence over the ranks.
        kind: how keys and queries meet.
        rank: which one.
        backward: rather than forward.
        route: of the ring, where not everybody attends to everybody; its ranks are the groups of a hybrid.

    >>> from meshwright.parallel.context.kinds import Ring, Ulysses
    >>> shape = Shape(batch=1, length=4096, heads=32, kv_heads=8, width=128)
    >>> dealing = Dealing("zigzag", 8)
    >>> traffic_of(shape, dealing, Ring(), rank=0, backward=False) == Traffic(brought=2 * 4096 * 1024 * 7 // 8)
    True
    >>> traffic_of(shape, dealing, Ulysses(), rank=0, backward=True).exchanged == (2 * 4096 + 2 * 1024) * 512 * 7 // 8
    True
    """
    each = ulysses_degree(kind, dealing.degree)
    sizes, place, group = dealing.sizes(shape.length), rank % each, rank // each
    dealt = deal_heads(shape.heads, shape.kv_heads, each)
    outer = [sum(sizes[first : first + each]) for first in range(0, dealing.degree, each)]
    keys = [shape.batch * _width(dealt.keys[place]) * size * shape.of_pair for size in outer]
    inner = sizes[group * each : (group + 1) * each]
    exchanged = Traffic(exchanged=_exchanged(shape, inner, dealt, place=place, backward=backward))
    if isinstance(kind, GatherKV):
        padded = (len(outer) - 1) * max(keys)
        return exchanged + Traffic(brought=padded, summed=padded if backward else 0)
    route = route or Route.of(len(outer), lambda origin, rank: bool(outer[origin] and outer[rank]))
    return exchanged + _ring(keys, route, place=group, backward=backward)


def _exchanged(shape: Shape, sizes: list[int], dealt: HeadDeal, *, place: int, backward: bool) -> int:
    """Query, key and value one way, the output another; to heads go own positions, to positions go own heads."""
    sent = 0
    for rank, size in enumerate(sizes):
        if rank != place:
            to, own = (rank, sizes[place]), (place, size)
            (head, one), (out, other) = (own, to) if backward else (to, own)
            sent += one * (_width(dealt.queries[head]) * shape.width + _width(dealt.keys[head]) * shape.of_pair)
            sent += other * _width(dealt.queries[out]) * shape.of_value
    return shape.batch * sent


def _width(heads: Range) -> int:
    return heads[1] - heads[0]


def _ring(keys: list[int], route: Route, *, place: int, backward: bool) -> Traffic:
    brought = summed = 0
    for hop in range(route.hops + 1):
        origin = (place - hop) % len(keys)
        brought += keys[origin] if route.travels(origin, hop + 1) else 0
        summed += keys[origin] if backward and route.travels(origin, max(hop, 1)) else 0
    return Traffic(brought=brought, summed=summed)
