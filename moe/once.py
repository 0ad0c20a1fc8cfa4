"""Tokens sent once to each node, however many experts they visit there (as DeepEP does), and summed before they return.

At the source a token's row for a node carries the experts that it visits there and their weights. On the node the rows
are routed like any tokens, among the experts of the node; their weighted sums go back, and the source adds those of
different nodes. Between nodes travel 2 d numbers for each (token, node) instead of for each (token, expert).

Weighted sums are made node by node, so results equal those of one hop up to the order of additions.
"""

from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor

from meshwright.moe.dispatch import Departure
from meshwright.moe.errors import DispatchError
from meshwright.moe.routing import Routing

__all__ = ["Visits", "expected_nodes", "route_on_node", "visit_once"]


@dataclass(frozen=True, eq=False)
class Visits:
    """What a rank sends to nodes.

    Args:
        departure: a row for each (token, node), by node and then by token; combined without weights.
        experts: int64 [rows, k], numbered within the node, in order of choice; -1 for choices elsewhere.
        weights: [rows, k], 0 for choices elsewhere, with gradients.
    """

    departure: Departure
    experts: Tensor
    weights: Tensor


def visit_once(routing: Routing, *, num_nodes: int) -> Visits:
    """What to send to each node.

    Args:
        routing: from any router.
        num_nodes: that the experts lie on in order, equally many on each.

    Raises:
        DispatchError: for experts that the nodes cannot share.

    >>> from meshwright.moe.top_k import TopK
    >>> routing = TopK(num_experts=4, k=3).route(torch.tensor([[3.0, 2.0, 1.0, 0.0]]))
    >>> found = visit_once(routing, num_nodes=2)
    >>> found.departure.tokens.tolist(), found.departure.counts.tolist(), found.experts.tolist()
    ([0, 0], [1, 1], [[0, 1, -1], [-1, -1, 0]])
    """
    if num_nodes < 1 or routing.num_experts % num_nodes:
        legal = [number for number in range(1, routing.num_experts + 1) if routing.num_experts % number == 0]
        raise DispatchError(
            f"{routing.num_experts} experts do not lie evenly on {num_nodes} nodes; choose from: "
            f"{', '.join(map(str, legal))}"
        )
    each = routing.num_experts // num_nodes
    nodes = routing.experts.div(each, rounding_mode="floor")
    there = torch.zeros(routing.num_tokens, num_nodes, dtype=torch.int64, device=nodes.device)
    there.scatter_add_(1, nodes, routing.kept.long())
    node, token = (there > 0).T.nonzero().unbind(1)
    places, counts = token * num_nodes + node, (there > 0).sum(0)
    departure = Departure(places=places, counts=counts, num_tokens=routing.num_tokens, slots=num_nodes)
    here = routing.kept[token] & (nodes[token] == node[:, None])
    experts = torch.where(here, routing.experts[token] - node[:, None] * each, -1)
    return Visits(departure, experts, torch.where(here, routing.weights[token], 0.0))


def route_on_node(experts: Tensor, weights: Tensor, *, num_experts: int) -> Routing:
    """The routing of rows that arrived on a node, among its experts.

    Args:
        experts: int64 [rows, k], as sent by `visit_once`.
        weights: [rows, k], likewise.
        num_experts: of the node.

    Raises:
        DispatchError: for experts that the node does not have.

    >>> route_on_node(torch.tensor([[1, -1]]), torch.tensor([[0.5, 0.0]]), num_experts=2).loads().tolist()
    [0, 1]
    """
    if experts.numel() and not -1 <= int(experts.min()) <= int(experts.max()) < num_experts:
        raise DispatchError(
            f"rows for experts {int(experts.min())} to {int(experts.max())} arrived on a node that has {num_experts}"
        )
    kept = experts >= 0
    return Routing(experts=experts.clamp_min(0), weights=weights, asked=kept, kept=kept, num_experts=num_experts)


def expected_nodes(*, num_experts: int, k: int, num_nodes: int) -> float:
    """Nodes that a token visits on average, if its k experts are any k.

    n (1 - C(E - E / n, k) / C(E, k)): one minus the chance that a node is not visited, for each node.

    >>> round(expected_nodes(num_experts=256, k=8, num_nodes=8), 4)
    5.2947
    """
    if num_nodes < 1 or num_experts % num_nodes or not 0 <= k <= num_experts:
        raise DispatchError(
            f"k={k} of {num_experts} experts on {num_nodes} nodes; use k from 0 to {num_experts}, and nodes that share "
            "them evenly"
        )
    missed = comb(num_experts - num_experts // num_nodes, k) / comb(num_experts, k)
    return num_nodes * (1 - missed)
