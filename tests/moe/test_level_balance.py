"""The additive loss of bi-level routing, and what it does not see."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor

from meshwright.moe.balance import balance_loss, tally
from meshwright.moe.bilevel import BiLevel, BiLevelRouting
from meshwright.moe.capacity import Capacity
from meshwright.moe.errors import BalanceError
from meshwright.moe.level_balance import LevelTallies, bilevel_loss, tally_levels
from meshwright.moe.top_k import TopK
from tests.moe.golden import inter_logits, intra_logits

SIZES = some.tuples(some.integers(1, 20), some.integers(1, 4), some.integers(1, 4), some.integers(0, 2**30))


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_golden_losses() -> None:
    routing = BiLevel(num_nodes=2, num_local=4).route(inter_logits(), intra_logits())
    found = tally_levels(routing)
    assert found.nodes.counts.tolist() == [[4, 4]]
    assert found.local.counts.tolist() == [[4, 0, 0, 4]]
    assert balance_loss(found.nodes).item() == pytest.approx(1.0, rel=1e-15)
    assert balance_loss(found.local).item() == pytest.approx(1.2484568311805968, rel=1e-15)
    flat = TopK(num_experts=8, k=1).route((inter_logits()[:, :, None] + intra_logits()[:, None]).flatten(1))
    assert balance_loss(found.joint).item() == pytest.approx(1.2484568311805968, rel=1e-15)
    assert balance_loss(tally(flat)).item() == pytest.approx(1.2484568311805968, rel=1e-15)


def test_both_levels_can_be_perfect_while_half_of_the_experts_idle() -> None:
    logits = 60.0 * torch.eye(2, dtype=torch.float64).repeat(4, 1)  # tokens half at (0, 0) and half at (1, 1)
    routing = BiLevel(num_nodes=2, num_local=2).route(logits, logits)
    assert routing.loads().tolist() == [4, 0, 0, 4]
    found = tally_levels(routing)
    assert bilevel_loss(found, nodes=1.0, local=0.0).item() == pytest.approx(1.0, abs=1e-12)
    assert bilevel_loss(found, nodes=0.0, local=1.0).item() == pytest.approx(1.0, abs=1e-12)
    assert bilevel_loss(found, nodes=0.0, local=0.0, joint=1.0).item() == pytest.approx(2.0, abs=1e-12)


@pytest.mark.parametrize("shared", [True, False])
def test_all_even_costs_the_sum_of_the_coefficients(shared: bool) -> None:
    tokens = torch.arange(24)
    inter = torch.nn.functional.one_hot(tokens % 3, 3) * 1e-9  # decides, and leaves scores even
    intra = torch.nn.functional.one_hot(tokens // 3 % 4, 4) * 1e-9
    intra = intra if shared else intra[:, None].expand(24, 3, 4)
    routing = BiLevel(num_nodes=3, num_local=4).route(inter.double(), intra.double())
    assert routing.loads().tolist() == [2] * 12
    loss = bilevel_loss(tally_levels(routing), nodes=0.5, local=0.25, joint=2.0)
    assert loss.item() == pytest.approx(2.75, rel=1e-8)


def by_definition(routing: BiLevelRouting, k_nodes: int) -> tuple[float, float, float]:
    """The three terms, token by token, in plain numbers."""
    n, m, each, tokens = routing.num_nodes, routing.num_local, routing.k_local, routing.num_tokens
    chosen = [[(e // m, e % m) for e in row] for row in routing.experts.tolist()]
    p, q = routing.node_scores, routing.local_scores
    nodes = sum(
        n * p[:, i].mean().item() * sum(i in dict(row) for row in chosen) / (k_nodes * tokens) for i in range(n)
    )
    joint = 0.0
    for i in range(n):
        for j in range(m):
            fraction = sum((i, j) in row for row in chosen) / (k_nodes * each * tokens)
            of_j = q[:, j] if q.dim() == 2 else q[:, i, j]
            joint += n * m * fraction * (p[:, i] * of_j).mean().item()
    if q.dim() == 2:
        local = sum(
            m * q[:, j].mean().item() * sum(j in {at for _, at in row} for row in chosen) / (each * tokens)
            for j in range(m)
        )
        return nodes, local, joint
    local = 0.0
    for i in range(n):
        mine = [token for token, row in enumerate(chosen) if i in dict(row)]
        for j in range(m) if mine else ():
            fraction = sum((i, j) in chosen[token] for token in mine) / (each * len(mine))
            local += len(mine) / (k_nodes * tokens) * m * fraction * q[mine, i, j].mean().item()
    return nodes, local, joint


@given(SIZES, some.integers(1, 3), some.integers(1, 3), some.booleans())
def test_the_terms_are_those_of_the_formula(
    sizes: tuple[int, int, int, int], k_nodes: int, k_local: int, shared: bool
) -> None:
    tokens, n, m, seed = sizes
    k_nodes, k_local = min(k_nodes, n), min(k_local, m)
    intra = drawn(tokens, m, seed=seed + 1) if shared else drawn(tokens, n, m, seed=seed + 1)
    routing = BiLevel(num_nodes=n, num_local=m, k_nodes=k_nodes, k_local=k_local).route(
        drawn(tokens, n, seed=seed), intra
    )
    found = tally_levels(routing)
    expected = by_definition(routing, k_nodes)
    for number, term in enumerate(expected):
        weights = dict.fromkeys(("nodes", "local", "joint"), 0.0) | {("nodes", "local", "joint")[number]: 1.0}
        assert bilevel_loss(found, **weights).item() == pytest.approx(term, rel=1e-11)


@given(some.lists(some.integers(0, 9), min_size=1, max_size=4), some.booleans(), some.integers(0, 2**30))
def test_parts_of_ranks_add_up_to_the_loss_of_the_batch(shares: list[int], shared: bool, seed: int) -> None:
    tokens, router = sum(shares), BiLevel(num_nodes=3, num_local=2, k_nodes=2)
    leaves = [drawn(tokens, 3, seed=seed), drawn(tokens, *([2] if shared else [3, 2]), seed=seed + 1)]
    leaves = [each.requires_grad_() for each in leaves]
    coefficients: Any = {"nodes": 0.3, "local": 0.5, "joint": 0.7}
    whole = bilevel_loss(tally_levels(router.route(*leaves)), **coefficients)
    tallies = [tally_levels(router.route(*part)) for part in zip(*(each.split(shares) for each in leaves), strict=True)]
    vectors: list[Tensor] = []
    for each in tallies:
        each.summed(lambda own: vectors.append(own) or own)  # type: ignore[func-returns-value]
    assert len(vectors) == len(tallies)
    total = torch.stack(vectors).sum(0)
    found = torch.stack([bilevel_loss(each.summed(lambda _: total), **coefficients) for each in tallies]).sum()
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-15)
    ours, theirs = (torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (found, whole))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-15)
    together = tallies[0]
    for each in tallies[1:]:
        together = together + each
    torch.testing.assert_close(bilevel_loss(together, **coefficients), whole, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("shared", [True, False])
def test_padding_costs_nothing_and_drops_count(shared: bool) -> None:
    inter, intra = drawn(9, 2, seed=0), drawn(9, *([3] if shared else [2, 3]), seed=1)
    router = BiLevel(num_nodes=2, num_local=3, k_local=2)
    real = torch.arange(12) < 9
    padded = [torch.cat([each, torch.full_like(each[:3], torch.nan)]) for each in (inter, intra)]
    tight = replace(router, node_capacity=Capacity(factor=0.5), capacity=Capacity(factor=0.5))
    losses = [
        bilevel_loss(tally_levels(routing), nodes=1.0, local=1.0, joint=1.0)
        for routing in (router.route(inter, intra), router.route(*padded, real=real), tight.route(inter, intra))
    ]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-14)
    assert losses[2].item() == losses[0].item()


@pytest.mark.parametrize("shared", [True, False])
def test_gradients(shared: bool) -> None:
    def loss(inter: Tensor, intra: Tensor) -> Tensor:
        found = tally_levels(BiLevel(num_nodes=2, num_local=3, k_local=2).route(inter, intra))
        return bilevel_loss(found, nodes=0.1, local=0.2, joint=0.3)

    leaves = drawn(5, 2, seed=0).requires_grad_(), drawn(5, *([3] if shared else [2, 3]), seed=1).requires_grad_()
    assert torch.autograd.gradcheck(loss, leaves)


def test_a_coefficient_that_pushes_tokens_together_is_refused() -> None:
    found: LevelTallies = tally_levels(BiLevel(num_nodes=2, num_local=4).route(inter_logits(), intra_logits()))
    with pytest.raises(BalanceError, match=r"local=-0\.1: a coefficient is 0 or above, such as 0\.005"):
        bilevel_loss(found, nodes=0.1, local=-0.1)
