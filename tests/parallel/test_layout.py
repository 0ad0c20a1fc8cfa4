"""Dealing a dim and joining it again is identity, for even, uneven, fused and replicated shares."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from meshwright.parallel.layout import Split, deal


@given(st.integers(0, 50), st.integers(1, 9))
def test_shares_are_contiguous_and_differ_by_at_most_one(size: int, degree: int) -> None:
    shares = deal(size, degree)
    assert [index for start, stop in shares for index in range(start, stop)] == list(range(size))
    sizes = [stop - start for start, stop in shares]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 20), st.integers(1, 5), st.integers(0, 1))
def test_taking_shares_and_joining_them_is_identity(size: int, degree: int, dim: int) -> None:
    shape = [3, 3]
    shape[dim] = size
    full = torch.arange(3 * size).reshape(shape)
    split = Split.even(dim, size, degree)
    assert torch.equal(split.join([split.take(full, rank) for rank in range(degree)]), full)


def test_a_fused_projection_is_dealt_by_segments() -> None:
    split = Split.of(0, 12, [[(0, 2), (4, 6), (8, 10)], [(2, 4), (6, 8), (10, 12)]])
    assert split.take(torch.arange(12), 1).tolist() == [2, 3, 6, 7, 10, 11]
    assert not split.duplicated
    assert split.clipped(4, 8) == (((4, 6),), ((6, 8),))


def test_rows_that_several_ranks_hold_have_one_interval() -> None:
    split = Split.of(0, 6, [[(0, 2), (4, 6)], [(2, 6)]])
    assert split.duplicated
    assert split.intervals == (((0, 2), (0,)), ((2, 4), (1,)), ((4, 6), (0, 1)))
    assert [split.local_start(rank, 4) for rank in (0, 1)] == [2, 2]
