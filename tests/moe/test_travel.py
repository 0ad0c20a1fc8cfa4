"""Rows that travel, and gradients that travel back, twice."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from meshwright.moe.axes import ExpertAxes
from meshwright.moe.travel import Splits, exchange, gather_rows, scatter_rows
from meshwright.parallel.mesh import Mesh
from tests.moe.threads import on_threads

MESH = Mesh(dp=3, ep=3)
SENT = ((2, 0, 3), (1, 1, 0), (0, 0, 4))
SIZES = (4, 0, 2)


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def splits(rank: int) -> Splits:
    return Splits(SENT[rank], tuple(each[rank] for each in SENT))


def test_several_tensors_of_several_dtypes_share_a_message() -> None:
    def work(rank: int, axes: ExpertAxes) -> tuple[Tensor, ...]:
        number = sum(SENT[rank])
        rows = drawn(number, 2, 3, seed=rank, dtype=torch.bfloat16)
        places = torch.arange(number, dtype=torch.int32)[:, None] + 100 * rank
        return exchange(axes.ep, splits(rank), rows, places, drawn(number, 1, seed=rank))

    for rank, (rows, places, weights) in enumerate(on_threads(MESH, work)):
        expected = []
        for source in range(3):
            first = sum(SENT[source][:rank])
            expected += [(source, row) for row in range(first, first + SENT[source][rank])]
        assert places.flatten().tolist() == [100 * source + row for source, row in expected]
        for at, (source, row) in enumerate(expected):
            number = sum(SENT[source])
            assert torch.equal(rows[at], drawn(number, 2, 3, seed=source, dtype=torch.bfloat16)[row])
            assert torch.equal(weights[at], drawn(number, 1, seed=source)[row])


def adjoint(forward: Callable[[int, ExpertAxes, Tensor], Tensor], inputs: Any, outputs: Any) -> None:
    """<forward(x), y> summed over ranks equals <x, backward(y)>, and the gradient of a gradient is forward again."""

    def work(rank: int, axes: ExpertAxes) -> tuple[float, float, bool]:
        x = drawn(inputs(rank), 2, seed=rank).requires_grad_()
        y = drawn(outputs(rank), 2, seed=9 + rank).requires_grad_()
        made = forward(rank, axes, x)
        (back,) = torch.autograd.grad(made, x, y, create_graph=True)
        (again,) = torch.autograd.grad(back, y, x.detach())
        return (made * y).sum().item(), (x * back).sum().item(), torch.equal(again, made)

    there, back, same = zip(*on_threads(MESH, work), strict=True)
    assert abs(sum(there) - sum(back)) < 1e-12
    assert all(same)


def test_gradients_take_the_way_back() -> None:
    adjoint(
        lambda rank, axes, x: exchange(axes.ep, splits(rank), x)[0],
        lambda rank: sum(SENT[rank]),
        lambda rank: sum(splits(rank).received),
    )
    adjoint(lambda _, axes, x: gather_rows(axes.ep, SIZES, x)[0], SIZES.__getitem__, lambda _: sum(SIZES))
    adjoint(lambda _, axes, x: scatter_rows(axes.ep, SIZES, x)[0], lambda _: sum(SIZES), SIZES.__getitem__)


def test_nobody_having_rows_is_ordinary() -> None:
    def work(rank: int, axes: ExpertAxes) -> list[int]:
        nothing = torch.zeros(0, 2, requires_grad=True)
        made = [
            *exchange(axes.ep, Splits((0, 0, 0), (0, 0, 0)), nothing, torch.zeros(0, 1)),
            *gather_rows(axes.ep, (0, 0, 0), nothing),
            *scatter_rows(axes.ep, (0, 0, 0), nothing),
        ]
        assert made[0].requires_grad
        return [len(each) for each in made]

    assert on_threads(MESH, work) == [[0, 0, 0, 0]] * 3
