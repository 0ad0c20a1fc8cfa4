"""Routers by token id."""

import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from meshwright.moe.errors import RoutingError
from meshwright.moe.hashing import HashRouter


@given(some.lists(some.integers(0, 1000), min_size=1, max_size=200), some.integers(1, 9), some.integers(1, 3))
def test_loads_of_a_balanced_table_differ_by_one_id_at_most(frequencies: list[int], num_experts: int, k: int) -> None:
    k = min(k, num_experts)
    router = HashRouter.balanced(frequencies, num_experts=num_experts, k=k)
    loads = torch.zeros(num_experts, dtype=torch.float64)
    for expert in router.table.T:
        loads.index_add_(0, expert, torch.tensor(frequencies, dtype=torch.float64))
    assert loads.sum() == k * sum(frequencies)
    assert loads.max() - loads.min() <= max(frequencies)


def test_a_skewed_vocabulary_is_balanced_better_than_at_random() -> None:
    frequencies = 1e6 / torch.arange(1, 5001, dtype=torch.float64)
    spread = []
    for router in (
        HashRouter.balanced(frequencies, num_experts=8),
        HashRouter.random(vocabulary=5000, num_experts=8),
        HashRouter.modulo(vocabulary=5000, num_experts=8),
    ):
        loads = torch.zeros(8, dtype=torch.float64).index_add_(0, router.table[:, 0], frequencies)
        spread.append((loads.max() / loads.mean()).item())
    assert spread[0] < 1.001
    assert spread[0] < min(spread[1:])


def test_a_random_table_is_even_over_ids_and_another_for_another_seed() -> None:
    tables = [HashRouter.random(vocabulary=8000, num_experts=8, k=2, seed=seed).table for seed in (0, 1)]
    counts = torch.bincount(tables[0].flatten(), minlength=8)
    assert 1800 < counts.min() < counts.max() < 2200
    assert not torch.equal(*tables)


def test_where_tokens_go_is_known_from_ids_alone() -> None:
    router = HashRouter.modulo(vocabulary=100, num_experts=4)
    ids = torch.tensor([5, 9, 2, 99, 0])
    real = torch.tensor([True, True, True, False, True])
    routing = router.route(ids, real=real)
    assert routing.loads().tolist() == [1, 2, 1, 0]
    assert routing.weights.flatten().tolist() == [1.0, 1.0, 1.0, 0.0, 1.0]
    assert routing.scores is None
    assert router.route(ids).loads().tolist() == [1, 2, 1, 1]
    assert router.route(torch.zeros(0, dtype=torch.int64)).loads().tolist() == [0] * 4


def test_what_stands_in_padding_is_not_looked_up() -> None:
    router = HashRouter.modulo(vocabulary=4, num_experts=2)
    routing = router.route(torch.tensor([3, -100]), real=torch.tensor([True, False]))
    assert routing.loads().tolist() == [0, 1]


def test_weights_of_several_experts_sum_to_one() -> None:
    routing = HashRouter.random(vocabulary=10, num_experts=4, k=2).route(torch.arange(10))
    assert routing.weights.sum(1).tolist() == [1.0] * 10


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: HashRouter(torch.zeros(3), 2), "a table of experts is int64 [vocabulary, k], not torch.float32 [3]"),
        (lambda: HashRouter(torch.tensor([[0], [2]]), 2), "a table names experts 0 to 2; there are 2, from 0"),
        (lambda: HashRouter(torch.tensor([[0, 0]]), 2), "a table names an expert twice for one id"),
        (lambda: HashRouter.modulo(vocabulary=0, num_experts=2), "a vocabulary of 0 with k=1 of 2 experts"),
        (lambda: HashRouter.random(vocabulary=3, num_experts=2, k=3), "k=3 of 2 experts; use at least one id, and k"),
        (lambda: HashRouter.balanced([1.0, -1.0], num_experts=2), "the frequency of id 1 is -1.0"),
        (lambda: HashRouter.balanced([float("inf")], num_experts=2), "the frequency of id 0 is inf"),
        (
            lambda: HashRouter.modulo(vocabulary=4, num_experts=2).route(torch.tensor([4])),
            "ids 4 to 4 for a table of 4",
        ),
        (lambda: HashRouter.modulo(vocabulary=4, num_experts=2).route(torch.tensor([-1])), "ids -1 to -1 for a table"),
        (
            lambda: HashRouter.modulo(vocabulary=4, num_experts=2).route(torch.zeros(2, 2).long()),
            "such as input_ids.fl",
        ),
    ],
)
def test_tables_and_ids_that_do_not_fit_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(RoutingError, match=re.escape(words)):
        make()
