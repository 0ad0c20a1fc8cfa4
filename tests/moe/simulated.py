"""Ranks as items of lists: exchanges without processes, and what one process would compute."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from meshwright.moe.capacity import Peers
from meshwright.moe.dispatch import combine, depart, sort_choices
from meshwright.moe.journey import Hops, Journey, plan_journey
from meshwright.moe.once import route_on_node, visit_once
from meshwright.moe.routing import Routing

__all__ = ["GRIDS", "dense", "exchanged", "groups", "plans", "through_experts", "visiting_once", "with_peers"]

GRIDS = [(1, 4), (4, 1), (2, 2), (2, 4), (4, 2), (2, 3)]
"""Nodes and ranks on each."""

Experts = Callable[[Tensor, int], Tensor]
"""Rows of one expert -> what it makes of them."""


def groups(axis: str, num_nodes: int, local: int) -> list[list[int]]:
    """The ranks that exchange along an axis."""
    ranks = torch.arange(num_nodes * local).view(num_nodes, local)
    found = {"ep": ranks.view(1, -1), "ep_node": ranks.T, "ep_local": ranks}[axis]
    return found.tolist()


def exchanged(
    rows: Sequence[Tensor], sent: Sequence[Sequence[int]], received: Sequence[Sequence[int]], peers: list[list[int]]
) -> list[Tensor]:
    """An all-to-all with splits inside of each group; whoever expects other rows than are sent is caught."""
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    cut = [each.split(list(splits)) for each, splits in zip(rows, sent, strict=True)]
    for group in peers:
        for place, rank in enumerate(group):
            assert list(received[rank]) == [len(cut[other][place]) for other in group]
            found[rank] = torch.cat([cut[other][place] for other in group])
    return found


def plans(routings: Sequence[Routing], num_nodes: int, hops: Hops) -> list[Journey]:
    """The journeys of all ranks."""
    leaving = [sort_choices(routing) for routing in routings]
    counts = torch.stack([each.counts for each in leaving])
    return [plan_journey(each, counts, rank=rank, num_nodes=num_nodes, hops=hops) for rank, each in enumerate(leaving)]


def through_experts(
    tokens: Sequence[Tensor], routings: Sequence[Routing], journeys: Sequence[Journey], experts: Experts, num_nodes: int
) -> list[Tensor]:
    """Dispatch, experts and combine on all ranks."""
    rows = [depart(each, journey.departure) for each, journey in zip(tokens, journeys, strict=True)]
    local = len(journeys) // num_nodes
    legs = list(zip(*(journey.hops for journey in journeys), strict=True))
    for leg in legs:
        peers = groups(leg[0].axis, num_nodes, local)
        rows = exchanged(rows, [hop.sent for hop in leg], [hop.received for hop in leg], peers)
        rows = [hop.ordered(each) for hop, each in zip(leg, rows, strict=True)]
    rows = [
        _computed(each, journey, rank, experts) for rank, (each, journey) in enumerate(zip(rows, journeys, strict=True))
    ]
    for leg in reversed(legs):
        rows = [hop.restored(each) for hop, each in zip(leg, rows, strict=True)]
        peers = groups(leg[0].axis, num_nodes, local)
        rows = exchanged(rows, [hop.received for hop in leg], [hop.sent for hop in leg], peers)
    return [
        combine(each, journey.departure, routing.weights)
        for each, journey, routing in zip(rows, journeys, routings, strict=True)
    ]


def _computed(rows: Tensor, journey: Journey, rank: int, experts: Experts) -> Tensor:
    own = len(journey.counts)
    parts = rows.split(journey.counts.tolist())
    return torch.cat([experts(part, rank * own + at) for at, part in enumerate(parts)])


def visiting_once(
    tokens: Sequence[Tensor], routings: Sequence[Routing], experts: Experts, num_nodes: int
) -> list[Tensor]:
    """Dispatch, experts and combine on all ranks, each token once to each node."""
    ranks, each = len(routings), routings[0].num_experts // num_nodes
    local, visits = ranks // num_nodes, [visit_once(routing, num_nodes=num_nodes) for routing in routings]
    sent = [visit.departure.counts.tolist() for visit in visits]
    received = [
        [sent[node * local + rank % local][rank // local] for node in range(num_nodes)] for rank in range(ranks)
    ]
    peers = groups("ep_node", num_nodes, local)

    def to_nodes(parts: Sequence[Tensor]) -> list[Tensor]:
        return exchanged(parts, sent, received, peers)

    rows = to_nodes([depart(own, visit.departure) for own, visit in zip(tokens, visits, strict=True)])
    chosen, weights = to_nodes([v.experts for v in visits]), to_nodes([v.weights for v in visits])
    made: list[Tensor] = []
    for node in range(num_nodes):
        here = range(node * local, (node + 1) * local)
        inside = [route_on_node(chosen[rank], weights[rank], num_experts=each) for rank in here]

        def of_node(part: Tensor, expert: int, first: int = node * each) -> Tensor:
            return experts(part, first + expert)

        made += through_experts([rows[rank] for rank in here], inside, plans(inside, 1, "one"), of_node, 1)
    home = exchanged(made, received, sent, peers)
    return [combine(each, visit.departure) for each, visit in zip(home, visits, strict=True)]


def dense(tokens: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """Every token through each of its experts alone, added in the order of its choices."""
    total = torch.zeros_like(tokens)
    for choice in range(routing.k):
        made = [
            experts(each[None], int(expert))[0] for each, expert in zip(tokens, routing.experts[:, choice], strict=True)
        ]
        part = torch.stack(made) if made else tokens
        total = total + torch.where(routing.kept[:, choice, None], part, 0.0) * routing.weights[:, choice, None]
    return total


def with_peers(number: int, work: Callable[[Peers], Any]) -> list[Any]:
    """What each of some ranks makes of `work`, on threads that gather from each other."""
    barrier = threading.Barrier(number)
    given: list[Tensor] = [torch.empty(0)] * number

    def gather(rank: int, own: Tensor) -> Tensor:
        barrier.wait()  # all have read what was gathered before
        given[rank] = own
        barrier.wait()
        return torch.stack(given)

    with ThreadPoolExecutor(number) as threads:
        return list(threads.map(lambda rank: work(Peers(rank, partial(gather, rank))), range(number)))
