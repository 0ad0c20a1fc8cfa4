"""The critical path of causal rings, by dealing."""

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from meshwright.parallel.context.balance import causal_scores, critical_path
from meshwright.parallel.context.dealing import Dealing

RANGES = some.builds(range, some.integers(0, 12), some.integers(0, 30), some.integers(1, 4))


@given(RANGES, RANGES)
def test_scores_are_counted(queries: range, keys: range) -> None:
    assert causal_scores((queries,), (keys,)) == sum(key <= query for query in queries for key in keys)


@given(some.sampled_from(["contiguous", "zigzag", "striped"]), some.integers(1, 8), some.integers(1, 60))
def test_every_score_belongs_to_one_rank_and_hop(dealt: Any, degree: int, length: int) -> None:
    dealing = Dealing(dealt, degree)
    pieces = [dealing.pieces(length, rank) for rank in range(degree)]
    assert sum(causal_scores(one, other) for one in pieces for other in pieces) == length * (length + 1) // 2
    assert critical_path(dealing, length) >= 1


@pytest.mark.parametrize("degree", [2, 4, 8, 64])
def test_the_table_of_dealings(degree: int) -> None:
    chunk = 1024
    ratio = {kind: critical_path(Dealing(kind, degree), chunk * degree) for kind in ("contiguous", "zigzag", "striped")}
    assert abs(ratio["contiguous"] - Fraction(2 * degree - 1, degree)) < Fraction(1, chunk)
    assert ratio["zigzag"] == 1
    assert 1 < ratio["striped"] < 1 + Fraction(1, chunk)
