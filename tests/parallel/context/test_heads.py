"""Every head is computed once, beside its key head."""

import pytest
from hypothesis import given
from hypothesis import strategies as some

from meshwright.parallel.context.heads import deal_heads
from meshwright.parallel.context.kinds import Hybrid, Ring, Ulysses, ulysses_degree
from meshwright.parallel.errors import WrapError


@given(some.integers(1, 8), some.integers(1, 6), some.integers(1, 24))
def test_heads_are_dealt_once_in_order_with_their_key_heads(kv_heads: int, group: int, degree: int) -> None:
    heads = kv_heads * group
    if degree > heads:
        with pytest.raises(WrapError, match=f"at most {heads}"):
            deal_heads(heads, kv_heads, degree)
        return
    dealt = deal_heads(heads, kv_heads, degree)
    assert [head for start, stop in dealt.queries for head in range(start, stop)] == list(range(heads))
    for (start, stop), (first, last) in zip(dealt.queries, dealt.keys, strict=True):
        per_key, rest = divmod(stop - start, last - first)
        assert rest == 0
        assert per_key > 0
        for head in range(start, stop):
            assert first + (head - start) // per_key == head // group  # what a kernel of grouped heads takes


def test_even_numbers_are_dealt_evenly() -> None:
    assert deal_heads(32, 8, 4).even
    assert deal_heads(32, 8, 16).even
    assert not deal_heads(28, 4, 8).even


def test_groups_divide_the_axis() -> None:
    assert [ulysses_degree(kind, 6) for kind in (Ring(), Ulysses(), Hybrid(3))] == [1, 6, 3]
    with pytest.raises(WrapError, match="groups of 4 ranks do not divide cp=6; choose ulysses from: 1, 2, 3, 6"):
        ulysses_degree(Hybrid(4), 6)
