"""Every block has one stage, every stage one rank, and cuts follow costs."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.parallel.errors import ScheduleError
from meshwright.parallel.pipeline.placements import Placement, balanced_cuts, contiguous, looped, modular, v_shaped


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 4))
def test_stages_hold_all_blocks_once_and_differ_by_one_at_most(blocks: int, ranks: int, loops: int) -> None:
    if blocks < ranks * loops:
        with pytest.raises(ScheduleError, match="nearest legal"):
            looped(blocks, ranks, num_loops=loops)
        return
    placement = looped(blocks, ranks, num_loops=loops)
    sizes = [len(placement.blocks(stage)) for stage in range(len(placement.homes))]
    assert sum(sizes) == blocks == placement.num_blocks
    assert max(sizes) - min(sizes) <= 1
    assert all(placement.stage_of(block) == stage for stage in range(len(sizes)) for block in placement.blocks(stage))


@given(st.integers(1, 30), st.integers(1, 8))
def test_modular_deals_block_l_to_rank_l_mod_p(blocks: int, ranks: int) -> None:
    if blocks < ranks:
        return
    placement = modular(blocks, ranks)
    assert [placement.homes[placement.stage_of(block)] for block in range(blocks)] == [b % ranks for b in range(blocks)]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(1, 9))
def test_balanced_cuts_are_the_best_of_all(costs: list[int], stages: int) -> None:
    if stages > len(costs):
        with pytest.raises(ScheduleError):
            balanced_cuts(costs, stages)
        return
    every = [(0, *inner, len(costs)) for inner in combinations(range(1, len(costs)), stages - 1)]
    dearest = [max(sum(costs[start:stop]) for start, stop in pairwise(cuts)) for cuts in every]
    cuts = balanced_cuts(costs, stages)
    assert cuts in every
    assert max(sum(costs[start:stop]) for start, stop in pairwise(cuts)) == min(dearest)


def test_unequal_blocks_are_cut_by_their_costs() -> None:
    assert contiguous(6, 2, costs=[5, 1, 1, 1, 1, 1]).cuts == (0, 1, 6)
    assert v_shaped(8, 2, costs=[1] * 8).homes == (0, 1, 1, 0)
    with pytest.raises(ScheduleError, match="3 costs were given for 4 blocks"):
        contiguous(4, 2, costs=[1, 2, 3])


@pytest.mark.parametrize(
    ("cuts", "homes", "why"),
    [
        ((0, 2, 2), (0, 1), "no blocks"),
        ((0, 1, 2), (0, 2), "no stage"),
        ((0, 1), (0, 1), "3 cuts"),
        ((1, 2), (0,), "begin"),
    ],
)
def test_a_placement_of_the_user_is_checked(cuts: tuple[int, ...], homes: tuple[int, ...], why: str) -> None:
    with pytest.raises(ScheduleError, match=why):
        Placement(cuts, homes)


def test_degrees_below_one_are_refused() -> None:
    with pytest.raises(ScheduleError, match="at least 1"):
        looped(4, 0, num_loops=1)
