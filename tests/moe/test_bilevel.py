"""Bi-level routing: golden numbers, equality with a flat router on outer sums, both kinds of intra gates, capacity."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from meshwright.moe.bilevel import BiLevel
from meshwright.moe.capacity import Capacity, Peers
from meshwright.moe.errors import RoutingError
from meshwright.moe.top_k import TopK
from tests.moe.golden import inter_logits, intra_logits
from tests.moe.simulated import with_peers

GATES = [0.340302, 0.304305, 0.335060, 0.318929, 0.302795, 0.338441, 0.293457, 0.345253]
SIZES = some.tuples(some.integers(0, 20), some.integers(1, 5), some.integers(1, 5), some.integers(0, 2**30))


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outer_sum(inter: Tensor, intra: Tensor) -> Tensor:
    """Logits [tokens, n m] of the flat router that shared gates amount to."""
    return (inter[:, :, None] + intra[:, None]).flatten(1)


def test_the_golden_choices_and_gates() -> None:
    routing = BiLevel(num_nodes=2, num_local=4).route(inter_logits(), intra_logits())
    assert routing.experts.flatten().tolist() == [4, 4, 0, 0, 3, 3, 7, 7]
    assert [round(gate, 6) for gate in routing.weights.flatten().tolist()] == GATES


@settings(max_examples=30)
@given(SIZES)
def test_one_intra_gate_for_all_nodes_is_a_flat_router_on_outer_sums(sizes: tuple[int, int, int, int]) -> None:
    tokens, n, m, seed = sizes
    inter, intra = drawn(tokens, n, seed=seed), drawn(tokens, m, seed=seed + 1)
    upstream, of_scores = drawn(tokens, 1, seed=seed + 2), drawn(tokens, n * m, seed=seed + 3)
    results = []
    for flat in (False, True):
        leaves = (inter.clone().requires_grad_(), intra.clone().requires_grad_())
        if flat:
            routing: Any = TopK(num_experts=n * m, k=1).route(outer_sum(*leaves))
        else:
            routing = BiLevel(num_nodes=n, num_local=m).route(*leaves)
        loss = (routing.weights * upstream).sum() + (routing.scores * of_scores).sum()
        results.append((routing, torch.autograd.grad(loss, leaves)))
    (two, two_grads), (one, one_grads) = results
    assert torch.equal(two.experts, one.experts)
    for found, expected in (
        (two.weights, one.weights),
        (two.scores, one.scores),
        *zip(two_grads, one_grads, strict=True),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("capacity", [Capacity(factor=0.7), Capacity(factor=0.7, order="score")])
def test_it_also_drops_what_the_flat_router_drops(capacity: Capacity) -> None:
    inter, intra = drawn(40, 2, seed=0), drawn(40, 3, seed=1)
    two = BiLevel(num_nodes=2, num_local=3, capacity=capacity).route(inter, intra)
    one = TopK(num_experts=6, k=1, capacity=capacity).route(outer_sum(inter, intra))
    assert torch.equal(two.kept, one.kept)
    assert 0 < int(two.drops()) < 40


def test_one_gate_for_each_node_that_are_all_alike_is_one_gate_for_all() -> None:
    inter, intra = drawn(30, 3, seed=0), drawn(30, 4, seed=1)
    router = BiLevel(num_nodes=3, num_local=4, k_nodes=2, k_local=2)
    shared = router.route(inter, intra)
    each = router.route(inter, intra[:, None].expand(30, 3, 4))
    for name in ("experts", "weights", "kept", "scores", "node_scores"):
        assert torch.equal(getattr(shared, name), getattr(each, name)), name
    assert each.local_scores.shape == (30, 3, 4)


@given(SIZES, some.integers(1, 5), some.integers(1, 5), some.booleans(), some.booleans())
def test_choices_are_those_of_the_definition(
    sizes: tuple[int, int, int, int], k_nodes: int, k_local: int, shared: bool, renormalise: bool
) -> None:
    tokens, n, m, seed = sizes
    k_nodes, k_local = min(k_nodes, n), min(k_local, m)
    inter = drawn(tokens, n, seed=seed)
    intra = drawn(tokens, m, seed=seed + 1) if shared else drawn(tokens, n, m, seed=seed + 1)
    router = BiLevel(num_nodes=n, num_local=m, k_nodes=k_nodes, k_local=k_local, renormalise=renormalise, scale=2.0)
    routing = router.route(inter, intra)
    p, q = inter.softmax(-1), (intra[:, None].expand(tokens, n, m) if shared else intra).softmax(-1)
    for token in range(tokens):
        nodes = p[token].topk(k_nodes).indices.tolist()
        expected = [(i, j) for i in nodes for j in q[token, i].topk(k_local).indices.tolist()]
        assert routing.experts[token].tolist() == [i * m + j for i, j in expected]
        weights = torch.stack([p[token, i] * q[token, i, j] for i, j in expected])
        weights = weights / weights.sum() if renormalise else weights
        torch.testing.assert_close(routing.weights[token], 2.0 * weights, rtol=1e-12, atol=0)
    assert routing.scores is not None
    torch.testing.assert_close(routing.scores, (p[..., None] * q).flatten(1), rtol=1e-12, atol=0)
    assert (routing.num_nodes, routing.num_local, routing.num_experts) == (n, m, n * m)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("renormalise", [True, False])
def test_gradients(shared: bool, renormalise: bool) -> None:
    router = BiLevel(
        num_nodes=3,
        num_local=2,
        k_nodes=2,
        k_local=2 if renormalise else 1,
        renormalise=renormalise,
        node_capacity=Capacity(factor=0.8),
        capacity=Capacity(factor=0.9),
    )

    def decided(inter: Tensor, intra: Tensor) -> tuple[Tensor, ...]:
        routing = router.route(inter, intra)
        assert routing.scores is not None
        return routing.weights, routing.scores, routing.node_scores, routing.local_scores

    shape = (6, 2) if shared else (6, 3, 2)
    leaves = drawn(6, 3, seed=0).requires_grad_(), drawn(*shape, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(decided, leaves)


@given(SIZES, some.integers(1, 3), some.integers(1, 3), some.floats(0.2, 1.5), some.floats(0.2, 1.5))
def test_drops_of_both_levels_compose(
    sizes: tuple[int, int, int, int], k_nodes: int, k_local: int, at_nodes: float, at_experts: float
) -> None:
    tokens, n, m, seed = sizes
    k_nodes, k_local = min(k_nodes, n), min(k_local, m)
    plain: Any = {"num_nodes": n, "num_local": m, "k_nodes": k_nodes, "k_local": k_local}
    first, second = Capacity(factor=at_nodes), Capacity(factor=at_experts)
    logits = drawn(tokens, n, seed=seed), drawn(tokens, n, m, seed=seed + 1)
    free = BiLevel(**plain).route(*logits)
    found = BiLevel(**plain, node_capacity=first, capacity=second).route(*logits)
    slots = first.slots(num_choices=tokens * k_nodes, num_experts=n)
    node_slots = second.slots(num_choices=tokens * k_nodes * k_local, num_experts=n * m)
    expected = torch.zeros_like(free.kept)
    seen = dict.fromkeys(range(n), 0)
    for level in range(k_nodes):
        for token in range(tokens):
            node = int(free.experts[token, level * k_local]) // m
            expected[token, level * k_local : (level + 1) * k_local] = seen[node] < slots
            seen[node] += 1
    loads = dict.fromkeys(range(n * m), 0)
    for choice in range(k_nodes * k_local):
        for token in range(tokens):
            expert = int(free.experts[token, choice])
            if expected[token, choice]:
                expected[token, choice] = loads[expert] < node_slots
                loads[expert] += 1
    assert torch.equal(found.kept, expected)
    assert torch.equal(found.weights, torch.where(expected, free.weights, 0.0))
    assert torch.equal(found.counts(), free.counts())


@pytest.mark.parametrize("shares", [[9, 4, 0, 11], [24]])
def test_ranks_that_share_slots_drop_at_both_levels_what_one_process_drops(shares: list[int]) -> None:
    tight = Capacity(factor=0.8)
    router = BiLevel(num_nodes=3, num_local=2, k_nodes=2, k_local=2, node_capacity=tight, capacity=tight)
    logits = drawn(24, 3, seed=0), drawn(24, 3, 2, seed=1)
    whole, real = router.route(*logits, real=torch.arange(24) % 7 != 0), torch.arange(24) % 7 != 0
    cut = [each.split(shares) for each in (*logits, real)]

    def part(peers: Peers) -> Any:
        inter, intra, own = (each[peers.rank] for each in cut)
        return router.route(inter, intra, real=own, peers=peers)

    found = with_peers(len(shares), part)
    assert torch.equal(torch.cat([each.kept for each in found]), whole.kept)
    assert torch.equal(torch.cat([each.weights for each in found]), whole.weights)
    assert 0 < int(whole.drops()) < 24


def test_a_dropped_token_has_no_gradient_at_either_level() -> None:
    inter, intra = torch.zeros(3, 2).requires_grad_(), torch.tensor([[1.0, 0.0]]).repeat(3, 1).requires_grad_()
    routing = BiLevel(num_nodes=2, num_local=2, node_capacity=Capacity(factor=0.5)).route(inter, intra)
    assert routing.kept.flatten().tolist() == [True, False, False]
    routing.weights.sum().backward()
    assert inter.grad is not None
    assert intra.grad is not None
    for grad in (inter.grad, intra.grad):
        assert grad[0].abs().min() > 0
        assert grad[1:].tolist() == [[0.0, 0.0]] * 2


def test_padding_goes_nowhere_and_needs_no_slots() -> None:
    inter, intra = drawn(4, 2, seed=0), drawn(4, 2, seed=1)
    router = BiLevel(num_nodes=2, num_local=2, node_capacity=Capacity(factor=1.0), capacity=Capacity(factor=1.0))
    bare = router.route(inter, intra)
    spoilt = torch.full((1, 2), torch.nan, dtype=torch.float64)
    real = torch.tensor([False, True, True, True, True])
    padded = router.route(torch.cat([spoilt, inter]), torch.cat([spoilt, intra]), real=real)
    assert torch.equal(padded.weights[1:], bare.weights)
    assert padded.weights[0].tolist() == [0.0]
    assert torch.equal(padded.loads(), bare.loads())
    assert torch.equal(padded.counts(), bare.counts())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k_nodes": 3}, "k=3 of 2 nodes for each token; use 1 to 2"),
        ({"k_local": 5}, "k=5 of 4 experts of a node for each token; use 1 to 4"),
        ({"scale": -1.0}, "weights scaled by -1.0"),
        ({"node_capacity": Capacity(factor=1.0), "num_nodes": 0}, "k=1 of 0 nodes"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RoutingError, match=re.escape(words)):
        BiLevel(**{"num_nodes": 2, "num_local": 4, **options})


@pytest.mark.parametrize(
    ("inter", "intra", "words"),
    [
        ((8, 2), (7, 4), "logits [8, 2] and [7, 4] of a router for 2 nodes of 4 experts"),
        ((8, 2), (8, 4, 2), "intra is [tokens, 4] of one gate for all nodes, or [tokens, 2, 4] of one for each"),
        ((8, 3), (8, 4), "inter logits [8, 3] do not end with the 2 scores"),
    ],
)
def test_logits_that_do_not_fit_are_refused(inter: tuple[int, ...], intra: tuple[int, ...], words: str) -> None:
    with pytest.raises(RoutingError, match=re.escape(words)):
        BiLevel(num_nodes=2, num_local=4).route(torch.zeros(inter), torch.zeros(intra))


def test_a_nan_is_named_with_its_gate() -> None:
    intra = torch.zeros(3, 2, 2)
    intra[2, 1, 0] = torch.nan
    with pytest.raises(RoutingError, match=r"intra logits of token 2 cannot be routed: \[nan, 0\]"):
        BiLevel(num_nodes=2, num_local=2).route(torch.zeros(3, 2), intra)
