"""Rows on their way while something else is computed: the bits of exchanges that are waited for, both ways."""

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.autograd.function import Function

from meshwright.moe import flight as module
from meshwright.moe.axes import ExpertAxes, RowAxis
from meshwright.moe.experts import FeedForward, gated, mix
from meshwright.moe.flight import Flight
from meshwright.moe.top_k import TopK
from meshwright.moe.transports import transport
from meshwright.moe.travel import Splits, exchange
from meshwright.parallel.mesh import Mesh
from meshwright.testing import run_ranks
from tests.moe.threads import on_threads

MESH = Mesh(dp=3, ep=3)
SENT = ((2, 0, 3), (1, 1, 0), (0, 0, 4))


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def splits(rank: int) -> Splits:
    return Splits(SENT[rank], tuple(each[rank] for each in SENT))


def flown(axis: RowAxis, way: Splits, *tensors: Tensor) -> tuple[Tensor, ...]:
    flight = Flight(axis, way)
    flight.leave(*tensors)
    return flight.arrive()


def given(rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows and weights with gradients, places and rows without."""
    number = sum(SENT[rank])
    rows, weights = drawn(number, 2, 3, seed=rank), drawn(number, 1, seed=9 + rank, dtype=torch.float32)
    places = torch.arange(number)[:, None] + 100 * rank
    return rows.requires_grad_(), weights.requires_grad_(), places, drawn(number, 2, seed=7 + rank)


def there_and_back(rank: int, axes: ExpertAxes, way: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
    rows, weights, places, fixed = given(rank)
    found = way(axes.ep, splits(rank), rows, weights, places, fixed)
    loss = (found[0] * (1 + rank)).square().sum() + found[1].sin().sum() + found[3].sum()
    first = torch.autograd.grad(loss, (rows, weights), retain_graph=True)
    again = torch.autograd.grad(loss, (rows, weights))
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    return [*(each.detach() for each in found), *first]


def test_what_flies_is_what_is_exchanged_and_so_are_its_gradients() -> None:
    expected = on_threads(MESH, lambda rank, axes: there_and_back(rank, axes, exchange))
    found = on_threads(MESH, lambda rank, axes: there_and_back(rank, axes, flown))
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_a_backward_can_be_differentiated() -> None:
    def work(rank: int, axes: ExpertAxes) -> tuple[float, float, bool]:
        x = drawn(sum(SENT[rank]), 2, seed=rank).requires_grad_()
        y = drawn(sum(splits(rank).received), 2, seed=9 + rank).requires_grad_()
        (made,) = flown(axes.ep, splits(rank), x)
        (back,) = torch.autograd.grad(made, x, y, create_graph=True)
        (again,) = torch.autograd.grad(back, y, x.detach())
        return (made * y).sum().item(), (x * back).sum().item(), torch.equal(again, made)

    there, back, same = zip(*on_threads(MESH, work), strict=True)
    assert abs(sum(there) - sum(back)) < 1e-12
    assert all(same)


def test_without_gradients_nothing_is_sent_back() -> None:
    def work(rank: int, axes: ExpertAxes) -> bool:
        with torch.no_grad():
            (made,) = flown(axes.ep, splits(rank), given(rank)[0])
        return made.requires_grad

    assert on_threads(MESH, work) == [False] * 3


class Noted(Function):
    """Says when it is gone back through."""

    @staticmethod
    def forward(ctx: object, value: Tensor, events: list[str], what: str) -> Tensor:
        ctx.events, ctx.what = events, what  # type: ignore[attr-defined]
        events.append(what)
        return value.clone()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.events.append(ctx.what)  # type: ignore[attr-defined]
        return gradients[0], None, None


def noted_in(events: list[str], value: Tensor, what: str) -> Tensor:
    return Noted.apply(value, events, what)  # type: ignore[no-untyped-call, no-any-return]


def order_of(kind: str, halves: bool) -> tuple[list[str], list[Tensor], list[Tensor]]:
    """On a rank: what happened in which order, and results with and without anything on its way."""
    from meshwright.moe.axes import expert_axes
    from meshwright.parallel.collectives import Groups

    groups = Groups(Mesh(dp=4, ep=4, ep_node=2))
    way = transport(kind, expert_axes(groups))  # type: ignore[arg-type]
    events: list[str] = []

    def run() -> list[Tensor]:
        tokens = drawn(6, 3, seed=groups.rank).requires_grad_()
        beside = drawn(3, 3, seed=7).requires_grad_()
        up, down = (drawn(1, *shape, seed=groups.rank).requires_grad_() for shape in ((3, 8), (4, 3)))
        routing, experts = (
            TopK(num_experts=4, k=2).route(tokens @ drawn(3, 4, seed=1)),
            FeedForward(up=up, down=down, act=gated(torch.tanh)),
        )
        if halves:
            made = way.carry_halves(tokens, routing, lambda *given: noted_in(events, experts(*given), "experts"))
        else:
            made = mix(
                tokens,
                routing,
                transport=way,
                experts=experts,
                shared=lambda each: noted_in(events, each @ beside, "shared"),
            )
        made.square().sum().backward()
        leaves = (tokens, beside, up, down)
        return [made.detach(), *(each.grad for each in leaves if each.grad is not None)]

    starting = module.begun

    def noted(*args: object) -> Callable[[], Tensor]:
        events.append("leave")
        wait = starting(*args)  # type: ignore[arg-type]

        def arrived() -> Tensor:
            events.append("arrive")
            return wait()

        return arrived

    def at_once(axis: RowAxis, rows: Tensor, way: Splits) -> Callable[[], Tensor]:
        made = axis.exchange(rows, way.sent, way.received)
        return lambda: made

    with patch.object(module, "begun", noted):
        flying = run()
    kept = list(events)
    with patch.object(module, "begun", at_once):
        waiting = run()
    return kept, flying, waiting


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one_hop", "inter_first", "once"])
def test_shared_experts_compute_while_rows_fly_both_ways_with_the_bits_of_waiting(kind: str) -> None:
    meanwhile, alone = ["leave", "shared", "arrive"], ["leave", "arrive"]
    others = 1 if kind == "one_hop" else 3  # there and back
    there, back = [*meanwhile, *(alone * others)], [*(alone * others), *meanwhile]
    for events, flying, waiting in run_ranks(order_of, Mesh(dp=4, ep=4, ep_node=2), kind, False):
        assert events == [*there, *back]
        assert len(flying) == len(waiting) == 5
        assert all(torch.equal(*pair) for pair in zip(flying, waiting, strict=True))


@pytest.mark.slow
def test_one_half_of_the_tokens_travels_while_experts_compute_the_other_both_ways() -> None:
    way = ["leave", "leave", "arrive", "experts", "leave", "arrive", "experts", "leave", "arrive", "arrive"]
    for events, flying, waiting in run_ranks(order_of, Mesh(dp=4, ep=4, ep_node=2), "one_hop", True):
        assert events == way + way
        assert len(flying) == len(waiting) == 4
        assert all(torch.equal(*pair) for pair in zip(flying, waiting, strict=True))
