"""Experts of a rank: plain and gated, with biases, shared ones, and gradients of the plain run's size."""

import re

import pytest
import torch
from torch import Tensor, nn

from meshwright.moe.axes import ExpertAxes
from meshwright.moe.errors import DispatchError
from meshwright.moe.experts import FeedForward, gated, mix
from meshwright.moe.top_k import TopK
from meshwright.moe.transports import transport
from meshwright.parallel.mesh import Mesh
from tests.moe.threads import on_threads

TOKENS = (5, 0, 3, 8)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(own: slice) -> dict[str, Tensor]:
    whole = {"up": (4, 3, 8), "down": (4, 4, 3), "up_bias": (4, 8), "down_bias": (4, 3)}
    return {name: drawn(*shape, seed=at)[own].requires_grad_() for at, (name, shape) in enumerate(whole.items())}


def test_plain_and_gated_ones_are_what_their_modules_compute() -> None:
    rows, counts = drawn(6, 3, seed=0), [2, 0, 3, 1]
    given = weights(slice(None))
    halves = FeedForward(**given, act=gated(nn.functional.silu))
    plain = FeedForward(up=given["up"], down=drawn(4, 8, 3, seed=9), act=torch.relu)
    parts = rows.split(counts)
    for expert, part in enumerate(parts):
        gate, up = (part @ given["up"][expert] + given["up_bias"][expert]).chunk(2, -1)
        inner = nn.functional.silu(gate) * up
        expected = inner @ given["down"][expert] + given["down_bias"][expert]
        at = slice(sum(counts[:expert]), sum(counts[: expert + 1]))
        torch.testing.assert_close(halves(rows, torch.tensor(counts))[at], expected, rtol=1e-14, atol=1e-14)
        expected = torch.relu(part @ given["up"][expert]) @ plain.down[expert]
        torch.testing.assert_close(plain(rows, torch.tensor(counts))[at], expected, rtol=1e-14, atol=1e-14)


def test_experts_without_rows_get_zeros_and_not_nothing() -> None:
    given = weights(slice(None))
    experts = FeedForward(**given, act=gated(torch.relu))
    for counts in ([0, 0, 0, 0], [2, 0, 0, 0]):
        made = experts(drawn(sum(counts), 3, seed=0), torch.tensor(counts))
        for each in torch.autograd.grad(made.sum(), list(given.values())):
            assert torch.equal(each[1:], torch.zeros_like(each[1:]))


@pytest.mark.parametrize("kind", ["one_hop", "once", "all_gather"])
def test_gradients_have_the_plain_size_with_shared_experts(kind: str) -> None:
    def run(first: int, last: int, axes: ExpertAxes, ranks: range) -> list[Tensor]:
        given, beside = weights(slice(first, last)), drawn(3, 3, seed=7).requires_grad_()
        tokens = torch.cat([drawn(TOKENS[rank], 3, seed=20 + rank) for rank in ranks])
        logits = torch.cat([drawn(TOKENS[rank], 4, seed=30 + rank) for rank in ranks])
        made = mix(
            tokens,
            TopK(num_experts=4, k=2).route(logits),
            transport=transport(kind, axes),  # type: ignore[arg-type]
            experts=FeedForward(**given, act=gated(nn.functional.gelu)),
            shared=lambda each: each @ beside,
            shared_weight=logits[:, :1].sigmoid(),
        )
        loss = made.square().sum() / sum(TOKENS)  # each rank's part of a mean over all tokens
        return [loss.detach(), *torch.autograd.grad(loss, [*given.values(), beside])]

    mesh = Mesh(dp=4, ep=4, ep_node=2)
    found = on_threads(mesh, lambda rank, axes: run(rank, rank + 1, axes, range(rank, rank + 1)))
    (plain,) = on_threads(Mesh(), lambda _, axes: run(0, 4, axes, range(4)))
    *own, shared = zip(*found, strict=True)
    summed, expected_shared = (torch.stack(each).sum(0) for each in (own[0], shared))
    torch.testing.assert_close(summed, plain[0], rtol=1e-13, atol=0)
    torch.testing.assert_close(expected_shared, plain[-1], rtol=1e-12, atol=1e-13)
    for parts, whole in zip(own[1:], plain[1:-1], strict=True):
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-13)


def test_shared_experts_are_added_by_their_weight() -> None:
    (axes,) = on_threads(Mesh(), lambda _, axes: axes)
    tokens, logits = drawn(5, 3, seed=0), drawn(5, 4, seed=1)
    routing, way = TopK(num_experts=4, k=2).route(logits), transport("one_hop", axes)
    experts = FeedForward(**weights(slice(None)), act=gated(torch.tanh))
    alone = mix(tokens, routing, transport=way, experts=experts)
    beside = mix(tokens, routing, transport=way, experts=experts, shared=torch.cos)
    torch.testing.assert_close(beside, alone + tokens.cos(), rtol=0, atol=0)
    half = mix(tokens, routing, transport=way, experts=experts, shared=torch.cos, shared_weight=logits[:, :1])
    torch.testing.assert_close(half, alone + tokens.cos() * logits[:, :1], rtol=0, atol=0)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DispatchError, match=re.escape("experts with {'up': 2, 'down': 3}: all have one first dim")):
        FeedForward(up=torch.zeros(2, 3, 4), down=torch.zeros(3, 4, 3), act=torch.relu)
    (axes,) = on_threads(Mesh(), lambda _, axes: axes)
    routing = TopK(num_experts=4, k=1).route(drawn(3, 4, seed=0))
    with pytest.raises(DispatchError, match="experts made 2 rows of 3; they give one for each"):
        mix(drawn(3, 2, seed=0), routing, transport=transport("one_hop", axes), experts=lambda rows, _: rows[1:])
