"""Rows sorted by expert, and put back."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from meshwright.moe.bilevel import BiLevel
from meshwright.moe.capacity import Capacity
from meshwright.moe.dispatch import Departure, combine, depart, sort_choices
from meshwright.moe.errors import DispatchError
from meshwright.moe.expert_choice import ExpertChoice
from meshwright.moe.hashing import HashRouter
from meshwright.moe.routing import Routing
from meshwright.moe.top_k import TopK

SIZES = some.tuples(some.integers(0, 30), some.integers(1, 6), some.integers(0, 2**30))


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def routings(tokens: int, num_experts: int, seed: int) -> list[Routing]:
    """One of every router."""
    logits, k = drawn(tokens, num_experts, seed=seed), min(2, num_experts)
    real = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < 0.7
    inter = drawn(tokens, 2, seed=seed + 1)
    ids = torch.arange(tokens)
    return [
        TopK(num_experts=num_experts, k=k).route(logits),
        TopK(num_experts=num_experts, k=k, capacity=Capacity(factor=0.7)).route(logits, real=real),
        ExpertChoice(num_experts=num_experts, factor=1.3).route(logits, real=real),
        BiLevel(num_nodes=2, num_local=num_experts, node_capacity=Capacity(factor=0.8)).route(inter, logits),
        HashRouter.random(vocabulary=30, num_experts=num_experts, k=k).route(ids, real=real),
    ]


@settings(max_examples=25)
@given(SIZES)
def test_rows_are_what_is_kept_by_expert_and_then_by_place(sizes: tuple[int, int, int]) -> None:
    for routing in routings(*sizes):
        found = sort_choices(routing)
        ids = routing.experts.flatten().tolist()
        kept = routing.kept.flatten().tolist()
        places = [at for at in range(len(ids)) if kept[at]]
        assert found.places.tolist() == sorted(places, key=lambda at, ids=ids: (ids[at], at))
        assert torch.equal(found.counts, routing.loads())
        assert found.tokens.tolist() == [at // routing.k for at in found.places.tolist()]


@settings(max_examples=25)
@given(SIZES)
def test_what_departs_comes_back_weighted(sizes: tuple[int, int, int]) -> None:
    tokens = drawn(sizes[0], 3, seed=sizes[2])
    for routing in routings(*sizes):
        leaving = sort_choices(routing)
        rows = depart(tokens, leaving)
        assert torch.equal(rows, tokens[leaving.tokens])
        expected = tokens * routing.weights.sum(1, keepdim=True)
        torch.testing.assert_close(combine(rows, leaving, routing.weights), expected.to(rows.dtype))
        counts = routing.kept.sum(1, keepdim=True)
        torch.testing.assert_close(combine(rows, leaving), tokens * counts)


@settings(max_examples=25)
@given(SIZES, some.data())
def test_parts_of_the_experts_make_the_whole(sizes: tuple[int, int, int], data: some.DataObject) -> None:
    tokens = drawn(sizes[0], 3, seed=sizes[2])
    for routing in routings(*sizes):
        middle = data.draw(some.integers(0, routing.num_experts))
        spans = (range(middle), range(middle, routing.num_experts))
        leaving = [sort_choices(routing, own=own) for own in spans]
        whole = sort_choices(routing)
        assert torch.equal(torch.cat([each.places for each in leaving]), whole.places)
        assert torch.equal(torch.cat([each.counts for each in leaving]), whole.counts)
        parts = [combine(depart(tokens, each), each, routing.weights) for each in leaving]
        torch.testing.assert_close(parts[0] + parts[1], combine(depart(tokens, whole), whole, routing.weights))


def test_gradients() -> None:
    routing = TopK(num_experts=3, k=2, capacity=Capacity(factor=0.8)).route(drawn(5, 3, seed=0))
    leaving = sort_choices(routing)
    assert 0 < leaving.num_rows < 10
    leaves = drawn(5, 2, seed=1).requires_grad_(), drawn(5, 2, seed=2).requires_grad_()

    def there_and_back(tokens: Tensor, weights: Tensor) -> Tensor:
        return combine(depart(tokens, leaving).square(), leaving, weights)

    assert torch.autograd.gradcheck(there_and_back, leaves)
    assert torch.autograd.gradgradcheck(there_and_back, leaves)


def test_narrow_rows_are_added_in_float32() -> None:
    leaving = Departure(places=torch.arange(256), counts=torch.tensor([256]), num_tokens=1, slots=256)
    rows = torch.ones(256, 1, dtype=torch.bfloat16)
    rows[0] = 256.0  # where bfloat16 does not see one more
    assert combine(rows, leaving).item() == 512.0
    assert combine(rows, leaving, torch.ones(1, 256)).item() == 512.0
    token = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    depart(token, leaving).backward(rows)
    assert token.grad is not None
    assert token.grad.item() == 512.0


def test_rows_of_any_shape_travel() -> None:
    routing = TopK(num_experts=2, k=1).route(drawn(4, 2, seed=0))
    leaving = sort_choices(routing)
    for shape in ((4,), (4, 2, 3)):
        tokens = drawn(*shape, seed=1)
        torch.testing.assert_close(combine(depart(tokens, leaving), leaving), tokens)


def test_what_does_not_fit_is_refused() -> None:
    routing = TopK(num_experts=2, k=1).route(drawn(4, 2, seed=0))
    leaving = sort_choices(routing)
    with pytest.raises(DispatchError, match="5 tokens for a routing of 4; route the ones that are sent"):
        depart(torch.zeros(5, 2), leaving)
    with pytest.raises(DispatchError, match=re.escape("3 rows and weights None for a departure of 4 rows")):
        combine(torch.zeros(3, 2), leaving)
    with pytest.raises(DispatchError, match=re.escape("weights [4, 2] for a departure of 4 rows of [4, 1] choices")):
        combine(torch.zeros(4, 2), leaving, torch.zeros(4, 2))
    for span in (range(3), range(0, 2, 2), range(-1, 1)):
        with pytest.raises(DispatchError, match=re.escape("use a part of range(2)")):
            sort_choices(routing, own=span)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_tokens_sum_has_its_own_rows_and_no_others(dtype: torch.dtype) -> None:
    routing = TopK(num_experts=4, k=3, capacity=Capacity(factor=0.4)).route(drawn(9, 4, seed=0))
    leaving = sort_choices(routing)
    assert set(routing.kept.sum(1).tolist()) >= {0, 3}
    rows = drawn(leaving.num_rows, 5, seed=1).to(dtype)
    for weights in (None, routing.weights.to(dtype), routing.weights):
        whole = combine(rows, leaving, weights)
        for token in range(9):
            spoiled = torch.where((leaving.tokens == token)[:, None], rows, float("nan"))
            found = combine(spoiled, leaving, weights)
            assert torch.equal(found[token], whole[token])
            assert routing.kept[token].any() or torch.equal(found[token], torch.zeros_like(found[token]))
            others = routing.kept.any(1).index_fill(0, torch.tensor(token), False)
            assert torch.equal(found.isnan().any(1), others)
    nobody = torch.zeros(2, 1, dtype=torch.bool)
    none = sort_choices(
        Routing(experts=nobody.long(), weights=torch.zeros(2, 1), asked=nobody, kept=nobody, num_experts=2)
    )
    assert torch.equal(combine(rows[:0], none), torch.zeros(2, 5, dtype=dtype))
