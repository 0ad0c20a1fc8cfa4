"""Attention that no plug reaches is noticed, and nothing else is taken for it."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from meshwright.parallel.blockwise.by_hand import HandWatch
from tests.parallel.blockwise.unplugged import by_hand


def _einsum(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * 0.5 + torch.ones(4, 4)
    return torch.einsum("bhqk,bhkd->bhqd", functional.softmax(scores.float(), dim=-1), value)


def _bmm(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (each.flatten(0, 1) for each in (query, key, value))
    scores = torch.baddbmm(torch.zeros(len(query), 4, 4), query, key.mT, alpha=0.5)
    shares = functional.dropout(nn.Softmax(-1)(scores.masked_fill(torch.eye(4).bool(), -math.inf)), 0.1)
    return torch.bmm(shares, value)


def _in_place(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.transpose(-1, -2)
    scores /= 2
    scores.add_(1)
    return torch.matmul(torch.softmax(scores, -1), value)


@pytest.mark.parametrize("attend", [by_hand, _einsum, _bmm, _in_place])
def test_product_softmax_product_is_attention(attend: Callable[..., Tensor]) -> None:
    with HandWatch(lambda: "here") as watch:
        for _ in range(2):
            attend(*torch.randn(3, 2, 2, 4, 8))
    assert watch.found == ["here"]


def _gated(x: Tensor) -> Tensor:
    weight = nn.Parameter(torch.randn(8, 3))
    return (x @ weight).softmax(-1).mT @ x  # pooling by learned weights: grows with the sequence


def _linear(x: Tensor) -> Tensor:
    return x.softmax(-1) @ (x.mT.softmax(-1) @ x)  # linear attention (arXiv 1812.01243)


@pytest.mark.parametrize("work", [_gated, _linear, lambda x: (x @ x.mT) @ x, lambda x: (x @ x.mT).softmax(-1)])
def test_other_products_and_softmaxes_are_none(work: Callable[[Tensor], Tensor]) -> None:
    with HandWatch(lambda: "here") as watch:
        work(torch.randn(2, 4, 8))
    assert watch.found == []
