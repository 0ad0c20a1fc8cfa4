"""Product keys: what two short lists of keys find is what all pairs would."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor

from meshwright.moe.errors import RoutingError
from meshwright.moe.product_keys import product_top_k


def drawn(seed: int, *shapes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def exhaustive(queries: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    first, second = queries.chunk(2, -1)
    return ((first @ rows.mT)[:, :, None] + (second @ columns.mT)[:, None]).flatten(1)


def test_eight_of_a_thousand_are_the_exhaustive_ones() -> None:
    queries, rows, columns = drawn(0, (200, 16), (32, 8), (32, 8))
    best = exhaustive(queries, rows, columns).topk(8)
    found = product_top_k(queries, rows, columns, k=8)
    assert torch.equal(found.experts, best.indices)
    torch.testing.assert_close(found.weights, best.values.softmax(-1), rtol=1e-12, atol=0)


@given(some.integers(0, 1000), some.integers(1, 6), some.integers(1, 6), some.data())
def test_any_numbers_of_rows_and_columns(seed: int, n: int, m: int, data: some.DataObject) -> None:
    k = data.draw(some.integers(1, n * m))
    queries, rows, columns = drawn(seed, (5, 6), (n, 3), (m, 3))
    best = exhaustive(queries, rows, columns).topk(k)
    assert torch.equal(product_top_k(queries, rows, columns, k=k).experts, best.indices)


def test_gradients_reach_queries_and_both_lists_of_keys() -> None:
    leaves = [each.requires_grad_() for each in drawn(1, (4, 6), (5, 3), (5, 3))]
    product_top_k(leaves[0], leaves[1], leaves[2], k=3).weights.square().sum().backward()
    again = [each.detach().clone().requires_grad_() for each in leaves]
    exhaustive(*again).topk(3).values.softmax(-1).square().sum().backward()
    for one, two in zip(leaves, again, strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-10, atol=1e-14)


def test_what_does_not_fit_is_refused() -> None:
    queries, rows, columns = drawn(2, (4, 6), (5, 3), (2, 3))
    with pytest.raises(RoutingError, match=re.escape("k=11 of 5 x 2 experts: use 1 to 10")):
        product_top_k(queries, rows, columns, k=11)
    with pytest.raises(RoutingError, match=re.escape("queries [4, 6], rows [5, 3] and columns [2, 2]")):
        product_top_k(queries, rows, columns[:, :2], k=1)
