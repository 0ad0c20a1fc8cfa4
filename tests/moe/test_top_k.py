"""Top-k routers: golden numbers, weights, biases, padding, gradients."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from meshwright.moe.capacity import Capacity
from meshwright.moe.errors import RoutingError
from meshwright.moe.groups import Groups
from meshwright.moe.top_k import TopK
from tests.moe.golden import flat_logits

SIZES = some.tuples(some.integers(0, 40), some.integers(1, 9), some.integers(0, 2**30))


def drawn(tokens: int, num_experts: int, seed: int) -> torch.Tensor:
    return torch.randn(tokens, num_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_golden_choices() -> None:
    routing = TopK(num_experts=4, k=2).route(flat_logits())
    assert routing.experts.tolist() == [[1, 2], [1, 0], [0, 1], [0, 3], [3, 0], [2, 3], [2, 1], [1, 2]]
    assert routing.counts()[0].tolist() == [2, 3, 2, 1]
    assert routing.counts().sum(0).tolist() == [4, 5, 4, 3]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (0.452039, 0.288794)),
        ({"renormalise": True}, (0.610177, 0.389823)),
        ({"renormalise": True, "score": "sigmoid"}, (0.536201, 0.463799)),
    ],
)
def test_the_golden_weights(options: dict[str, Any], expected: tuple[float, float]) -> None:
    first = TopK(num_experts=4, k=2, **options).route(flat_logits()).weights[0]
    assert [round(weight, 6) for weight in first.tolist()] == list(expected)


@given(SIZES, some.integers(1, 9), some.sampled_from(["softmax", "sigmoid"]), some.booleans())
def test_weights_are_those_of_the_formula(sizes: tuple[int, int, int], k: int, score: Any, renormalise: bool) -> None:
    tokens, num_experts, _ = sizes
    k, logits = min(k, num_experts), drawn(*sizes)
    routing = TopK(num_experts=num_experts, k=k, score=score, renormalise=renormalise, scale=2.5).route(logits)
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    best = scores.topk(k)
    expected = best.values / best.values.sum(-1, keepdim=True) if renormalise else best.values
    assert torch.equal(routing.experts, best.indices)
    torch.testing.assert_close(routing.weights, expected * 2.5, rtol=1e-13, atol=0)
    assert routing.scores is not None
    torch.testing.assert_close(routing.scores, scores / scores.sum(-1, keepdim=True), rtol=1e-13, atol=0)
    assert routing.counts().sum() == tokens * k


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("groups", [None, Groups(number=3, limit=2)])
def test_gradients_of_weights_and_scores(score: Any, renormalise: bool, groups: Groups | None) -> None:
    router = TopK(num_experts=6, k=2, score=score, renormalise=renormalise, scale=0.7, groups=groups)
    bias = torch.tensor([0.0, 0.3, 0.0, -0.2, 0.1, 0.0])
    capacity = Capacity(factor=0.8)

    def decided(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        routing = capacity.limit(router.route(logits, bias=bias))
        assert routing.scores is not None
        return routing.weights, routing.scores

    assert torch.autograd.gradcheck(decided, drawn(7, 6, 3).requires_grad_())


def test_a_bias_changes_choices_and_no_weight() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0]])
    router = TopK(num_experts=3, k=1)
    pushed = router.route(logits, bias=torch.tensor([-1.0, 0.0, 0.5]))
    assert pushed.experts.tolist() == [[2]]
    assert pushed.weights.item() == logits.softmax(-1)[0, 2].item()


def test_renormalised_weights_survive_scores_that_vanish() -> None:
    bias = torch.tensor([-9.0, 0.0, 0.0])
    for score in ("softmax", "sigmoid"):
        router = TopK(num_experts=3, k=2, score=score, renormalise=True)  # type: ignore[arg-type]
        weights = router.route(torch.tensor([[0.0, -300.0, -301.0]]), bias=bias).weights
        torch.testing.assert_close(weights, torch.tensor([[1.0, 0.0]]).sub(0.5).mul(0.46211715).add(0.5))


def test_decisions_of_narrow_logits_are_made_in_float32() -> None:
    logits = drawn(9, 8, 0).bfloat16()
    routing = TopK(num_experts=8, k=3).route(logits)
    assert routing.weights.dtype == torch.float32
    assert torch.equal(routing.weights, logits.float().softmax(-1).topk(3).values)


@given(SIZES, some.integers(0, 20))
def test_padding_changes_nothing_for_what_is_real(sizes: tuple[int, int, int], padding: int) -> None:
    tokens, num_experts, seed = sizes
    router = TopK(num_experts=num_experts, k=min(2, num_experts), capacity=Capacity(factor=1.0))
    bare = router.route(drawn(*sizes))
    real = torch.cat([torch.ones(tokens), torch.zeros(padding)]).bool()
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))
    place = order.sort().indices[:tokens].sort().values  # real tokens keep their order
    mixed = torch.full((len(real), num_experts), torch.nan, dtype=torch.float64)
    mixed[place] = drawn(*sizes)
    padded = router.route(mixed, real=torch.zeros(len(real)).bool().index_fill(0, place, True))
    for name in ("experts", "weights", "asked", "kept", "scores"):
        assert torch.equal(getattr(padded, name)[place], getattr(bare, name)), name
    assert torch.equal(padded.counts(), bare.counts())
    assert padded.asked.sum() == bare.asked.sum()


def test_padding_weighs_nothing_and_has_no_gradient() -> None:
    logits = flat_logits().requires_grad_()
    real = torch.arange(8) != 3
    routing = TopK(num_experts=4, k=2, renormalise=True).route(logits, real=real)
    assert routing.weights[3].tolist() == [0.0, 0.0]
    routing.weights.square().sum().backward()
    assert logits.grad is not None
    assert (logits.grad.abs().sum(1) > 0).tolist() == real.tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 5}, "k=5 of 4 experts for each token; use 1 to 4"),
        ({"k": 0}, "k=0 of 4 experts for each token; use 1 to 4"),
        ({"num_experts": 0}, "k=2 of 0 experts"),
        ({"score": "sigmoids"}, "no router scores by 'sigmoids'; did you mean 'sigmoid'?"),
        ({"scale": 0.0}, "weights scaled by 0.0: use a number above 0"),
        ({"scale": float("nan")}, "weights scaled by nan"),
        ({"groups": Groups(number=3, limit=1)}, "4 experts do not make 3 equal groups; choose from: 1, 2, 4"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RoutingError, match=re.escape(words)):
        TopK(**{"num_experts": 4, "k": 2, **options})


@pytest.mark.parametrize(
    ("bias", "words"),
    [
        (torch.zeros(3), "a bias [3] does not fit 4 experts; it is [4]"),
        (torch.zeros(4, dtype=torch.bfloat16), "a bias in torch.bfloat16 loses updates of 0.001 to rounding"),
        (torch.tensor([0.0, 0.0, torch.nan, 0.0]), "the bias of expert 2 is not finite"),
    ],
)
def test_biases_that_do_not_fit_are_refused(bias: torch.Tensor, words: str) -> None:
    with pytest.raises(RoutingError, match=re.escape(words)):
        TopK(num_experts=4, k=1).route(flat_logits(), bias=bias)


def test_a_nan_is_named_and_not_spread() -> None:
    logits = flat_logits()
    logits[5, 1] = torch.nan
    with pytest.raises(RoutingError, match=r"logits of token 5 cannot be routed"):
        TopK(num_experts=4, k=1).route(logits)
