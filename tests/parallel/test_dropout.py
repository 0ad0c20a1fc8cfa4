"""Ranks that hold a share of a tensor drop what the plain run drops."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from meshwright.parallel import dropout
from meshwright.parallel.blockwise.calls import AttentionCall
from meshwright.parallel.blockwise.plugs import plugged
from meshwright.parallel.dropout import PlainDropout
from meshwright.parallel.tensor_plan import Drop


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_a_share_of_the_mask_is_the_plain_mask(order: tuple[int, int, int]) -> None:
    inverse = [order.index(dim) for dim in range(3)]
    whole = torch.ones([(4, 6, 5)[dim] for dim in order]).permute(inverse)  # memory in another order than dims
    torch.manual_seed(0)
    plain, after = functional.dropout(whole, 0.4), torch.rand(1)
    for rank, (start, stop) in enumerate([(0, 2), (2, 6)]):
        torch.manual_seed(0)
        with PlainDropout([Drop(1, (2, 4))], rank=rank):
            share = functional.dropout(whole[:, start:stop], 0.4)
        assert torch.equal(share, plain[:, start:stop])
        assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize("causal", [True, False])
def test_dropping_attention_is_torchs_own(causal: bool) -> None:
    query, key, value = torch.randn(3, 2, 4, 6, 8, dtype=torch.float64)
    torch.manual_seed(0)
    plain = functional.scaled_dot_product_attention(query, key, value, dropout_p=0.3, is_causal=causal)
    torch.manual_seed(0)
    with PlainDropout([Drop(1, (1, 3))], rank=1):
        mine = functional.scaled_dot_product_attention(
            query[:, 1:], key[:, 1:], value[:, 1:], dropout_p=0.3, is_causal=causal
        )
    torch.testing.assert_close(mine, plain[:, 1:], rtol=1e-12, atol=1e-12)


def test_nothing_is_drawn_where_nothing_is_dropped() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with PlainDropout():
        functional.dropout(torch.ones(3), 0.5, training=False)
    assert torch.equal(torch.rand(1), expected)


def test_no_lock_is_held_over_attention_that_arrives_elsewhere() -> None:
    attention, given = nn.MultiheadAttention(4, 2, dropout=0.5), torch.ones(3, 1, 4)
    locked: list[bool] = []

    def attend(call: AttentionCall) -> Tensor:
        locked.append(dropout._DEFAULT_GENERATOR.locked())
        return call.value

    with plugged(attention, attend), PlainDropout(generator=torch.Generator()):
        attention(given, given, given)
    with PlainDropout(generator=torch.Generator()):
        attention(given, given, given)
    assert locked == [False]
