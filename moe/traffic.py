"""What each hop sends, between nodes and inside of them, from the counts of all ranks.

Rows are counted on their way to the experts; as many go back, and again both ways in the backward. Counts of
micro-batches may be added before. Ranks are (node a, local rank b), r = a m + b, and experts lie on them in order.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from meshwright.moe.errors import MetricsError
from meshwright.moe.journey import Hops
from meshwright.parallel.errors import nearest

__all__ = ["HopTraffic", "traffic", "traffic_once"]


@dataclass(frozen=True, kw_only=True)
class HopTraffic:
    """What one exchange moves, of all ranks together, in one direction.

    Args:
        axis: "ep", "ep_node" (ranks with the same local rank) or "ep_local" (ranks of the same node).
        rows_between_nodes: to ranks of other nodes.
        rows_within_nodes: to other ranks of the same node.
        rows_staying: that stay on their rank.
        row_bytes: of a row.

    >>> hop = HopTraffic(axis="ep", rows_between_nodes=3, rows_within_nodes=1, rows_staying=2, row_bytes=8)
    >>> hop.bytes_between_nodes, hop.bytes_within_nodes
    (24, 8)
    """

    axis: Literal["ep", "ep_node", "ep_local"]
    rows_between_nodes: int
    rows_within_nodes: int
    rows_staying: int
    row_bytes: int

    @property
    def bytes_between_nodes(self) -> int:
        """To ranks of other nodes."""
        return self.rows_between_nodes * self.row_bytes

    @property
    def bytes_within_nodes(self) -> int:
        """To other ranks of the same node."""
        return self.rows_within_nodes * self.row_bytes

    def as_dict(self) -> dict[str, int]:
        """Plain numbers, such as for a line of `metrics.jsonl`.

        >>> HopTraffic(axis="ep_node", rows_between_nodes=3, rows_within_nodes=0, rows_staying=2, row_bytes=8).as_dict()
        ... # doctest: +NORMALIZE_WHITESPACE
        {'ep_node_rows_between_nodes': 3, 'ep_node_rows_within_nodes': 0,
         'ep_node_bytes_between_nodes': 24, 'ep_node_bytes_within_nodes': 0}
        """
        return {
            f"{self.axis}_rows_between_nodes": self.rows_between_nodes,
            f"{self.axis}_rows_within_nodes": self.rows_within_nodes,
            f"{self.axis}_bytes_between_nodes": self.bytes_between_nodes,
            f"{self.axis}_bytes_within_nodes": self.bytes_within_nodes,
        }


def traffic(counts: Tensor, *, row_bytes: int, num_nodes: int = 1, hops: Hops = "one") -> tuple[HopTraffic, ...]:
    """What journeys of all ranks send: a row for each (token, expert).

    Args:
        counts: int64 [ranks, experts], rows of each rank for each expert, as for `plan_journey`.
        row_bytes: of a token: its width times the bytes of an element.
        num_nodes: that the ranks are on, equally many on each.
        hops: "one", "inter_first" or "intra_first"; with one node, or one rank on each, it is one hop.

    Returns:
        Hops in their order; none with one rank.

    Raises:
        MetricsError: for experts or nodes that do not divide, or an unknown kind of hops.

    >>> import torch
    >>> counts = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 5], [0, 0, 0, 0], [2, 0, 0, 0]])
    >>> [(hop.axis, hop.rows_between_nodes, hop.rows_within_nodes) for hop in traffic(counts, row_bytes=8, num_nodes=2)]
    [('ep', 9, 1)]
    >>> two = traffic(counts, row_bytes=8, num_nodes=2, hops="inter_first")
    >>> [(hop.axis, hop.rows_between_nodes, hop.rows_within_nodes) for hop in two]
    [('ep_node', 9, 0), ('ep_local', 0, 4)]
    """
    if hops not in get_args(Hops):
        raise MetricsError(f"no journey has hops {hops!r}; {nearest(str(hops), get_args(Hops))}")
    rows = _rows(counts, num_nodes)
    if len(counts) == 1:
        return ()
    if hops == "one" or 1 in rows.shape[:2]:
        return (_one(rows, row_bytes),)
    found = (_inter(rows.sum(3), row_bytes), _intra(rows, row_bytes))
    return found if hops == "inter_first" else found[::-1]


def traffic_once(
    counts: Tensor, visits: Tensor, *, row_bytes: int, visit_bytes: int | None = None
) -> tuple[HopTraffic, ...]:
    """What the transport `once` sends: a row for each (token, node), then inside of nodes one for each (token, expert).

    Args:
        counts: int64 [ranks, experts], as for `traffic`.
        visits: int64 [ranks, nodes], (token, node) pairs of each rank, `visit_once(...).departure.counts`.
        row_bytes: of a token.
        visit_bytes: of a row between nodes, which on its way there also carries its experts and weights; that of a
            token where None.

    Returns:
        Hops in their order; one where there is one node, or one rank on each; none with one rank.

    Raises:
        MetricsError: for ranks, experts and nodes that do not fit.

    >>> import torch
    >>> counts, visits = torch.tensor([[1, 1, 1, 1], [0, 0, 3, 5]]), torch.tensor([[1, 1], [0, 6]])
    >>> [hop.rows_between_nodes for hop in traffic_once(counts, visits, row_bytes=8)]
    [1]
    """
    if len(visits) != len(counts):
        raise MetricsError(f"visits of {len(visits)} ranks and counts of {len(counts)}; gather both over all of `ep`")
    nodes = visits.shape[1]
    rows = _rows(counts, nodes)
    if nodes == 1:
        return traffic(counts, row_bytes=row_bytes)
    inter = _inter(visits.view(nodes, -1, nodes), row_bytes if visit_bytes is None else visit_bytes)
    return (inter,) if rows.shape[1] == 1 else (inter, _intra(rows, row_bytes))


def _rows(counts: Tensor, num_nodes: int) -> Tensor:
    """int64 [a, b, A, B]: rows from node a, local rank b to node A, local rank B."""
    ranks, experts = counts.shape
    if experts % ranks:
        raise MetricsError(f"{experts} experts do not lie evenly on ep={ranks} ranks; give counts as [ranks, experts]")
    if num_nodes < 1 or ranks % num_nodes:
        legal = ", ".join(str(number) for number in range(1, ranks + 1) if ranks % number == 0)
        raise MetricsError(f"ep={ranks} ranks do not lie evenly on {num_nodes} nodes; choose ep_node from: {legal}")
    local = ranks // num_nodes
    return counts.view(num_nodes, local, num_nodes, local, experts // ranks).sum(4)


def _one(rows: Tensor, row_bytes: int) -> HopTraffic:
    inside = int(rows.diagonal(dim1=0, dim2=2).sum())
    staying = int(rows.diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1).sum())
    return HopTraffic(
        axis="ep",
        rows_between_nodes=int(rows.sum()) - inside,
        rows_within_nodes=inside - staying,
        rows_staying=staying,
        row_bytes=row_bytes,
    )


def _inter(rows: Tensor, row_bytes: int) -> HopTraffic:
    """The hop between nodes, of rows [a, b, A]."""
    staying = int(rows.diagonal(dim1=0, dim2=2).sum())
    return HopTraffic(
        axis="ep_node",
        rows_between_nodes=int(rows.sum()) - staying,
        rows_within_nodes=0,
        rows_staying=staying,
        row_bytes=row_bytes,
    )


def _intra(rows: Tensor, row_bytes: int) -> HopTraffic:
    """The hop inside of nodes, of rows [a, b, A, B]; it moves the same whether it comes first or last."""
    staying = int(rows.diagonal(dim1=1, dim2=3).sum())
    return HopTraffic(
        axis="ep_local",
        rows_between_nodes=0,
        rows_within_nodes=int(rows.sum()) - staying,
        rows_staying=staying,
        row_bytes=row_bytes,
    )
