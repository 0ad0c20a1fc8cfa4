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
from typing import Literal

from meshwright.parallel.context.dealing import Dealing
from meshwright.parallel.context.heads import HeadDeal, deal_heads
from meshwright.parallel.context.kinds import GatherKV, Kind, ulysses_degree
from meshwright.parallel.context.route import Route
from meshwright.parallel.layout import Range

__all__ = ["Sending", "Shape", "Traffic", "sendings_of", "traffic_of"]


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


@dataclass(frozen=True)
class Sending:
    """One collective of one rank.

    Args:
        of: what it is part of; sums travel in float32 or wider.
        kind: as the ledger says.
        ranks: that take part.
        elements: of the whole tensor that it works on; of an all-to-all those that are sent.
    """

    of: Literal["exchanged", "brought", "summed"]
    kind: Literal["all_to_all", "all_gather", "reduce_scatter"]
    ranks: int
    elements: int

    @property
    def traffic(self) -> Traffic:
        """What this rank sends."""
        sent = self.elements if self.kind == "all_to_all" else self.elements // self.ranks * (self.ranks - 1)
        return Traffic(**{self.of: sent})


def traffic_of(
    shape: Shape, dealing: Dealing, kind: Kind, *, rank: int, backward: bool, route: Route | None = None
) -> Traffic:
    """What one rank sends in forward or in backward; arguments are those of `sendings_of`.

    >>> from meshwright.parallel.context.kinds import Ring, Ulysses
    >>> shape = Shape(batch=1, length=4096, heads=32, kv_heads=8, width=128)
    >>> dealing = Dealing("zigzag", 8)
    >>> traffic_of(shape, dealing, Ring(), rank=0, backward=False) == Traffic(brought=2 * 4096 * 1024 * 7 // 8)
    True
    >>> traffic_of(shape, dealing, Ulysses(), rank=0, backward=True).exchanged == (2 * 4096 + 2 * 1024) * 512 * 7 // 8
    True
    """
    found = sendings_of(shape, dealing, kind, rank=rank, backward=backward, route=route)
    return sum((each.traffic for each in found), Traffic())


def sendings_of(
    shape: Shape, dealing: Dealing, kind: Kind, *, rank: int, backward: bool, route: Route | None = None
) -> list[Sending]:
    """The collectives of one rank in forward or in backward.

    Args:
        shape: of the attention.
        dealing: of the sequence over the ranks.
        kind: how keys and queries meet.
        rank: which one.
        backward: rather than forward.
        route: of the ring, where not everybody attends to everybody; its ranks are the groups of a hybrid.

    >>> from meshwright.parallel.context.kinds import Ring
    >>> shape = Shape(batch=1, length=8, heads=2, kv_heads=1, width=3)
    >>> sendings_of(shape, Dealing("zigzag", 2), Ring(), rank=0, backward=False)
    [Sending(of='brought', kind='all_to_all', ranks=2, elements=24)]
    """
    each = ulysses_degree(kind, dealing.degree)
    sizes, place, group = dealing.sizes(shape.length), rank % each, rank // each
    dealt = deal_heads(shape.heads, shape.kv_heads, each)
    outer = [sum(sizes[first : first + each]) for first in range(0, dealing.degree, each)]
    keys = [shape.batch * _width(dealt.keys[place]) * size * shape.of_pair for size in outer]
    inner = sizes[group * each : (group + 1) * each]
    both = _exchanged(shape, inner, dealt, place=place, backward=backward) if each > 1 else ()
    found = [Sending("exchanged", "all_to_all", each, elements) for elements in both]
    if len(outer) > 1 and isinstance(kind, GatherKV):
        whole = len(outer) * max(keys)
        found.append(Sending("brought", "all_gather", len(outer), whole))
        found += [Sending("summed", "reduce_scatter", len(outer), whole)] if backward else []
    elif len(outer) > 1:
        route = route or Route.of(len(outer), lambda origin, rank: bool(outer[origin] and outer[rank]))
        found += _ring(keys, route, place=group, backward=backward)
    return found


def _exchanged(shape: Shape, sizes: list[int], dealt: HeadDeal, *, place: int, backward: bool) -> tuple[int, ...]:
    """Query, key and value one way, the output another; to heads go own positions, to positions go own heads."""
    given = made = 0
    for rank, size in enumerate(sizes):
        if rank != place:
            to, own = (rank, sizes[place]), (place, size)
            (head, one), (out, other) = (own, to) if backward else (to, own)
            given += one * (_width(dealt.queries[head]) * shape.width + _width(dealt.keys[head]) * shape.of_pair)
            made += other * _width(dealt.queries[out]) * shape.of_value
    return shape.batch * given, shape.batch * made


def _width(heads: Range) -> int:
    return heads[1] - heads[0]


def _ring(keys: list[int], route: Route, *, place: int, backward: bool) -> list[Sending]:
    """Keys go around; in backward sums follow them, and the last of these messages is home."""
    size, hops = len(keys), route.hops
    origins = [(place - hop) % size for hop in range(hops + 1)]
    brought = [keys[origin] * route.travels(origin, hop + 1) for hop, origin in enumerate(origins[:hops])]
    summed = [keys[origin] * route.travels(origin, max(hop, 1)) for hop, origin in enumerate(origins)]
    found = [Sending("brought", "all_to_all", size, elements) for elements in brought]
    if backward and hops:
        found += [Sending("summed", "all_to_all", size, elements) for elements in summed]
    return found
