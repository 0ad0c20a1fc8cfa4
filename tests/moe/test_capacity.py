"""What finds no slot is dropped, by a stated rule, and ranks that share queues drop what one process drops."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from meshwright.moe.capacity import Capacity, Peers
from meshwright.moe.errors import RoutingError
from meshwright.moe.top_k import TopK
from tests.moe.golden import flat_logits
from tests.moe.simulated import with_peers

SIZES = some.tuples(some.integers(0, 40), some.integers(1, 6), some.integers(1, 6), some.integers(0, 2**30))


def drawn(tokens: int, num_experts: int, seed: int) -> Tensor:
    return torch.randn(tokens, num_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_golden_slots() -> None:
    assert Capacity(factor=1.0).slots(num_choices=8, num_experts=4) == 2
    assert Capacity(factor=1.0).slots(num_choices=16, num_experts=4) == 4


def test_a_factor_is_the_decimal_that_it_is_written_as() -> None:
    assert [Capacity(factor=1.1).slots(num_choices=n, num_experts=1) for n in (50, 90, 110)] == [55, 99, 121]
    assert Capacity(factor=1.25).slots(num_choices=7, num_experts=4) == 3
    assert Capacity(factor=0.01, minimum=4).slots(num_choices=7, num_experts=4) == 4


@given(SIZES, some.floats(0.05, 3), some.sampled_from(["position", "score"]))
def test_the_first_in_the_queue_are_kept(sizes: tuple[int, int, int, int], factor: float, order: Any) -> None:
    tokens, num_experts, k, seed = sizes
    k = min(k, num_experts)
    capacity = Capacity(factor=factor, order=order)
    free = TopK(num_experts=num_experts, k=k).route(drawn(tokens, num_experts, seed))
    found = capacity.limit(free)
    slots = capacity.slots(num_choices=tokens * k, num_experts=num_experts)
    queues: dict[int, list[tuple[Any, ...]]] = {expert: [] for expert in range(num_experts)}
    for level in range(k):
        for token in range(tokens):
            first = -free.weights[token, level].item() if order == "score" else 0
            queues[int(free.experts[token, level])].append((first, level, token))
    expected = torch.zeros(tokens, k, dtype=torch.bool)
    for queue in queues.values():
        for _, level, token in sorted(queue)[:slots]:
            expected[token, level] = True
    assert torch.equal(found.kept, expected)
    assert torch.equal(found.weights, torch.where(expected, free.weights, 0.0))
    assert torch.equal(found.counts(), free.counts())
    assert int(found.drops()) == int((~expected).sum())


def test_equal_scores_queue_by_position() -> None:
    found = TopK(num_experts=2, k=1, capacity=Capacity(factor=1.0, order="score")).route(torch.tensor([[1.0, 0.0]] * 4))
    assert found.kept.flatten().tolist() == [True, True, False, False]


def test_what_is_dropped_weighs_nothing_and_has_no_gradient() -> None:
    logits = torch.tensor([[1.0, 0.0], [2.0, 0.0]], requires_grad=True)
    routing = TopK(num_experts=2, k=1, capacity=Capacity(factor=1.0)).route(logits)
    assert routing.weights[1].item() == 0.0
    routing.weights.sum().backward()
    assert logits.grad is not None
    assert logits.grad[0].abs().min() > 0
    assert logits.grad[1].tolist() == [0.0, 0.0]


def test_more_slots_than_tokens_drop_nothing() -> None:
    routing = TopK(num_experts=4, k=2, capacity=Capacity(factor=100.0)).route(flat_logits())
    assert routing.kept.all()


@settings(max_examples=40)
@given(SIZES, some.lists(some.integers(0, 12), min_size=1, max_size=5), some.floats(0.1, 2))
def test_ranks_that_share_queues_drop_what_one_process_drops(
    sizes: tuple[int, int, int, int], shares: list[int], factor: float
) -> None:
    _, num_experts, k, seed = sizes
    router = TopK(num_experts=num_experts, k=min(k, num_experts))
    capacity = Capacity(factor=factor)
    logits = drawn(sum(shares), num_experts, seed)
    whole = capacity.limit(router.route(logits))
    parts = logits.split(shares)
    limited = with_peers(
        len(shares), lambda peers: replace(router, capacity=capacity).route(parts[peers.rank], peers=peers)
    )
    assert torch.equal(torch.cat([part.kept for part in limited]), whole.kept)
    assert torch.equal(torch.cat([part.weights for part in limited]), whole.weights)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"factor": 0.0}, "a capacity factor of 0.0 leaves no slots; use one above 0"),
        ({"factor": -1.0}, "a capacity factor of -1.0 leaves no slots"),
        ({"factor": float("nan")}, "a capacity factor of nan leaves no slots"),
        ({"factor": 1.0, "minimum": 0}, "a capacity of at least 0 slots: use minimum=1 or more"),
        ({"factor": 1.0, "order": "scores"}, "no queue is ordered by 'scores'; did you mean 'score'?"),
    ],
)
def test_capacities_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RoutingError, match=re.escape(words)):
        Capacity(**options)


def test_queues_by_score_cannot_be_shared() -> None:
    router = TopK(num_experts=4, k=1, capacity=Capacity(factor=1.0, order="score"))
    with pytest.raises(RoutingError, match="cannot share queues ordered by score; use order='position'"):
        router.route(flat_logits(), peers=Peers(0, lambda own: own[None]))
