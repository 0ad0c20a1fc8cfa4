"""One hop and two hops, both orders: the same bits, on ranks that are items of lists."""

import re
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from meshwright.moe.bilevel import BiLevel
from meshwright.moe.capacity import Capacity
from meshwright.moe.dispatch import Departure, sort_choices
from meshwright.moe.errors import DispatchError
from meshwright.moe.journey import Hops, block_order, plan_journey
from meshwright.moe.routing import Routing
from meshwright.moe.top_k import TopK
from tests.moe.simulated import GRIDS, dense, exchanged, groups, plans, through_experts

HOPS: tuple[Hops, ...] = get_args(Hops)
TWO: tuple[Hops, ...] = ("inter_first", "intra_first")
SHARES = some.lists(some.integers(0, 9), min_size=8, max_size=8)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def routed(tokens: int, grid: tuple[int, int], *, each: int, seed: int) -> list[Routing]:
    """A flat and a bi-level routing, with drops and padding, for `each` experts on a rank."""
    nodes, local = grid
    num_experts, real = nodes * local * each, drawn(tokens, seed=seed) < 0.9
    flat = TopK(num_experts=num_experts, k=2, capacity=Capacity(factor=1.0))
    two = BiLevel(num_nodes=nodes, num_local=local * each, k_nodes=min(2, nodes))
    return [
        flat.route(drawn(tokens, num_experts, seed=seed), real=real),
        two.route(drawn(tokens, nodes, seed=seed), drawn(tokens, local * each, seed=seed + 1)),
    ]


def by_element(rows: Tensor, expert: int) -> Tensor:
    """An expert whose bits do not depend on what other rows it gets."""
    return (rows * (expert + 1)).tanh() + 0.1 * expert


def by_matrix(rows: Tensor, expert: int) -> Tensor:
    """An expert whose bits may depend on the other rows, and their order."""
    return (rows @ drawn(rows.shape[1], 33, seed=expert)) @ drawn(33, rows.shape[1], seed=-expert - 1)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("hops", HOPS)
@settings(max_examples=8)
@given(shares=SHARES, each=some.integers(1, 2), seed=some.integers(0, 2**30))
def test_every_way_gives_the_bits_of_the_dense_computation(
    grid: tuple[int, int], hops: Hops, shares: list[int], each: int, seed: int
) -> None:
    ranks = range(grid[0] * grid[1])
    tokens = [drawn(shares[rank], 5, seed=seed + rank) for rank in ranks]
    for kind in (0, 1):
        routings = [routed(shares[rank], grid, each=each, seed=seed + 100 * rank)[kind] for rank in ranks]
        found = through_experts(tokens, routings, plans(routings, grid[0], hops), by_element, grid[0])
        for rank in ranks:
            assert torch.equal(found[rank], dense(tokens[rank], routings[rank], by_element))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("hops", TWO)
@settings(max_examples=5)
@given(shares=SHARES, seed=some.integers(0, 2**30))
def test_two_hops_give_the_bits_of_one_for_matrices_and_their_gradients(
    grid: tuple[int, int], hops: Hops, shares: list[int], seed: int
) -> None:
    ranks = range(grid[0] * grid[1])
    routings = [routed(shares[rank], grid, each=2, seed=seed + 100 * rank)[0] for rank in ranks]
    results = []
    for way in ("one", hops):
        tokens = [drawn(shares[rank], 5, seed=seed + rank).requires_grad_() for rank in ranks]
        found = torch.cat(through_experts(tokens, routings, plans(routings, grid[0], way), by_matrix, grid[0]))
        results.append((found, *torch.autograd.grad(found.square().sum(), tokens)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("grid", [(2, 2), (2, 3), (4, 8), (3, 1), (1, 4)])
@pytest.mark.parametrize("hops", HOPS)
def test_each_block_arrives_where_it_is_meant_for(grid: tuple[int, int], hops: Hops) -> None:
    ranks = grid[0] * grid[1]
    counts = torch.ones(ranks, ranks, dtype=torch.int64)
    leaving = Departure(places=torch.arange(ranks), counts=counts[0], num_tokens=ranks, slots=1)
    journeys = [plan_journey(leaving, counts, rank=rank, num_nodes=grid[0], hops=hops) for rank in range(ranks)]
    # each row is (source, destination)
    rows = [torch.stack([torch.full((ranks,), rank), journeys[rank].departure.places], 1) for rank in range(ranks)]
    for leg in zip(*(journey.hops for journey in journeys), strict=True):
        peers = groups(leg[0].axis, *grid)
        rows = exchanged(rows, [hop.sent for hop in leg], [hop.received for hop in leg], peers)
        rows = [hop.ordered(each) for hop, each in zip(leg, rows, strict=True)]
    for rank in range(ranks):
        assert rows[rank].tolist() == [[source, rank] for source in range(ranks)]


@pytest.mark.parametrize("grid", [(2, 4), (4, 2), (2, 3)])
@pytest.mark.parametrize("hops", TWO)
def test_messages_are_fewer_and_as_many_rows_cross_between_nodes(grid: tuple[int, int], hops: Hops) -> None:
    nodes, local = grid
    routings = [routed(40, grid, each=1, seed=rank)[0] for rank in range(nodes * local)]
    for rank, (one, two) in enumerate(zip(plans(routings, nodes, "one"), plans(routings, nodes, hops), strict=True)):
        assert len(one.hops[0].message_sizes(rank)) == nodes * local - 1
        place = {"ep_node": rank // local, "ep_local": rank % local}
        sizes = {hop.axis: hop.message_sizes(place[hop.axis]) for hop in two.hops}  # type: ignore[index]
        assert len(sizes["ep_node"]) + len(sizes["ep_local"]) == nodes + local - 2
    away = torch.stack([routing.loads() for routing in routings]).view(nodes, local, nodes, -1)
    crossing = int(away.sum()) - sum(int(away[node, :, node].sum()) for node in range(nodes))
    sent = 0
    for rank, journey in enumerate(plans(routings, nodes, hops)):
        sent += sum(sum(hop.message_sizes(rank // local)) for hop in journey.hops if hop.axis == "ep_node")
    assert sent == crossing


def test_one_node_or_one_rank_on_each_is_one_hop_and_one_rank_none() -> None:
    for ranks, num_nodes in ((4, 1), (4, 4)):
        counts = torch.ones(ranks, ranks, dtype=torch.int64)
        leaving = Departure(places=torch.arange(ranks), counts=counts[0], num_tokens=ranks, slots=1)
        for hops in HOPS:
            journey = plan_journey(leaving, counts, rank=1, num_nodes=num_nodes, hops=hops)
            assert [hop.axis for hop in journey.hops] == ["ep"]
    alone = Departure(places=torch.arange(3), counts=torch.tensor([1, 2]), num_tokens=3, slots=1)
    journey = plan_journey(alone, alone.counts[None], rank=0, hops="inter_first")
    assert journey.hops == ()
    assert journey.counts.tolist() == [1, 2]


@pytest.mark.parametrize("hops", HOPS)
def test_all_tokens_to_one_expert_and_ranks_without_tokens_are_ordinary(hops: Hops) -> None:
    tokens = [drawn(number, 3, seed=number) for number in (0, 7, 0, 2)]
    logits = [torch.eye(4, dtype=torch.float64)[3].repeat(len(each), 1) for each in tokens]
    routings = [TopK(num_experts=4, k=1).route(each) for each in logits]
    journeys = plans(routings, 2, hops)
    assert [journey.counts.tolist() for journey in journeys] == [[0], [0], [0], [9]]
    found = through_experts(tokens, routings, journeys, by_element, 2)
    for own, routing, made in zip(tokens, routings, found, strict=True):
        assert torch.equal(made, dense(own, routing, by_element))


@given(some.lists(some.integers(0, 3), min_size=24, max_size=24), some.permutations([0, 1, 2]))
def test_blocks_are_turned_as_a_tensor_of_them_is(sizes: list[int], dims: Any) -> None:
    blocks = torch.tensor(sizes).view(2, 3, 4)
    ends = blocks.flatten().cumsum(0).view_as(blocks)
    expected: list[int] = []
    for end, size in zip(ends.permute(*dims).flatten().tolist(), blocks.permute(*dims).flatten().tolist(), strict=True):
        expected += range(end - size, end)
    assert block_order(blocks, tuple(dims)).tolist() == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"counts": torch.ones(4, 6, dtype=torch.int64)},
            "6 experts do not lie evenly on ep=4 ranks; choose ep from: 1, 2",
        ),
        ({"num_nodes": 3}, "ep=4 ranks do not lie evenly on 3 nodes; choose ep_node from: 1, 2, 4"),
        ({"num_nodes": 0}, "ep=4 ranks do not lie evenly on 0 nodes"),
        ({"rank": 4}, "rank 4 of ep=4; use 0 to 3"),
        ({"hops": "inter"}, "no journey has hops 'inter'; did you mean 'inter_first'?"),
        ({"counts": torch.zeros(4, 4, dtype=torch.int64)}, "rank 0 leaves with [1, 1, 1, 1] rows for experts, and the"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], words: str) -> None:
    counts = torch.ones(4, 4, dtype=torch.int64)
    leaving = Departure(places=torch.arange(4), counts=counts[0], num_tokens=4, slots=1)
    with pytest.raises(DispatchError, match=re.escape(words)):
        plan_journey(leaving, **{"counts": counts, "rank": 0, "num_nodes": 2, **options})


def test_a_journey_is_printed() -> None:
    routings = [routed(4, (2, 2), each=1, seed=rank)[1] for rank in range(4)]
    text = str(plans(routings, 2, "inter_first")[0])
    assert re.fullmatch(r"8 rows; ep_node sends \[.*\]; ep_local sends .*; experts get \[\d+\]", text)
    assert sort_choices(routings[0]).num_rows == 8
