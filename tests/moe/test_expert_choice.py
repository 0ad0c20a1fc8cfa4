"""Experts that choose tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from meshwright.moe.errors import RoutingError
from meshwright.moe.expert_choice import ExpertChoice
from tests.moe.golden import flat_logits


@given(some.integers(0, 40), some.integers(1, 6), some.floats(0.1, 4), some.integers(0, 2**30), some.booleans())
def test_each_expert_takes_its_best_tokens(
    tokens: int, num_experts: int, factor: float, seed: int, padded: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, num_experts, generator=generator, dtype=torch.float64)
    real = torch.rand(tokens, generator=generator) < 0.7 if padded else torch.ones(tokens, dtype=torch.bool)
    routing = ExpertChoice(num_experts=num_experts, factor=factor).route(logits, real=real if padded else None)
    scores = logits.softmax(-1)
    number = int(real.sum())
    slots = min(number, max(1, -int(-factor * number // num_experts)))
    assert routing.loads().tolist() == [slots] * num_experts
    found = torch.zeros_like(scores)
    found.scatter_add_(1, routing.experts, routing.weights)
    for expert in range(num_experts):
        best = sorted((token for token in range(tokens) if real[token]), key=lambda at, e=expert: -scores[at, e].item())
        taken = torch.zeros(tokens, dtype=torch.bool)
        taken[best[:slots]] = True
        torch.testing.assert_close(found[:, expert], torch.where(taken, scores[:, expert], 0.0), rtol=1e-14, atol=0)
    assert not routing.kept[~real].any()


def test_ids_of_a_token_differ_even_where_nothing_is_sent() -> None:
    routing = ExpertChoice(num_experts=4, factor=1.5).route(flat_logits())
    assert all(len(set(row)) == routing.k for row in routing.experts.tolist())
    assert routing.drops() == 0


def test_gradients() -> None:
    router = ExpertChoice(num_experts=4, factor=1.0)
    assert torch.autograd.gradcheck(lambda logits: router.route(logits).weights, flat_logits().requires_grad_())


def test_what_cannot_choose_is_refused() -> None:
    with pytest.raises(RoutingError, match="0 experts cannot choose"):
        ExpertChoice(num_experts=0, factor=1.0)
    with pytest.raises(RoutingError, match="a capacity factor of 0 leaves no slots"):
        ExpertChoice(num_experts=2, factor=0)
