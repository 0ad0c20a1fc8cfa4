"""Counts of routings: values by hand, and sums over parts that are those of the whole."""

from functools import reduce
from math import log
from operator import add

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from meshwright.moe.capacity import Capacity
from meshwright.moe.errors import MetricsError
from meshwright.moe.expert_choice import ExpertChoice
from meshwright.moe.hashing import HashRouter
from meshwright.moe.metrics import Drops, RoutingCounts, count_routing
from meshwright.moe.routing import Routing
from meshwright.moe.top_k import TopK
from tests.moe.golden import flat_logits


def by_hand() -> Routing:
    """5 tokens, the last of them padding; of 8 choices 3 are dropped, both of token 1."""
    return Routing(
        experts=torch.tensor([[0, 2], [0, 1], [0, 3], [2, 0], [1, 1]]),
        weights=torch.ones(5, 2),
        asked=torch.tensor([[True] * 2] * 4 + [[False] * 2]),
        kept=torch.tensor([[True, True], [False, False], [True, False], [True, True], [False, False]]),
        num_experts=4,
        scores=torch.tensor([[0.5, 0.5, 0, 0], [1.0, 0, 0, 0], [0.25] * 4, [0.5, 0, 0.5, 0], [0.25] * 4]),
        real=torch.tensor([True] * 4 + [False]),
    )


def values(counts: RoutingCounts) -> list[list[int] | int]:
    return [getattr(counts, name).tolist() for name in sorted(vars(counts))]


def test_numbers_worked_out_by_hand() -> None:
    found = count_routing(by_hand())
    assert found.asked.tolist() == [4, 1, 2, 1]
    assert found.load(num_nodes=2).counts == (3, 0, 2, 0)
    drops = found.drops()
    assert drops == Drops(num_choices=8, num_dropped_choices=3, num_tokens=4, num_short_tokens=2, num_unserved_tokens=1)
    assert drops.as_dict() == {
        "choices": 8,
        "tokens": 4,
        "dropped_choices": 3,
        "dropped_choice_share": 0.375,
        "short_token_share": 0.5,
        "unserved_token_share": 0.25,
    }
    entropy = found.gate_entropy()
    assert entropy.mean_nats == pytest.approx((log(2) + 0 + log(4) + log(2)) / 4, abs=6e-8)
    assert entropy.most_nats == log(4)


def test_the_golden_routing() -> None:
    counts = count_routing(TopK(num_experts=4, k=2).route(flat_logits(4)))
    assert counts.load(num_nodes=2).counts == (4, 5, 4, 3)
    assert counts.load(num_nodes=2).worst_ratio == 1.25
    assert counts.drops().num_dropped_choices == 0
    scores = flat_logits(4).double().softmax(-1)
    expected = float(-(scores * scores.log()).sum(-1).mean())
    assert counts.gate_entropy().mean_nats == pytest.approx(expected, abs=6e-8)


@settings(max_examples=40)
@given(some.lists(some.integers(0, 6), min_size=1, max_size=5), some.integers(1, 7), some.integers(0, 2**30))
def test_sums_over_ranks_and_micro_batches_are_those_of_the_whole(shares: list[int], experts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(sum(shares), experts, generator=generator)
    real = torch.rand(sum(shares), generator=generator) < 0.8
    router = TopK(num_experts=experts, k=min(2, experts))
    parts = [
        count_routing(router.route(own, real=mask))
        for own, mask in zip(logits.split(shares), real.split(shares), strict=True)
    ]
    whole = count_routing(router.route(logits, real=real))
    assert values(reduce(add, parts)) == values(reduce(add, reversed(parts))) == values(whole)
    calls: list[Tensor] = []
    everyone = torch.stack([part._packed() for part in parts])
    assert values(parts[0].summed(lambda own: calls.append(own) or everyone.sum(0))) == values(whole)  # type: ignore[func-returns-value]
    assert len(calls) == 1
    assert calls[0].dtype == torch.int64
    assert torch.equal(calls[0], everyone[0])


def test_counts_beyond_what_floats_hold_add_up() -> None:
    one = count_routing(by_hand())
    many = one.summed(lambda own: own * (2**53 + 1))
    assert (many + one).load().counts == (3 * (2**53 + 2), 0, 2 * (2**53 + 2), 0)


@pytest.mark.parametrize("experts", [1, 4])
def test_no_tokens_are_no_numbers_above_zero(experts: int) -> None:
    found = count_routing(TopK(num_experts=experts, k=1).route(torch.zeros(0, experts)))
    assert found.load().counts == (0,) * experts
    assert set(found.drops().as_dict().values()) == {0}
    assert found.gate_entropy().mean_nats == 0.0


def test_one_expert_has_no_entropy() -> None:
    found = count_routing(TopK(num_experts=1, k=1).route(torch.randn(3, 1)))
    assert found.load().worst_ratio == 1.0
    assert found.gate_entropy().as_dict() == {"gate_entropy_nats": 0.0, "most_gate_entropy_nats": 0.0}


def test_dropped_by_capacity() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, 0.0]]).repeat(4, 1)
    drops = count_routing(TopK(num_experts=4, k=1, capacity=Capacity(factor=1.0)).route(logits)).drops()
    assert (drops.choice_share, drops.token_share, drops.unserved_share) == (0.75, 0.75, 0.75)


def test_tokens_that_no_expert_took_are_unserved_but_not_dropped() -> None:
    logits = torch.tensor([[9.0, 9.0], [0.0, 0.0]])
    drops = count_routing(ExpertChoice(num_experts=2, factor=1.0).route(logits)).drops()
    assert (drops.num_dropped_choices, drops.num_short_tokens, drops.num_unserved_tokens) == (0, 0, 1)


def test_a_router_without_scores_has_no_gate_and_does_not_thin_out_that_of_others() -> None:
    hashed = HashRouter.modulo(vocabulary=8, num_experts=4).route(torch.arange(4))
    found = count_routing(hashed)
    assert found.gate_entropy().mean_nats == 0.0
    other = count_routing(by_hand())
    assert (found + other).gate_entropy() == other.gate_entropy()


def test_counts_carry_no_gradient() -> None:
    logits = torch.randn(5, 4, requires_grad=True)
    found = count_routing(TopK(num_experts=4, k=2).route(logits))
    assert {getattr(found, name).dtype for name in vars(found)} == {torch.int64}


def test_counts_of_other_layers_are_refused() -> None:
    one = count_routing(TopK(num_experts=1, k=1).route(torch.zeros(3, 1)))
    with pytest.raises(MetricsError, match="counts of 1 and of 4 experts do not add up; add those of one layer"):
        _ = one + count_routing(by_hand())
