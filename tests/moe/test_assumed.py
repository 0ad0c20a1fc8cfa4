"""Where tokens go when no values say so."""

import pytest
import torch

from meshwright.moe.assumed import as_sent, even_choices, has_values, with_values
from meshwright.moe.bilevel import BiLevel
from meshwright.moe.capacity import Capacity
from meshwright.moe.once import expected_nodes
from meshwright.moe.routing import first_largest
from meshwright.moe.swap import read_routing
from meshwright.moe.top_k import TopK
from meshwright.parallel.traced_kernels import shapes_only


@pytest.mark.parametrize(("rows", "k", "places"), [(64, 2, 8), (7, 3, 5), (33, 1, 4), (10, 6, 8), (0, 2, 4), (5, 4, 4)])
def test_loads_differ_by_at_most_one_and_no_token_has_a_place_twice(rows: int, k: int, places: int) -> None:
    chosen = even_choices(rows, k, places)
    assert chosen.shape == (rows, k)
    loads = chosen.flatten().bincount(minlength=places)
    assert int(loads.max() - loads.min()) <= 1
    assert all(len(set(row)) == k for row in chosen.tolist())


def test_tokens_visit_as_many_nodes_as_any_experts_lie_on() -> None:
    chosen = even_choices(4096, 8, 256)
    visited = sum(len({expert // 32 for expert in row}) for row in chosen.tolist()) / len(chosen)
    assert visited == pytest.approx(expected_nodes(num_experts=256, k=8, num_nodes=8), rel=0.01)


@pytest.mark.parametrize(("n", "m", "k_nodes", "k_local"), [(2, 2, 1, 1), (4, 8, 2, 3), (3, 4, 3, 1), (2, 4, 1, 2)])
def test_both_levels_of_a_router_choose_evenly(n: int, m: int, k_nodes: int, k_local: int) -> None:
    router = BiLevel(num_nodes=n, num_local=m, k_nodes=k_nodes, k_local=k_local)
    rows = n * m * 5
    with shapes_only():
        logits = torch.empty(rows, n), torch.empty(rows, m)
        with with_values():
            routing = router.route(*logits)
    assert has_values(routing.experts)
    assert not has_values(routing.weights)
    assert routing.loads().tolist() == [rows * k_nodes * k_local // (n * m)] * (n * m)
    nodes = routing.experts.view(rows, k_nodes, k_local) // m
    assert bool((nodes == nodes[..., :1]).all())
    assert all(len(set(row)) == k_nodes for row in nodes[..., 0].tolist())


@pytest.mark.parametrize("order", ["position", "score"])
def test_capacity_drops_what_it_drops_of_even_choices(order: str) -> None:
    router = TopK(num_experts=4, k=2, capacity=Capacity(factor=0.75, order=order))  # type: ignore[arg-type]
    with shapes_only():
        logits = torch.empty(32, 4)
        with with_values():
            routing = router.route(logits)
    assert routing.loads().tolist() == [12] * 4
    assert int(routing.drops()) == 16


@pytest.mark.parametrize("marked", [False, True])
def test_what_a_models_own_router_gives_is_read_as_even_choices_which_are_all_sent(marked: bool) -> None:
    with shapes_only():
        index = torch.empty(16, 2, 8, dtype=torch.int64) if marked else torch.empty(16, 2, dtype=torch.int64)
        routing = read_routing(index, torch.empty(16, 2), num_experts=8)
    assert routing.loads().tolist() == [4] * 8
    assert bool(routing.kept.all())


def test_scores_that_have_values_are_looked_at() -> None:
    assert first_largest(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), 1).tolist() == [[1], [1]]
    index = torch.tensor([[3], [3]])
    assert read_routing(index, torch.ones(2, 1), num_experts=4).experts.tolist() == [[3], [3]]


def test_an_exchange_without_values_brings_from_each_rank_what_this_one_sends_to_itself() -> None:
    sent = torch.tensor([[1], [2], [3], [4]])
    assert as_sent(torch.empty(6, 1, device="meta"), sent, [1, 2, 1], rank=1).flatten().tolist() == [2, 3] * 3
    arrived = torch.tensor([[9]])
    assert as_sent(arrived, sent, [1, 3], rank=0) is arrived
    hidden = torch.empty(2, 1, device="meta")
    assert as_sent(hidden, torch.empty(4, 1, device="meta"), [2, 2], rank=0) is hidden
