"""Balance losses: golden numbers, scales, peers, and that they do not depend on how a batch is cut."""

import re
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor

from meshwright.moe.balance import Family, Tally, balance_loss, summed, tally, z_loss
from meshwright.moe.capacity import Capacity
from meshwright.moe.errors import BalanceError, RoutingError
from meshwright.moe.groups import Groups
from meshwright.moe.hashing import HashRouter
from meshwright.moe.routing import Routing
from meshwright.moe.top_k import TopK
from tests.moe.golden import flat_logits

FAMILIES: tuple[Family, ...] = get_args(Family)
SIZES = some.tuples(some.integers(1, 40), some.integers(1, 6), some.integers(0, 2**30))


def drawn(tokens: int, num_experts: int, seed: int) -> Tensor:
    return torch.randn(tokens, num_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("family", "k", "expected"),
    [
        ("switch", 1, 1.0202093878064031),
        ("switch", 2, 1.0202093878064031),
        ("megatron", 1, 1.0202093878064031),
        ("megatron", 2, 1.0101046939032015),
        ("huggingface", 2, 2.020209387806403),
    ],
)
def test_the_golden_losses(family: Family, k: int, expected: float) -> None:
    found = balance_loss(tally(TopK(num_experts=4, k=k).route(flat_logits())), family)
    assert found.item() == pytest.approx(expected, rel=1e-15)


def test_the_golden_z_loss() -> None:
    assert z_loss(flat_logits()).item() == pytest.approx(2.615073529538799, rel=1e-15)


@given(SIZES, some.integers(1, 6), some.sampled_from(FAMILIES), some.sampled_from(["softmax", "sigmoid"]))
def test_losses_are_those_of_the_formula(sizes: tuple[int, int, int], k: int, family: Family, score: Any) -> None:
    tokens, num_experts, _ = sizes
    k, logits = min(k, num_experts), drawn(*sizes)
    routing = TopK(num_experts=num_experts, k=k, score=score).route(logits)
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    counted = routing.experts[:, :1] if family == "switch" else routing.experts
    fractions = torch.bincount(counted.flatten(), minlength=num_experts).double() / tokens
    expected = num_experts * (fractions * scores.mean(0)).sum() / (k if family == "megatron" else 1)
    torch.testing.assert_close(balance_loss(tally(routing), family), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("k", [1, 3])
def test_an_even_spread_costs_one_or_k(family: Family, k: int) -> None:
    experts = (torch.arange(12)[:, None] + torch.arange(k)) % 4
    yes = torch.ones_like(experts, dtype=torch.bool)
    weights = torch.ones(12, k, dtype=torch.float64)
    scores = torch.full((12, 4), 0.25, dtype=torch.float64)
    routing = Routing(experts=experts, weights=weights, asked=yes, kept=yes, num_experts=4, scores=scores)
    assert balance_loss(tally(routing), family).item() == (k if family == "huggingface" else 1.0)


def test_transformers_computes_the_same_over_its_layers_and_its_padding() -> None:
    mixtral = pytest.importorskip(
        "transformers.models.mixtral.modeling_mixtral", reason="the extra 'hf' is not installed"
    )

    layers = tuple(drawn(24, 6, seed).float() for seed in range(3))
    real = torch.rand(24, generator=torch.Generator().manual_seed(9)) < 0.8
    router = TopK(num_experts=6, k=2, renormalise=True)
    for mask in (None, real):
        tallies = [tally(router.route(logits, real=mask)) for logits in layers]
        found = balance_loss(tallies[0] + tallies[1] + tallies[2], "huggingface")
        expected = mixtral.load_balancing_loss_func(layers, 6, 2, None if mask is None else mask.view(2, 12))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@given(SIZES, some.lists(some.integers(0, 9), min_size=1, max_size=5), some.sampled_from(FAMILIES))
def test_parts_of_ranks_or_microbatches_add_up_to_the_loss_of_the_batch(
    sizes: tuple[int, int, int], shares: list[int], family: Family
) -> None:
    _, num_experts, seed = sizes
    router = TopK(num_experts=num_experts, k=min(2, num_experts), capacity=Capacity(factor=1.0))
    logits = drawn(sum(shares), num_experts, seed).requires_grad_()
    whole = balance_loss(tally(router.route(logits)), family) + z_loss(logits)
    tallies = [tally(router.route(part)) for part in logits.split(shares)]
    counts = torch.stack([torch.cat([each.counts.flatten(), each.num_tokens[None]]) for each in tallies]).sum(0)
    parts = [summed([each], counts.view_as)[0] for each in tallies]
    losses = [balance_loss(each, family) for each in parts]
    losses += [z_loss(part, num_tokens=sum(shares)) for part in logits.split(shares)]
    total = torch.stack(losses).sum()
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-15)
    grads = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (total, whole)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-11, atol=1e-15)


def test_tallies_of_many_layers_are_summed_by_one_call() -> None:
    calls = []

    def total(own: Tensor) -> Tensor:
        calls.append(tuple(own.shape))
        return 3 * own

    layers = [tally(TopK(num_experts=4, k=2).route(flat_logits())) for _ in range(5)]
    found = summed(layers, total)
    assert calls == [(5 * (2 * 4 + 1),)]
    for before, after in zip(layers, found, strict=True):
        assert torch.equal(after.counts, 3 * before.counts)
        assert after.num_tokens.item() == 24
        assert after.score_sums is before.score_sums
    assert summed([], total) == []


def test_sections_are_counted_alone() -> None:
    logits = drawn(12, 4, 0)
    router = TopK(num_experts=4, k=2)
    real = torch.arange(12) % 5 != 0
    found = balance_loss(tally(router.route(logits, real=real), sections=3))
    expected = [
        balance_loss(tally(router.route(part, real=own)))
        for part, own in zip(logits.split(4), real.split(4), strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-14, atol=0)


@given(SIZES, some.integers(1, 9))
def test_padding_costs_nothing(sizes: tuple[int, int, int], padding: int) -> None:
    logits = drawn(*sizes)
    router = TopK(num_experts=sizes[1], k=1)
    padded = torch.cat([logits, torch.full((padding, sizes[1]), torch.nan, dtype=torch.float64)])
    real = torch.arange(len(padded)) < sizes[0]
    bare, found = tally(router.route(logits)), tally(router.route(padded, real=real))
    for family in FAMILIES:
        torch.testing.assert_close(balance_loss(found, family), balance_loss(bare, family), rtol=1e-14, atol=0)
    torch.testing.assert_close(z_loss(padded, real=real), z_loss(logits), rtol=1e-14, atol=0)


def test_no_tokens_cost_nothing_and_have_gradients() -> None:
    logits = torch.zeros(0, 4, requires_grad=True)
    loss = balance_loss(tally(TopK(num_experts=4, k=1).route(logits))) + z_loss(logits)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None


def test_what_capacity_drops_counts() -> None:
    logits = torch.tensor([[1.0, 0.0]] * 4)
    free, limited = (TopK(num_experts=2, k=1, capacity=each).route(logits) for each in (None, Capacity(factor=0.5)))
    assert balance_loss(tally(limited)) == balance_loss(tally(free)) > 1


def test_plain_counts_the_best_scores_in_place_of_limited_or_biased_choices() -> None:
    logits = drawn(30, 8, 1)
    groups = Groups(number=4, limit=2)
    limited = TopK(num_experts=8, k=4, groups=groups).route(logits, bias=torch.linspace(-1, 1, 8))
    plain = TopK(num_experts=8, k=4).route(logits)
    assert torch.equal(tally(limited, plain=True).counts, tally(plain).counts)
    assert not torch.equal(tally(limited).counts, tally(plain).counts)


def test_gradients() -> None:
    def losses(logits: Tensor) -> tuple[Tensor, ...]:
        found = tally(TopK(num_experts=4, k=2, score="sigmoid").route(logits), sections=2)
        return *(balance_loss(found, family) for family in FAMILIES), z_loss(logits)

    assert torch.autograd.gradcheck(losses, flat_logits().requires_grad_())


def test_what_cannot_be_balanced_is_refused() -> None:
    routing = TopK(num_experts=4, k=1).route(flat_logits())
    with pytest.raises(BalanceError, match="8 tokens do not make 3 equal sections"):
        tally(routing, sections=3)
    with pytest.raises(BalanceError, match="8 tokens do not make 0 equal sections"):
        tally(routing, sections=0)
    with pytest.raises(BalanceError, match=re.escape("no balance loss is called 'mega'; did you mean 'megatron'?")):
        balance_loss(tally(routing), "mega")  # type: ignore[arg-type]
    with pytest.raises(BalanceError, match=r"counts of a tally are torch\.bfloat16; count in int64"):
        Tally(torch.zeros(1, 4).bfloat16(), torch.zeros(4), torch.tensor(8))
    with pytest.raises(BalanceError, match="hash routers need no loss"):
        tally(HashRouter.modulo(vocabulary=8, num_experts=4).route(torch.arange(8)))
    with pytest.raises(RoutingError, match=r"real is torch\.bool \[7\]"):
        z_loss(flat_logits(), real=torch.ones(7, dtype=torch.bool))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_deepspeed_computes_the_same() -> None:
    sharded_moe = pytest.importorskip("deepspeed.moe.sharded_moe", reason="the extra 'deepspeed' is not installed")
    logits = flat_logits().float()
    theirs = {
        (1, "switch"): sharded_moe.top1gating(logits, 1.0, 1, use_rts=False)[0],
        (2, "switch"): sharded_moe.top2gating(logits, 1.0, 1, top2_2nd_expert_sampling=False)[0],
        (3, "megatron"): sharded_moe.topkgating(logits, 3, 1.0, 1)[0],
    }
    for (k, family), expected in theirs.items():
        found = balance_loss(tally(TopK(num_experts=4, k=k).route(logits)), family)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
