"""Tokens that are sent once to each node."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from meshwright.moe.bilevel import BiLevel
from meshwright.moe.capacity import Capacity
from meshwright.moe.errors import DispatchError
from meshwright.moe.once import expected_nodes, route_on_node, visit_once
from meshwright.moe.top_k import TopK
from tests.moe.simulated import GRIDS, dense, visiting_once

SHARES = some.lists(some.integers(0, 9), min_size=8, max_size=8)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_element(rows: Tensor, expert: int) -> Tensor:
    return (rows * (expert + 1)).tanh() + 0.1 * expert


@pytest.mark.parametrize("grid", GRIDS)
@settings(max_examples=8)
@given(shares=SHARES, seed=some.integers(0, 2**30))
def test_the_result_and_its_gradients_are_those_of_the_dense_computation(
    grid: tuple[int, int], shares: list[int], seed: int
) -> None:
    ranks, num_experts = range(grid[0] * grid[1]), 2 * grid[0] * grid[1]
    router = TopK(num_experts=num_experts, k=4, capacity=Capacity(factor=1.0))
    results = []
    for plain in (False, True):
        tokens = [drawn(shares[rank], 5, seed=seed + rank).requires_grad_() for rank in ranks]
        logits = [drawn(shares[rank], num_experts, seed=seed - rank).requires_grad_() for rank in ranks]
        real = [drawn(shares[rank], seed=seed + 9 * rank) < 1.0 for rank in ranks]
        routings = [router.route(own, real=mask) for own, mask in zip(logits, real, strict=True)]
        if plain:
            made = [dense(own, routing, by_element) for own, routing in zip(tokens, routings, strict=True)]
        else:
            made = visiting_once(tokens, routings, by_element, grid[0])
        found = torch.cat(made)
        results.append((found, *torch.autograd.grad(found.square().sum(), [*tokens, *logits], allow_unused=True)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@given(some.integers(0, 20), some.integers(1, 4), some.integers(1, 4), some.integers(1, 6), some.integers(0, 2**30))
def test_a_row_for_each_token_and_node_it_visits(tokens: int, nodes: int, each: int, k: int, seed: int) -> None:
    router = TopK(num_experts=nodes * each, k=min(k, nodes * each), capacity=Capacity(factor=0.8))
    routing = router.route(drawn(tokens, nodes * each, seed=seed))
    found = visit_once(routing, num_nodes=nodes)
    expected = []
    for node in range(nodes):
        for token in range(tokens):
            here = [
                int(expert) - node * each if kept and int(expert) // each == node else -1
                for expert, kept in zip(routing.experts[token], routing.kept[token], strict=True)
            ]
            if max(here) >= 0:
                expected.append((node, token, here))
    leaving = found.departure
    assert found.experts.tolist() == [here for _, _, here in expected]
    assert leaving.tokens.tolist() == [token for _, token, _ in expected]
    assert leaving.counts.tolist() == [sum(node == at for node, _, _ in expected) for at in range(nodes)]
    of_rows = routing.weights[leaving.tokens]
    assert torch.equal(found.weights, torch.where(found.experts >= 0, of_rows, 0.0))


def test_bilevel_routing_sends_a_token_once_for_each_of_its_nodes() -> None:
    router = BiLevel(num_nodes=4, num_local=8, k_nodes=2, k_local=4)
    routing = router.route(drawn(50, 4, seed=0), drawn(50, 8, seed=1))
    assert visit_once(routing, num_nodes=4).departure.num_rows == 50 * 2
    assert int(routing.loads().sum()) == 50 * 8


@pytest.mark.parametrize(
    ("num_experts", "k", "expected"),
    [
        (256, 8, {2: 1.9930, 4: 3.6142, 8: 5.2947, 16: 6.5233}),
        (64, 6, {2: 1.9758, 4: 3.3453, 8: 4.5355, 16: 5.3161}),
    ],
)
def test_the_golden_expectations(num_experts: int, k: int, expected: dict[int, float]) -> None:
    for num_nodes, value in expected.items():
        assert round(expected_nodes(num_experts=num_experts, k=k, num_nodes=num_nodes), 4) == value


def test_random_choices_visit_as_many_nodes_as_expected() -> None:
    routing = TopK(num_experts=64, k=6).route(drawn(4000, 64, seed=0))
    rows = visit_once(routing, num_nodes=8).departure.num_rows
    assert rows / 4000 == pytest.approx(expected_nodes(num_experts=64, k=6, num_nodes=8), rel=0.01)


def test_what_does_not_fit_is_refused() -> None:
    routing = TopK(num_experts=6, k=1).route(drawn(3, 6, seed=0))
    with pytest.raises(DispatchError, match="6 experts do not lie evenly on 4 nodes; choose from: 1, 2, 3, 6"):
        visit_once(routing, num_nodes=4)
    with pytest.raises(DispatchError, match=re.escape("rows for experts -1 to 3 arrived on a node that has 3")):
        route_on_node(torch.tensor([[-1, 3]]), torch.zeros(1, 2), num_experts=3)
    with pytest.raises(DispatchError, match="k=7 of 6 experts on 2 nodes"):
        expected_nodes(num_experts=6, k=7, num_nodes=2)
    with pytest.raises(DispatchError, match="k=1 of 6 experts on 4 nodes"):
        expected_nodes(num_experts=6, k=1, num_nodes=4)
