"""Tokens on their way to experts, counted on paper: messages and bytes of each hop, and how long they take.

Ranks are n nodes x m GPUs, experts lie on them in order, choices are spread evenly. Counts are those of one rank on the
way to the experts; as many go back, and again both ways in the backward. They equal what the real transports of
`meshwright.moe` count on even routings.

  one hop    each rank sends to all n m - 1 others, m (n - 1) of them on other nodes (Switch, arXiv 2101.03961)
  two hops   between nodes to the n - 1 ranks of the same local rank, then within the node to the m - 1 others
             (SMILE, arXiv 2212.05191): as many bytes between nodes in messages that are m times as large
  once       two hops; between nodes a row for each (token, node) instead of each (token, expert), and rows go on within
             the node while others arrive (DeepEP)
"""

from dataclasses import dataclass
from math import ceil, comb
from typing import TYPE_CHECKING, Literal

from meshwright.clusters.simulated.cluster import Cluster
from meshwright.clusters.simulated.congestion import Fabric, fabric

if TYPE_CHECKING:
    from meshwright.clusters.simulated.training import Training

__all__ = ["Exchange", "Hop", "Way", "Ways", "exchange_of", "exchange_s", "visited_nodes", "ways_of"]

Way = Literal["one_hop", "two_hops", "once"]


def visited_nodes(*, experts: int, top_k: int, nodes: int) -> float:
    """Nodes that a token visits on average if its experts are any: n (1 - C(E - E / n, k) / C(E, k)).

    >>> round(visited_nodes(experts=256, top_k=8, nodes=8), 4)
    5.2947
    """
    return nodes * (1 - comb(experts - experts // nodes, top_k) / comb(experts, top_k))


@dataclass(frozen=True, kw_only=True)
class Hop:
    """What one rank sends in one exchange to others; what stays on it is not counted.

    Args:
        axis: "ep", "ep_node" (ranks with the same local rank) or "ep_local" (ranks of the same node).
        messages_away: to ranks of other nodes.
        messages_within: to ranks of its own node.
        bytes_away: in the former.
        bytes_within: in the latter.
    """

    axis: Literal["ep", "ep_node", "ep_local"]
    messages_away: int
    messages_within: int
    bytes_away: float
    bytes_within: float

    def took_s(self, ways: "Ways") -> float:
        """Seconds: messages within the node travel while those to other nodes do."""
        within_s = ways.within.took_s(
            self.messages_within, self.bytes_within, rate_bytes_per_s=ways.within_bytes_per_s, nics=1.0
        )
        between_s = ways.between.took_s(
            self.messages_away, self.bytes_away, rate_bytes_per_s=ways.between_bytes_per_s, nics=ways.nics_per_gpu
        )
        return max(within_s, between_s)


@dataclass(frozen=True, kw_only=True)
class Ways:
    """The links of one GPU.

    Args:
        within: of a node.
        between: nodes.
        within_bytes_per_s: of the former, one direction.
        between_bytes_per_s: of its share of the latter.
        nics_per_gpu: 0.5 where two GPUs share one.
    """

    within: Fabric
    between: Fabric
    within_bytes_per_s: float
    between_bytes_per_s: float
    nics_per_gpu: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Tokens of each rank, and how they travel.

    Args:
        tokens: of a rank.
        row_bytes: of a token: its width times the bytes of an element.
        experts: of all ranks together.
        nodes: n.
        per_node: m.
        top_k: experts of a token.
        way: "one_hop", "two_hops" or "once"; with one node, or one rank on each, it is one hop.
        node_choices: nodes that the gate of a bi-level router chooses for a token; None where its experts are any.
        capacity: factor of the slots of an expert (or of a node, then of a rank), all of which travel, filled or not,
            as with Switch and DeepSpeed; None where tokens alone do.

    Raises:
        ValueError: for experts that ranks cannot share, or more choices than there are.
    """

    tokens: float
    row_bytes: float
    experts: int
    nodes: int
    per_node: int
    top_k: int = 1
    way: Way = "one_hop"
    node_choices: int | None = None
    capacity: float | None = None

    def __post_init__(self) -> None:
        ranks = self.nodes * self.per_node
        if min(self.nodes, self.per_node) < 1 or self.experts % ranks:
            raise ValueError(f"{self.experts} experts do not lie evenly on {self.nodes} nodes of {self.per_node} ranks")
        if not 1 <= self.top_k <= self.experts or not 1 <= (self.node_choices or 1) <= self.nodes:
            raise ValueError(
                f"a token goes to {self.top_k} of {self.experts} experts on {self.node_choices or 'any'} of "
                f"{self.nodes} nodes; choose no more than there are"
            )

    @property
    def hops(self) -> tuple[Hop, ...]:
        """In their order; none with one rank.

        >>> flat = Exchange(tokens=1024, row_bytes=2, experts=128, nodes=16, per_node=8)
        >>> [(hop.axis, hop.messages_away, hop.messages_within) for hop in flat.hops]
        [('ep', 120, 7)]
        >>> bilevel = Exchange(tokens=1024, row_bytes=2, experts=128, nodes=16, per_node=8, way="two_hops")
        >>> [(hop.axis, hop.messages_away, hop.messages_within) for hop in bilevel.hops]
        [('ep_node', 15, 0), ('ep_local', 0, 7)]
        >>> flat.hops[0].bytes_away == bilevel.hops[0].bytes_away
        True
        """
        nodes, local = self.nodes, self.per_node
        if nodes * local == 1:
            return ()
        if self.way == "one_hop" or nodes == 1:
            return (self._hop("ep", (local * (nodes - 1), local - 1), self._rows(self.experts)),)
        rows = self.tokens * self.visits if self.way == "once" else self._rows(nodes)
        between = self._hop("ep_node", (nodes - 1, 0), rows)
        if local == 1:
            return (Hop(**{**vars(between), "axis": "ep" if self.way == "two_hops" else "ep_node"}),)
        return between, self._hop("ep_local", (0, local - 1), self._rows(local))

    @property
    def visits(self) -> float:
        """Nodes of a token."""
        if self.node_choices is not None:
            return self.node_choices
        return visited_nodes(experts=self.experts, top_k=self.top_k, nodes=self.nodes)

    def took_s(self, ways: Ways) -> tuple[float, ...]:
        """Seconds of each hop, in one direction."""
        return tuple(hop.took_s(ways) for hop in self.hops)

    def _rows(self, places: int) -> float:
        """Rows that leave a rank for that many places, its own among them: choices, or slots."""
        rows = self.tokens * self.top_k
        return rows if self.capacity is None else places * ceil(round(self.capacity * rows / places, 9))

    def _hop(self, axis: Literal["ep", "ep_node", "ep_local"], peers: tuple[int, int], rows: float) -> Hop:
        """Rows for peers on other nodes, for those on its own and for itself, spread evenly."""
        away, within = peers
        each = rows * self.row_bytes / (away + within + 1)
        return Hop(
            axis=axis, messages_away=away, messages_within=within, bytes_away=away * each, bytes_within=within * each
        )


def exchange_of(training: "Training") -> Exchange | None:
    """What a rank sends in one exchange of a training; None where it sends nothing.

    Ranks of tp hold the same tokens, and each sends its part of them. Ranks that no whole number of nodes holds are
    taken as on nodes that are as full as they can be evenly; experts that ranks cannot share evenly, as slices.
    """
    model, layout, engine = training.model, training.layout, training.engine
    if not model.experts or layout.ep == 1:
        return None
    group = training.cluster.group(layout.ep, layout.tp)
    per_node = max(each for each in range(1, group.per_node + 1) if layout.ep % each == 0)
    way: Way = "once" if engine.once_per_node else "two_hops" if engine.bilevel_nodes else "one_hop"
    return Exchange(
        tokens=training.tokens / layout.tp,
        row_bytes=2 * model.hidden,
        experts=layout.ep * ceil(model.experts / layout.ep),
        nodes=layout.ep // per_node,
        per_node=per_node,
        top_k=model.top_k,
        way=way,
        node_choices=min(engine.bilevel_nodes, layout.ep // per_node) or None,
    )


def ways_of(cluster: Cluster, congestion: float = 1.0) -> Ways:
    """The links of each GPU of a cluster; `congestion` as for `exchange_s`."""
    return Ways(
        within=fabric("nvlink"),
        between=fabric(cluster.fabric).congested(congestion),
        within_bytes_per_s=cluster.gpu.nvlink_bytes_per_s,
        between_bytes_per_s=cluster.network,
        nics_per_gpu=cluster.nics_per_gpu,
    )


def exchange_s(training: "Training", *, congestion: float = 1.0) -> float:
    """Seconds of one exchange of a training, in one direction.

    Args:
        training: with or without experts.
        congestion: times the measured cost of a message between nodes; 0 for latency and bandwidth alone.
    """
    exchange = exchange_of(training)
    if exchange is None:
        return 0.0
    hops_s = exchange.took_s(ways_of(training.cluster, congestion))
    return max(hops_s) if exchange.way == "once" else sum(hops_s)
