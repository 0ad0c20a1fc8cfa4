"""How rows travel between the ranks of `ep`, as a value: which splits, in which order, and the way back.

Ranks are (node a, local rank b), r = a m + b, and experts lie on them in order, so a departure sorted by expert is also
sorted by node and by rank. Each hop exchanges rows among some ranks and then puts blocks of rows in order:

  one hop       [expert]      -> ep -> [source, e] -> [e, source]
  inter first   [A, B, e]     -> ep_node  (same b) -> [a, B, e] -> [B, e, a] -> ep_local -> [b, e, a] -> [e, a, b]
  intra first   [B, A, e]     -> ep_local (same a) -> [b, A, e] -> [A, e, b] -> ep_node  -> [a, e, b] -> [e, a, b]

Capital letters are where rows go, small ones where they come from, e the experts of a rank. All three end in the same
order, so experts compute the same bits. The way back is the same hops backwards, with splits swapped. Two hops send
n + m - 2 messages from each rank where one hop sends n m - 1 (SMILE, arXiv 2212.05191; Tutel, arXiv 2206.03382).
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from meshwright.moe.dispatch import Departure
from meshwright.moe.errors import DispatchError
from meshwright.parallel.errors import nearest

__all__ = ["Hop", "Hops", "Journey", "block_order", "plan_journey"]

Hops = Literal["one", "inter_first", "intra_first"]


@dataclass(frozen=True, eq=False)
class Hop:
    """One exchange and what follows it.

    Args:
        axis: "ep", "ep_node" (ranks with the same local rank) or "ep_local" (ranks of the same node).
        sent: rows for each rank of the axis.
        received: rows from each rank of the axis.
        order: int64 [rows], which arrived row stands at each place afterwards.
    """

    axis: Literal["ep", "ep_node", "ep_local"]
    sent: tuple[int, ...]
    received: tuple[int, ...]
    order: Tensor

    def ordered(self, rows: Tensor) -> Tensor:
        """Arrived rows in the order in which they go on."""
        return rows.index_select(0, self.order)

    def restored(self, rows: Tensor) -> Tensor:
        """The same rows in the order in which they arrived, to be sent back."""
        places = torch.arange(len(self.order), device=self.order.device)
        return rows.index_select(0, torch.empty_like(self.order).scatter_(0, self.order, places))

    def message_sizes(self, rank: int) -> list[int]:
        """Rows of each message that the rank at this place of the axis sends to another one.

        >>> Hop("ep", (3, 4), (3, 0), torch.arange(3)).message_sizes(0)
        [4]
        """
        return [rows for to, rows in enumerate(self.sent) if to != rank]


@dataclass(frozen=True, eq=False)
class Journey:
    """The way of one rank's rows to experts, and of others' rows to this rank's experts.

    Args:
        departure: in the order of the first hop.
        hops: none where a rank has all experts.
        counts: int64 [own experts], rows that arrive for each, which stand together in this order.
    """

    departure: Departure
    hops: tuple[Hop, ...]
    counts: Tensor

    def __str__(self) -> str:
        steps = [f"{hop.axis} sends {list(hop.sent)}, receives {list(hop.received)}" for hop in self.hops]
        return "; ".join([f"{self.departure.num_rows} rows", *steps, f"experts get {self.counts.tolist()}"])


def plan_journey(departure: Departure, counts: Tensor, *, rank: int, num_nodes: int = 1, hops: Hops = "one") -> Journey:
    """Plans the way of a departure that is sorted by expert. With one node, or one rank per node, it is one hop.

    Args:
        departure: of this rank.
        counts: int64 [ranks, experts], `Departure.counts` of all ranks.
        rank: this one.
        num_nodes: that the ranks are on, equally many on each.
        hops: "one", "inter_first" or "intra_first".

    Raises:
        DispatchError: for experts or nodes that do not divide, or an unknown kind of hops.

    >>> departure = Departure(places=torch.arange(3), counts=torch.tensor([1, 2]), num_tokens=3, slots=1)
    >>> print(plan_journey(departure, torch.tensor([[1, 2], [4, 0]]), rank=0))
    3 rows; ep sends [1, 2], receives [1, 4]; experts get [5]
    """
    ranks, num_experts = counts.shape
    _check(departure, counts, rank=rank, num_nodes=num_nodes)
    if hops not in get_args(Hops):
        raise DispatchError(f"no journey has hops {hops!r}; {nearest(str(hops), get_args(Hops))}")
    local = ranks // num_nodes
    # from node a, local rank b; to node A, local rank B, expert e
    sizes = counts.view(num_nodes, local, num_nodes, local, num_experts // ranks)
    arriving = sizes[:, :, rank // local, rank % local].sum((0, 1))
    if ranks == 1:
        return Journey(departure, (), arriving)
    if hops == "one" or 1 in (num_nodes, local):
        return Journey(departure, (_one_hop(sizes, rank),), arriving)
    if hops == "inter_first":
        return Journey(departure, _inter_first(sizes, rank // local, rank % local), arriving)
    turned = departure.places[block_order(sizes[rank // local, rank % local], (1, 0, 2))]
    return Journey(replace(departure, places=turned), _intra_first(sizes, rank // local, rank % local), arriving)


def block_order(sizes: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Rows that lie in blocks, turned as a tensor of blocks is by `permute`.

    Args:
        sizes: int64, rows of each block; blocks lie row-major.
        dims: of `permute`.

    Returns:
        int64 [rows], which row stands at each place afterwards.

    >>> block_order(torch.tensor([[1, 2], [3, 0]]), (1, 0)).tolist()  # blocks 0, 12, 345 and one without rows
    [0, 3, 4, 5, 1, 2]
    """
    starts = (sizes.flatten().cumsum(0) - sizes.flatten()).view_as(sizes).permute(dims).flatten()
    turned = sizes.permute(dims).flatten()
    total = int(turned.sum())
    shift = starts - (turned.cumsum(0) - turned)
    return torch.arange(total, device=sizes.device) + shift.repeat_interleave(turned, output_size=total)


def _one_hop(sizes: Tensor, rank: int) -> Hop:
    num_nodes, local = sizes.shape[:2]
    by_rank = sizes.reshape(num_nodes * local, num_nodes * local, -1)
    return _hop("ep", by_rank[rank], by_rank[:, rank], dims=(1, 0))


def _inter_first(sizes: Tensor, node: int, place: int) -> tuple[Hop, ...]:
    here = sizes[:, place, node]  # [a, B, e] between the hops
    to_me = sizes[:, :, node, place].permute(1, 2, 0)  # [b, e, a]
    return (
        _hop("ep_node", sizes[node, place], here, dims=(1, 2, 0)),
        _hop("ep_local", here.transpose(0, 1), to_me, dims=(1, 2, 0)),
    )


def _intra_first(sizes: Tensor, node: int, place: int) -> tuple[Hop, ...]:
    here = sizes[node, :, :, place]  # [b, A, e] between the hops
    to_me = sizes[:, :, node, place].transpose(1, 2)  # [a, e, b]
    return (
        _hop("ep_local", sizes[node, place].transpose(0, 1), here, dims=(1, 2, 0)),
        _hop("ep_node", here.transpose(0, 1), to_me, dims=(1, 0, 2)),
    )


def _hop(axis: Literal["ep", "ep_node", "ep_local"], sent: Tensor, received: Tensor, *, dims: tuple[int, ...]) -> Hop:
    """A hop of blocks whose first dim is the rank that they go to, or come from."""
    return Hop(axis, _by_rank(sent), _by_rank(received), block_order(received, dims))


def _by_rank(sizes: Tensor) -> tuple[int, ...]:
    return tuple(sizes.flatten(1).sum(1).tolist())


def _check(departure: Departure, counts: Tensor, *, rank: int, num_nodes: int) -> None:
    ranks, num_experts = counts.shape
    if num_experts % ranks:
        legal = ", ".join(str(number) for number in range(1, num_experts + 1) if num_experts % number == 0)
        raise DispatchError(f"{num_experts} experts do not lie evenly on ep={ranks} ranks; choose ep from: {legal}")
    if num_nodes < 1 or ranks % num_nodes:
        legal = ", ".join(str(number) for number in range(1, ranks + 1) if ranks % number == 0)
        raise DispatchError(f"ep={ranks} ranks do not lie evenly on {num_nodes} nodes; choose ep_node from: {legal}")
    if not 0 <= rank < ranks:
        raise DispatchError(f"rank {rank} of ep={ranks}; use 0 to {ranks - 1}")
    own = departure.counts
    if own.shape != counts[rank].shape or not torch.equal(own, counts[rank]):
        raise DispatchError(
            f"rank {rank} leaves with {own.tolist()} rows for experts, and the counts of all ranks say "
            f"{counts[rank].tolist()}; gather the counts of the same routing"
        )
