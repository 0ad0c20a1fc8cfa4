"""Exchanges on paper count what the real transports count, and times follow from the counts."""

from dataclasses import replace

import pytest
import torch

from benchmarks.smile import Case, report, ways
from meshwright.clusters.hardware import gpu
from meshwright.clusters.simulated import Cluster, Engine, Layout, Training
from meshwright.clusters.simulated.congestion import fabric
from meshwright.clusters.simulated.experts import Exchange, Way, exchange_of, exchange_s, visited_nodes
from meshwright.moe.capacity import Capacity
from meshwright.moe.dispatch import Departure
from meshwright.moe.journey import Hops, plan_journey
from meshwright.moe.once import expected_nodes, visit_once
from meshwright.moe.routing import Routing
from meshwright.moe.traffic import traffic, traffic_once
from tests.clusters.simulated.settings import LLAMA_405B

MESHES = [(1, 1), (1, 4), (4, 1), (2, 2), (2, 3), (3, 4), (4, 2)]
ROW_BYTES = 12
HOPS: dict[Way, Hops] = {"one_hop": "one", "two_hops": "inter_first"}


def even(nodes: int, local: int, *, experts_each: int = 2, rows: int = 5) -> tuple[Exchange, torch.Tensor]:
    """An exchange and the counts of the same routing: `rows` of each rank for each expert."""
    ranks = nodes * local
    experts = ranks * experts_each
    found = Exchange(tokens=rows * experts, row_bytes=ROW_BYTES, experts=experts, nodes=nodes, per_node=local)
    return found, torch.full((ranks, experts), rows)


@pytest.mark.parametrize("way", HOPS)
@pytest.mark.parametrize(("nodes", "local"), MESHES)
def test_bytes_of_all_ranks_are_those_that_moe_counts(nodes: int, local: int, way: Way) -> None:
    exchange, counts = even(nodes, local)
    real = traffic(counts, row_bytes=ROW_BYTES, num_nodes=nodes, hops=HOPS[way])
    paper = replace(exchange, way=way).hops
    assert [hop.axis for hop in paper] == [hop.axis for hop in real]
    for mine, theirs in zip(paper, real, strict=True):
        assert mine.bytes_away * len(counts) == theirs.bytes_between_nodes
        assert mine.bytes_within * len(counts) == theirs.bytes_within_nodes


@pytest.mark.parametrize("way", HOPS)
@pytest.mark.parametrize(("nodes", "local"), MESHES)
def test_messages_of_a_rank_are_those_of_its_journey(nodes: int, local: int, way: Way) -> None:
    exchange, counts = even(nodes, local)
    for rank in range(len(counts)):
        own = counts[rank]
        places = torch.arange(int(own.sum()))
        departure = Departure(places=places, counts=own, num_tokens=len(places), slots=1)
        journey = plan_journey(departure, counts, rank=rank, num_nodes=nodes, hops=HOPS[way])
        real = [len(hop.sent) - 1 for hop in journey.hops]
        paper = replace(exchange, way=way).hops
        assert [hop.messages_away + hop.messages_within for hop in paper] == real


@pytest.mark.parametrize(("nodes", "local"), [(1, 4), (2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("node_choices", [1, 2])
def test_tokens_that_travel_once_to_chosen_nodes_are_counted_as_moe_does(
    nodes: int, local: int, node_choices: int
) -> None:
    """Every token goes to one expert on each local rank of its nodes; tokens take all sets of neighbouring nodes."""
    node_choices = min(node_choices, nodes)
    ranks, tokens = nodes * local, 3 * nodes
    first = torch.arange(tokens)[:, None, None] + torch.arange(node_choices)[None, :, None]
    experts = (first % nodes * local + torch.arange(local)[None, None, :]).flatten(1)
    ones = torch.ones_like(experts, dtype=torch.bool)
    routing = Routing(experts=experts, weights=ones.double(), asked=ones, kept=ones, num_experts=ranks)
    counts = torch.bincount(experts.flatten(), minlength=ranks).repeat(ranks, 1)
    visits = visit_once(routing, num_nodes=nodes).departure.counts.repeat(ranks, 1)
    top_k = local * node_choices
    kept = {"nodes": nodes, "per_node": local, "top_k": top_k, "node_choices": node_choices}
    paper = Exchange(tokens=tokens, row_bytes=ROW_BYTES, experts=ranks, way="once", **kept)
    real = traffic_once(counts, visits, row_bytes=ROW_BYTES)
    assert [hop.axis for hop in paper.hops] == [hop.axis for hop in real]
    for mine, theirs in zip(paper.hops, real, strict=True):
        assert mine.bytes_away * ranks == theirs.bytes_between_nodes
        assert mine.bytes_within * ranks == theirs.bytes_within_nodes


@pytest.mark.parametrize(("experts", "k", "nodes"), [(256, 8, 8), (64, 6, 4), (8, 1, 2), (16, 16, 4)])
def test_nodes_that_a_token_visits_are_those_of_moe(experts: int, k: int, nodes: int) -> None:
    assert visited_nodes(experts=experts, top_k=k, nodes=nodes) == expected_nodes(
        num_experts=experts, k=k, num_nodes=nodes
    )


@pytest.mark.parametrize("factor", [1.0, 1.25, 2.0])
def test_slots_travel_filled_or_not(factor: float) -> None:
    exchange = Exchange(tokens=100, row_bytes=1, experts=12, nodes=2, per_node=3, top_k=2, capacity=factor)
    slots = Capacity(factor=factor).slots(num_choices=200, num_experts=12)
    (hop,) = exchange.hops
    assert (hop.bytes_away, hop.bytes_within) == (slots * 6, slots * 4)
    between, within = replace(exchange, way="two_hops").hops
    assert between.bytes_away == Capacity(factor=factor).slots(num_choices=200, num_experts=2)
    assert within.bytes_within == 2 * Capacity(factor=factor).slots(num_choices=200, num_experts=3)


def test_two_hops_move_as_much_between_nodes_in_fewer_messages() -> None:
    flat, levels = (Case().exchange(bilevel=each).hops for each in (False, True))
    assert flat[0].bytes_away == levels[0].bytes_away
    assert (flat[0].messages_away, levels[0].messages_away) == (120, 15)


def test_without_a_price_on_messages_two_hops_gain_nothing_and_with_it_they_gain_by_nodes() -> None:
    found = report()
    assert found["predicted_speed_up_16_nodes_without"] <= 1 < found["predicted_speed_up_16_nodes"]
    by_nodes = [each["speed_up"] for each in found["by_nodes"]]
    assert by_nodes[0] == 1
    assert by_nodes == sorted(by_nodes)
    prices = [sum(Case().exchanges_s(ways(each), bilevel=False)) for each in (0, 0.5, 1, 2)]
    assert prices == sorted(prices)


def sparse(num_gpus: int = 64, fabric: str = "efa", engine: Engine | None = None, **layout: int) -> Training:
    """A mixture of 64 experts on nodes of eight A100s."""
    model = replace(LLAMA_405B, hidden=4096, heads=32, ffn=2048, experts=64, top_k=8)
    dealt = Layout(dp=num_gpus // layout.get("tp", 1), global_batch=num_gpus, **layout)
    cluster = Cluster(gpu=gpu("A100"), num_gpus=num_gpus, fabric=fabric)
    return Training(model=model, layout=dealt, cluster=cluster, engine=engine or Engine())


def test_a_training_exchanges_over_the_nodes_that_its_ranks_of_ep_are_on() -> None:
    found = exchange_of(sparse(ep=32))
    assert found is not None
    assert (found.nodes, found.per_node, found.tokens, found.way) == (4, 8, 8192, "once")
    shared = exchange_of(sparse(ep=16, tp=2))
    assert shared is not None
    assert (shared.nodes, shared.per_node, shared.tokens) == (4, 4, 4096)
    assert exchange_of(sparse()) is None
    assert exchange_s(sparse()) == 0


def test_ranks_that_fill_no_nodes_and_experts_that_do_not_divide_are_rounded() -> None:
    uneven = exchange_of(sparse(num_gpus=36, ep=12))
    assert uneven is not None
    assert (uneven.nodes, uneven.per_node, uneven.experts) == (2, 6, 72)


def test_a_token_of_many_experts_travels_once_and_a_bilevel_router_sends_it_to_fewer_nodes() -> None:
    copied, bilevel = Engine(once_per_node=False), Engine(bilevel_nodes=1)
    hops = [exchange_of(sparse(ep=32, engine=each)) for each in (copied, Engine(), bilevel)]
    away = [each.hops[0].bytes_away for each in hops if each is not None]
    assert away[1] / away[0] == visited_nodes(experts=64, top_k=8, nodes=4) / 8
    assert away[2] / away[0] == 1 / 8
    seconds = [exchange_s(sparse(ep=32, engine=each)) for each in (copied, Engine(), bilevel)]
    assert seconds == sorted(seconds, reverse=True)


def test_congestion_is_asked_for_or_not() -> None:
    copied = sparse(ep=64, engine=Engine(once_per_node=False))
    seconds = [exchange_s(copied, congestion=each) for each in (0.0, 1.0, 2.0)]
    assert seconds[2] - seconds[1] == pytest.approx(seconds[1] - seconds[0])
    assert seconds[1] - seconds[0] == pytest.approx(56 * fabric("efa").message_s)
    assert exchange_s(sparse(ep=64, fabric="rdma")) < exchange_s(sparse(ep=64))


def test_experts_that_ranks_cannot_share_and_choices_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="7 experts do not lie evenly on 2 nodes of 2 ranks"):
        Exchange(tokens=1, row_bytes=1, experts=7, nodes=2, per_node=2)
    with pytest.raises(ValueError, match="5 of 4 experts"):
        Exchange(tokens=1, row_bytes=1, experts=4, nodes=2, per_node=2, top_k=5)
    with pytest.raises(ValueError, match="on 3 of 2 nodes"):
        Exchange(tokens=1, row_bytes=1, experts=4, nodes=2, per_node=2, node_choices=3)
