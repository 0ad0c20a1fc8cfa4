"""Gathers, reductions and transfers are as many as the formulas say, and never stuck."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.parallel.errors import ScheduleError
from meshwright.parallel.pipeline.actions import Kind
from meshwright.parallel.pipeline.check import check
from meshwright.parallel.pipeline.lower import lowered, with_gathers
from meshwright.parallel.pipeline.orders import accumulation, breadth_first, one_forward_one_backward
from meshwright.parallel.pipeline.placements import modular, v_shaped
from meshwright.parallel.pipeline.zero_bubble import zero_bubble_h1, zero_bubble_v


@pytest.mark.parametrize("buffers", [1, 2, 3, 8])
@pytest.mark.parametrize("microbatches", [1, 2, 4, 16])
@pytest.mark.parametrize("layers", [8, 32])
def test_layered_steps_gather_2l_minus_b_times_whatever_the_micro_batches(
    layers: int, microbatches: int, buffers: int
) -> None:
    layered = check(lowered(breadth_first([0] * layers, microbatches), zero_stage=3, num_buffers=buffers))
    plain = check(lowered(accumulation([0] * layers, microbatches), zero_stage=3, num_buffers=buffers))
    assert layered.gathers == (2 * layers - buffers,)
    assert layered.reductions == (layers,)
    assert plain.gathers == (microbatches * (2 * layers - 2 * buffers) + buffers,)
    assert plain.reductions == (microbatches * layers - (0 if layers > 1 else microbatches - 1),)
    assert layered.peak_gathered == plain.peak_gathered == (buffers,)


def test_the_numbers_of_the_table_of_the_paper_study() -> None:
    found = [
        check(lowered(make([0] * 32, microbatches), zero_stage=3)).gathers[0]
        for microbatches in (4, 16)
        for make in (accumulation, breadth_first)
    ]
    assert found == [242, 62, 962, 62]


def test_whole_gradients_are_reduced_once_for_each_stage_whatever_the_order() -> None:
    for make in (accumulation, breadth_first, one_forward_one_backward):
        assert check(lowered(make([0, 1, 0, 1], 5))).reductions == (2, 2)


def test_the_next_stage_is_gathered_before_the_present_one_computes() -> None:
    row = [str(each) for each in lowered(breadth_first([0, 0, 0], 2), zero_stage=3).ranks[0]]
    assert row[:6] == ["0UNSHARD", "1UNSHARD", "0F0", "0F1", "0RESHARD", "2UNSHARD"]
    assert row.index("2REDUCE_GRAD") < row.index("1B0")


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 2), st.integers(1, 9), st.sampled_from([0, 2, 3]))
def test_everything_runs_with_posted_and_with_blocking_sends(
    ranks: int, loops: int, more: int, microbatches: int, zero_stage: int
) -> None:
    homes = modular(ranks * loops + more, ranks).homes
    orders = [make(homes, microbatches) for make in (accumulation, breadth_first, one_forward_one_backward)]
    orders += [zero_bubble_h1(range(ranks), microbatches)]
    orders += [zero_bubble_v(v_shaped(2 * ranks, ranks).homes, microbatches)]
    for order in orders:
        check(lowered(order, zero_stage=zero_stage, recompute=True), "posted")
        check(lowered(order, zero_stage=zero_stage, transport="blocking"), "blocking")


def test_each_border_between_ranks_is_crossed_once_for_each_micro_batch_and_direction() -> None:
    schedule = lowered(breadth_first([0, 1, 1, 0], 5))
    assert schedule.count(Kind.SEND_ACTIVATION) == schedule.count(Kind.RECEIVE_GRADIENT) == 2 * 5


def test_every_backward_has_its_recomputation_right_before_it() -> None:
    row = lowered(breadth_first([0, 0], 2), recompute=True).ranks[0]
    for place, action in enumerate(row):
        if action.kind is Kind.BACKWARD:
            assert str(row[place - 1]) == f"{action.stage}RECOMPUTE{action.microbatch}"


def test_no_buffer_at_all_is_refused() -> None:
    with pytest.raises(ScheduleError, match="at least 1"):
        with_gathers(breadth_first([0], 1), num_buffers=0)
