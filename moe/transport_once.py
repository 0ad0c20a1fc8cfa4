"""Tokens that travel once to each node, however many experts they visit there, and their sums that travel back.

See `once` for what is sent. A row carries its token, experts and weights in one message; inside of the node rows take
one hop to the ranks of their experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from meshwright.moe.assumed import as_sent
from meshwright.moe.axes import ExpertAxes
from meshwright.moe.dispatch import combine, depart
from meshwright.moe.folding import own_experts
from meshwright.moe.once import route_on_node, visit_once
from meshwright.moe.routing import Routing
from meshwright.moe.transport import Experts, Hopping, Transport, Way, flown, widened
from meshwright.moe.travel import Splits

__all__ = ["Once"]


@dataclass(frozen=True)
class Once(Transport):
    """Tokens travel once to each node.

    Args:
        axes: the ranks; with one rank on each node, tokens travel once to each rank; with one node, rows take one hop.
    """

    axes: ExpertAxes

    def travel(self, tokens: Tensor, routing: Routing, experts: Experts) -> Way:
        """See `Transport`."""
        if self.axes.num_nodes == 1:
            return (yield from Hopping(self.axes).travel(tokens, routing, experts))
        own_experts(routing.num_experts, ranks=self.axes.ep.size, rank=self.axes.ep.rank)
        node = self.axes.node
        visits = visit_once(routing, num_nodes=node.size)
        counts = node.gather_each(functional.pad(visits.departure.counts, (0, 1), value=routing.k))
        widest = int(counts[:, -1].max())
        if routing.k < widest:
            visits = visit_once(widened(routing, widest), num_nodes=node.size)
        splits = Splits(tuple(counts[node.rank, :-1].tolist()), tuple(counts[:, node.rank].tolist()))
        chosen = visits.experts.to(torch.int32)
        leaving = depart(tokens, visits.departure), visits.weights, chosen
        rows, weights, arrived = yield from flown(node, splits, *leaving)
        chosen = as_sent(arrived, chosen, splits.sent, rank=node.rank)
        inside = route_on_node(chosen.long(), weights, num_experts=routing.num_experts // node.size)
        sums = yield from Hopping(self.axes.inside).travel(rows, inside, experts)
        (home,) = yield from flown(node, splits.back, sums)
        return combine(home, visits.departure)
