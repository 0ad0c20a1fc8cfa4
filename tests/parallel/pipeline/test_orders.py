"""Orders of computing run to their end for every shape, and hold what the literature says."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.parallel.errors import ScheduleError
from meshwright.parallel.pipeline.actions import Kind
from meshwright.parallel.pipeline.check import check
from meshwright.parallel.pipeline.orders import accumulation, breadth_first, hybrid, one_forward_one_backward
from meshwright.parallel.pipeline.placements import modular
from meshwright.parallel.pipeline.timeline import Costs, timeline

_SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(0, 3), st.integers(1, 14))


@settings(deadline=None, max_examples=150)
@given(_SHAPES)
def test_every_order_runs_for_any_number_of_micro_batches_and_uneven_stages(shape: tuple[int, int, int, int]) -> None:
    ranks, loops, more, microbatches = shape
    homes = modular(ranks * loops + more, ranks).homes
    for make in (accumulation, breadth_first, one_forward_one_backward):
        schedule = make(homes, microbatches)
        assert schedule.count(Kind.FORWARD) == schedule.count(Kind.BACKWARD) == len(homes) * microbatches
        check(schedule)
    check(hybrid(homes, microbatches, group=2))


def test_one_rank_breadth_first_is_layered_accumulation() -> None:
    text = breadth_first([0, 0, 0], 2).write().strip()
    assert text == "0F0,0F1,1F0,1F1,2F0,2F1,2B0,2B1,1B0,1B1,0B0,0B1"


@pytest.mark.parametrize("ratio", [2, 3])
@pytest.mark.parametrize(
    ("ranks", "microbatches", "loops", "bubble"),
    [
        (4, 4, 4, 0.1875),
        (4, 8, 4, 0.09375),
        (8, 8, 4, 0.21875),
        (8, 16, 8, 7 / 128),
        (5, 5, 32, 0.025),
        (8, 12, 8, 7 / 96),
    ],
)
def test_bubble_is_p_minus_1_over_m_v(ranks: int, microbatches: int, loops: int, bubble: float, ratio: float) -> None:
    homes = [stage % ranks for stage in range(ranks * loops)]
    for make in (breadth_first, one_forward_one_backward):
        assert timeline(make(homes, microbatches), Costs(backward=ratio)).bubble == pytest.approx(bubble)


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 2), (4, 8), (4, 3), (8, 16)])
def test_one_stage_for_each_rank_has_a_bubble_of_p_minus_1_over_m(ranks: int, microbatches: int) -> None:
    for make in (breadth_first, one_forward_one_backward):
        assert timeline(make(range(ranks), microbatches)).bubble == pytest.approx((ranks - 1) / microbatches)


def test_activations_in_flight_are_those_of_the_literature() -> None:
    def peaks(make: object, ranks: int, microbatches: int, loops: int) -> int:
        assert callable(make)
        return max(check(make([s % ranks for s in range(ranks * loops)], microbatches)).peak_activations)

    assert peaks(one_forward_one_backward, 4, 8, 4) == 19  # (V - 1) P + 2 (P - 1) + 1
    assert peaks(one_forward_one_backward, 8, 16, 8) == 71
    assert peaks(one_forward_one_backward, 4, 8, 1) == 4  # min(P, M)
    assert peaks(one_forward_one_backward, 4, 3, 1) == 3
    assert peaks(breadth_first, 4, 8, 4) == 32  # M V
    assert peaks(accumulation, 1, 8, 4) == 4


@pytest.mark.parametrize(("homes", "microbatches"), [([0, 2], 1), ([], 1), ([0], 0)])
def test_what_is_no_pipeline_is_refused(homes: list[int], microbatches: int) -> None:
    for make in (accumulation, breadth_first, one_forward_one_backward):
        with pytest.raises(ScheduleError):
            make(homes, microbatches)
