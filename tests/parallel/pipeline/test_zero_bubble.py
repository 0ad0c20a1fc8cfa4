"""Splitting backward leaves the bubble of the literature."""

import pytest

from meshwright.parallel.errors import ScheduleError
from meshwright.parallel.pipeline.check import check
from meshwright.parallel.pipeline.orders import one_forward_one_backward
from meshwright.parallel.pipeline.placements import v_shaped
from meshwright.parallel.pipeline.timeline import Costs, timeline
from meshwright.parallel.pipeline.zero_bubble import zero_bubble_h1, zero_bubble_v

_EQUAL = Costs(forward=1, backward=2)  # forward and both halves of backward take 1


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_h1_idles_a_third_of_1f1b_and_holds_as_much(ranks: int) -> None:
    for microbatches in (ranks, 2 * ranks, 3 * ranks):
        split = zero_bubble_h1(range(ranks), microbatches)
        whole = one_forward_one_backward(range(ranks), microbatches)
        idle = timeline(split, _EQUAL).makespan - 3 * microbatches
        assert idle == ranks - 1
        assert timeline(whole, _EQUAL).makespan - 3 * microbatches == 3 * idle
        assert max(check(split).peak_activations) == max(check(whole).peak_activations)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_v_idles_until_the_last_rank_can_begin_and_no_longer(ranks: int) -> None:
    for microbatches in (ranks, 2 * ranks, 3 * ranks):
        schedule = zero_bubble_v(v_shaped(2 * ranks, ranks).homes, microbatches)
        assert timeline(schedule, _EQUAL).makespan - 6 * microbatches == ranks - 1
        assert max(check(schedule).peak_activations) <= 2 * ranks


@pytest.mark.parametrize("microbatches", [1, 2, 3, 7])
def test_any_number_of_micro_batches_runs(microbatches: int) -> None:
    check(zero_bubble_h1(range(4), microbatches))
    check(zero_bubble_v(v_shaped(8, 4).homes, microbatches))


def test_other_homes_are_refused_with_the_way_out() -> None:
    with pytest.raises(ScheduleError, match="use ZBV or 1F1B"):
        zero_bubble_h1([0, 1, 0, 1], 4)
    with pytest.raises(ScheduleError, match="see v_shaped"):
        zero_bubble_v([0, 1, 0, 1], 4)
