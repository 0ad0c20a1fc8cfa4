"""The value that routers return, logits that can be used, and choices that do not depend on the day."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from meshwright.moe.errors import RoutingError
from meshwright.moe.routing import Routing, first_largest, usable_logits

YES = torch.ones(2, 1, dtype=torch.bool)
FITTING: dict[str, Any] = {
    "experts": torch.tensor([[2], [0]]),
    "weights": torch.ones(2, 1),
    "asked": YES,
    "kept": YES,
    "num_experts": 3,
}


VALUES = some.sampled_from([-torch.inf, -1.0, 0.0, 0.5, 1.0])


@given(some.lists(some.lists(VALUES, min_size=20, max_size=20), max_size=4), some.integers(1, 20))
def test_of_equal_scores_the_lower_index_comes_first_by_search_and_by_sort(rows: list[list[float]], k: int) -> None:
    scores = torch.tensor(rows, dtype=torch.float32).view(-1, 20)
    expected = [sorted(range(20), key=lambda at, row=row: (-row[at], at))[:k] for row in rows]
    assert first_largest(scores, k).tolist() == expected


def test_both_ways_to_find_the_largest_agree() -> None:
    scores = torch.randint(0, 9, (50, 64), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(first_largest(scores, 16), first_largest(scores, 17)[:, :16])
    assert first_largest(torch.zeros(0, 4), 2).shape == (0, 2)


def test_choosing_leaves_scores_as_they_were() -> None:
    scores = torch.tensor([[1.0, 2.0]], requires_grad=True)
    first_largest(scores, 2)
    assert scores.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"experts": torch.zeros(2, 1)}, "experts of a routing are int64 [tokens, k], not torch.float32 [2, 1]"),
        ({"experts": torch.zeros(2, 1, 1, dtype=torch.int64)}, "flatten [batch, positions] to tokens first"),
        ({"weights": torch.ones(2, 2)}, "weights of a routing [2, 2] must be shaped as its experts [2, 1]"),
        ({"kept": torch.ones(1, 2)}, "kept of a routing [1, 2] must be shaped as its experts [2, 1]"),
        ({"scores": torch.ones(2, 4)}, "scores of a routing [2, 4] must be [tokens, num_experts], here [2, 3]"),
        ({"real": torch.ones(3, dtype=torch.bool)}, "real is torch.bool [3]; it is bool [2], one for each token"),
        ({"real": torch.ones(2)}, "real is torch.float32 [2]"),
    ],
)
def test_a_routing_whose_parts_do_not_fit_is_refused(changed: dict[str, Any], words: str) -> None:
    Routing(**FITTING)
    with pytest.raises(RoutingError, match=re.escape(words)):
        Routing(**{**FITTING, **changed})


def test_counts_are_by_choice_and_loads_by_what_is_sent() -> None:
    experts = torch.tensor([[0, 1], [1, 2], [1, 0]])
    asked = torch.tensor([[True, True], [True, True], [False, False]])
    kept = torch.tensor([[True, False], [True, True], [False, False]])
    real = torch.tensor([True, True, False])
    routing = Routing(experts=experts, weights=kept.float(), asked=asked, kept=kept, num_experts=4, real=real)
    assert routing.counts().tolist() == [[1, 1, 0, 0], [0, 1, 1, 0]]
    assert routing.loads().tolist() == [1, 1, 1, 0]
    assert (routing.drops().item(), routing.num_real().item(), routing.num_tokens) == (1, 2, 3)
    assert Routing(**FITTING).num_real().item() == 2


def test_no_tokens_are_ordinary() -> None:
    nothing = torch.zeros(0, 2, dtype=torch.bool)
    routing = Routing(experts=nothing.long(), weights=nothing.float(), asked=nothing, kept=nothing, num_experts=3)
    assert routing.counts().tolist() == [[0] * 3] * 2
    assert usable_logits(torch.zeros(0, 3), 3, real=None).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_logits_are_widened_and_never_narrowed(dtype: torch.dtype) -> None:
    found = usable_logits(torch.zeros(2, 3, dtype=dtype), 3, real=None)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(
    ("logits", "words"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), "gate logits are torch.int64; a router needs floats"),
        (torch.zeros(2, 4), "gate logits [2, 4] do not end with the 3 scores of each token"),
        (torch.zeros(3), "flatten [batch, positions, 3] to [tokens, 3] first"),
        (torch.tensor([[0.0, 1, 2], [0, torch.nan, 1]]), "gate logits of token 1 cannot be routed: [0, nan, 1]"),
        (torch.tensor([[0.0, torch.inf, 2]]), "of token 0 cannot be routed: [0, inf, 2]"),
        (torch.full((1, 3), -torch.inf), "[-inf, -inf, -inf]; look for what made them before the gate, or mark"),
    ],
)
def test_logits_that_cannot_be_routed_are_named(logits: torch.Tensor, words: str) -> None:
    with pytest.raises(RoutingError, match=re.escape(words)):
        usable_logits(logits, 3, real=None, name="gate logits")


def test_an_expert_may_be_closed_to_a_token() -> None:
    usable_logits(torch.tensor([[0.0, -torch.inf]]), 2, real=None)


def test_what_stands_in_padding_reaches_neither_errors_nor_gradients() -> None:
    logits = torch.tensor([[1.0, 2.0], [torch.nan, 0.0]], requires_grad=True)
    usable_logits(logits, 2, real=torch.tensor([True, False])).softmax(-1)[0, 0].backward()
    assert logits.grad is not None
    assert logits.grad[1].tolist() == [0.0, 0.0]
    assert logits.grad[0].abs().min() > 0
