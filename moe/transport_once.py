"""Tokens that travel once to each node, however many experts they visit there, and their sums that travel back.

See `once` for what is sent. A row carries its token, experts and weights in one message; inside of the node rows take
one hop to the ranks of their experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from meshwright.moe.axes import ExpertAxes
from meshwright.moe.dispatch import combine, depart
from meshwright.moe.flight import Flight
from meshwright.moe.folding import own_experts
from meshwright.moe.once import route_on_node, visit_once
from meshwright.moe.routing import Routing
from meshwright.moe.transport import Experts, Hopping, nothing, widened
from meshwright.moe.travel import Splits, exchange

__all__ = ["Once"]


@dataclass(frozen=True)
class Once:
    """Tokens travel once to each node.

    Args:
        axes: the ranks; with one rank on each node, tokens travel once to each rank; with one node, rows take one hop.
    """

    axes: ExpertAxes

    def carry(
        self, tokens: Tensor, routing: Routing, experts: Experts, *, meanwhile: Callable[[], object] = nothing
    ) -> Tensor:
        """See `Transport`."""
        if self.axes.num_nodes == 1:
            return Hopping(self.axes).carry(tokens, routing, experts, meanwhile=meanwhile)
        own_experts(routing.num_experts, ranks=self.axes.ep.size, rank=self.axes.ep.rank)
        node = self.axes.node
        visits = visit_once(routing, num_nodes=node.size)
        counts = node.gather_each(functional.pad(visits.departure.counts, (0, 1), value=routing.k))
        widest = int(counts[:, -1].max())
        if routing.k < widest:
            visits = visit_once(widened(routing, widest), num_nodes=node.size)
        splits = Splits(tuple(counts[node.rank, :-1].tolist()), tuple(counts[:, node.rank].tolist()))
        chosen = visits.experts.to(torch.int32)
        flight = Flight(node, splits)
        flight.leave(depart(tokens, visits.departure), visits.weights, chosen)
        meanwhile()
        rows, weights, chosen = flight.arrive()
        inside = route_on_node(chosen.long(), weights, num_experts=routing.num_experts // node.size)
        sums = Hopping(self.axes.inside).carry(rows, inside, experts)
        (home,) = exchange(node, splits.back, sums)
        return combine(home, visits.departure)
