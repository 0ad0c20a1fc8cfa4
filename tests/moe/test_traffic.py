"""Rows and bytes of hops: by hand, as journeys plan them, and as transports were seen to send them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from meshwright.moe.dispatch import sort_choices
from meshwright.moe.errors import MetricsError
from meshwright.moe.journey import Hop, Hops
from meshwright.moe.once import visit_once
from meshwright.moe.routing import Routing
from meshwright.moe.top_k import TopK
from meshwright.moe.traffic import HopTraffic, traffic, traffic_once
from tests.moe.simulated import GRIDS, groups, plans
from tests.moe.traffic import GRID, choices, rows_between, visits_between

SIZES = torch.tensor([[1, 2, 4, 8], [16, 32, 64, 128], [256, 512, 1024, 2048], [4096, 8192, 16384, 32768]])
"""Rows between 4 ranks with an expert each: every sum tells what is in it."""


def routings(grid: tuple[int, int], shares: list[int], seed: int) -> list[Routing]:
    generator = torch.Generator().manual_seed(seed)
    router = TopK(num_experts=2 * grid[0] * grid[1], k=2)
    return [router.route(torch.randn(share, router.num_experts, generator=generator)) for share in shares]


def counts_of(all_routings: list[Routing]) -> Tensor:
    return torch.stack([sort_choices(each).counts for each in all_routings])


def visits_of(all_routings: list[Routing], num_nodes: int) -> Tensor:
    return torch.stack([visit_once(each, num_nodes=num_nodes).departure.counts for each in all_routings])


def moved(hops: tuple[HopTraffic, ...]) -> list[tuple[str, int, int, int]]:
    return [(hop.axis, hop.rows_between_nodes, hop.rows_within_nodes, hop.rows_staying) for hop in hops]


def test_numbers_worked_out_by_hand() -> None:
    between = 4 + 8 + 64 + 128 + 256 + 512 + 4096 + 8192
    one = traffic(SIZES, row_bytes=10, num_nodes=2)
    assert moved(one) == [("ep", between, 2 + 16 + 2048 + 16384, 1 + 32 + 1024 + 32768)]
    assert (one[0].bytes_between_nodes, one[0].bytes_within_nodes) == (10 * between, 10 * (2 + 16 + 2048 + 16384))
    inter = ("ep_node", between, 0, 65535 - between)
    other_place = 2 + 8 + 16 + 64 + 512 + 2048 + 4096 + 16384
    intra = ("ep_local", 0, other_place, 65535 - other_place)
    assert moved(traffic(SIZES, row_bytes=10, num_nodes=2, hops="inter_first")) == [inter, intra]
    assert moved(traffic(SIZES, row_bytes=10, num_nodes=2, hops="intra_first")) == [intra, inter]


@pytest.mark.parametrize("hops", ["one", "inter_first", "intra_first"])
def test_one_node_or_one_rank_on_each_takes_one_hop(hops: Hops) -> None:
    diagonal = 1 + 32 + 1024 + 32768
    assert moved(traffic(SIZES, row_bytes=1, num_nodes=1, hops=hops)) == [("ep", 0, 65535 - diagonal, diagonal)]
    assert moved(traffic(SIZES, row_bytes=1, num_nodes=4, hops=hops)) == [("ep", 65535 - diagonal, 0, diagonal)]
    assert traffic(torch.tensor([[5, 6]]), row_bytes=1, hops=hops) == ()


def test_tokens_that_travel_once() -> None:
    visits = torch.tensor([[1, 2], [4, 8], [16, 32], [64, 128]])
    inter, intra = traffic_once(SIZES, visits, row_bytes=10, visit_bytes=16)
    assert moved((inter,)) == [("ep_node", 2 + 8 + 16 + 64, 0, 255 - 90)]
    assert (inter.bytes_between_nodes, inter.bytes_within_nodes) == (16 * 90, 0)
    assert intra == traffic(SIZES, row_bytes=10, num_nodes=2, hops="inter_first")[1]
    assert traffic_once(SIZES, visits, row_bytes=10)[0].bytes_between_nodes == 900


def test_tokens_that_travel_once_over_one_node_or_one_rank_on_each() -> None:
    assert traffic_once(SIZES, torch.ones(4, 1, dtype=torch.int64), row_bytes=1) == traffic(SIZES, row_bytes=1)
    (only,) = traffic_once(SIZES, torch.tensor([[1, 1, 1, 1]] * 4), row_bytes=1)
    assert moved((only,)) == [("ep_node", 12, 0, 4)]
    assert traffic_once(torch.tensor([[5, 6]]), torch.tensor([[5]]), row_bytes=1) == ()


def apart(hop: Hop, axis_ranks: list[int], rank: int, local: int) -> tuple[int, int]:
    """Rows of a hop that a rank sends to other nodes, and to others of its own."""
    pairs = [(rows, to) for rows, to in zip(hop.sent, axis_ranks, strict=True) if to != rank]
    between = sum(rows for rows, to in pairs if to // local != rank // local)
    return between, sum(rows for rows, _ in pairs) - between


@pytest.mark.parametrize("grid", GRIDS)
@settings(max_examples=6)
@given(shares=some.lists(some.integers(0, 9), min_size=8, max_size=8), seed=some.integers(0, 2**30))
def test_it_is_what_journeys_send(grid: tuple[int, int], shares: list[int], seed: int) -> None:
    found = routings(grid, shares[: grid[0] * grid[1]], seed)
    kinds: tuple[Hops, ...] = ("one", "inter_first", "intra_first")
    for hops in kinds:
        journeys = plans(found, grid[0], hops)
        for at, hop in enumerate(traffic(counts_of(found), row_bytes=1, num_nodes=grid[0], hops=hops)):
            legs = [journey.hops[at] for journey in journeys]
            peers = {rank: group for group in groups(legs[0].axis, *grid) for rank in group}
            sent = [apart(leg, peers[rank], rank, grid[1]) for rank, leg in enumerate(legs)]
            assert hop.axis == legs[0].axis
            assert (hop.rows_between_nodes, hop.rows_within_nodes) == tuple(map(sum, zip(*sent, strict=True)))
            assert hop.rows_staying == sum(sum(leg.sent) for leg in legs) - sum(map(sum, sent))


@pytest.mark.parametrize("grid", GRIDS)
@settings(max_examples=6)
@given(shares=some.lists(some.integers(0, 9), min_size=8, max_size=8), seed=some.integers(0, 2**30))
def test_micro_batches_add_up_and_travelling_once_never_sends_more(
    grid: tuple[int, int], shares: list[int], seed: int
) -> None:
    batches = [routings(grid, shares[: grid[0] * grid[1]], each) for each in (seed, seed + 1)]
    counts, visits = [counts_of(each) for each in batches], [visits_of(each, grid[0]) for each in batches]
    whole = traffic_once(counts[0] + counts[1], visits[0] + visits[1], row_bytes=8)
    parts = [traffic_once(*pair, row_bytes=8) for pair in zip(counts, visits, strict=True)]
    for hop, *each in zip(whole, *parts, strict=True):
        assert hop.as_dict() == {name: sum(part.as_dict()[name] for part in each) for name in hop.as_dict()}
    plain = traffic(counts[0] + counts[1], row_bytes=8, num_nodes=grid[0], hops="inter_first")
    assert whole[0].bytes_between_nodes <= plain[0].bytes_between_nodes


def test_it_is_what_transports_were_seen_to_send() -> None:
    rows, visits = rows_between(), visits_between()
    other_node = int(rows[0, :, 1].sum() + rows[1, :, 0].sum())
    other_place = int(rows[:, 0, :, 1].sum() + rows[:, 1, :, 0].sum())
    two = traffic(choices(), row_bytes=8, num_nodes=GRID[0], hops="inter_first")
    assert (two[0].rows_between_nodes, two[1].rows_within_nodes) == (other_node, other_place)
    once = traffic_once(choices(), visits.view(-1, GRID[0]), row_bytes=8)
    assert once[0].rows_between_nodes == int(visits[0, :, 1].sum() + visits[1, :, 0].sum()) < other_node
    assert once[1].rows_within_nodes == other_place


def test_no_rows_are_no_bytes() -> None:
    (hop,) = traffic(torch.zeros(2, 4, dtype=torch.int64), row_bytes=8)
    assert set(hop.as_dict().values()) == {0}


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(MetricsError, match="6 experts do not lie evenly on ep=4 ranks"):
        traffic(torch.zeros(4, 6, dtype=torch.int64), row_bytes=1)
    with pytest.raises(MetricsError, match="ep=4 ranks do not lie evenly on 3 nodes; choose ep_node from: 1, 2, 4"):
        traffic(SIZES, row_bytes=1, num_nodes=3)
    with pytest.raises(MetricsError, match="no journey has hops 'inter'; "):
        traffic(SIZES, row_bytes=1, hops="inter")  # type: ignore[arg-type]
    with pytest.raises(MetricsError, match="visits of 2 ranks and counts of 4; gather both over all of `ep`"):
        traffic_once(SIZES, torch.ones(2, 2, dtype=torch.int64), row_bytes=1)
