"""Times on paper are the closed forms of the literature."""

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from random import Random

import pytest

from meshwright.parallel.pipeline.actions import Kind, Schedule
from meshwright.parallel.pipeline.closed_form import Pipe, makespan, zero_bubble_h1_makespan
from meshwright.parallel.pipeline.lower import lowered
from meshwright.parallel.pipeline.orders import breadth_first, one_forward_one_backward
from meshwright.parallel.pipeline.timeline import Cause, Costs, timeline
from meshwright.parallel.pipeline.zero_bubble import zero_bubble_h1


def _cases(number: int, seed: int) -> Iterator[tuple[Pipe, Costs]]:
    """Pipes and costs that are whole numbers, so that sums are exact whatever their order."""
    draw = Random(seed)
    for _ in range(number):
        pipe = Pipe(draw.randint(1, 4), draw.randint(1, 7), draw.randint(1, 3))
        yield pipe, Costs(draw.randint(1, 6), 2 * draw.randint(1, 6), latency=draw.choice([0, 0, 1, 2, 5, 9]))


def _looped(pipe: Pipe) -> list[int]:
    return [stage % pipe.num_ranks for stage in range(pipe.num_ranks * pipe.num_loops)]


def _expected(pipe: Pipe, costs: Costs) -> float:
    return makespan(pipe, costs.forward, costs.backward, latency=costs.latency)


def test_makespan_is_the_closed_form_for_250_random_breadth_first_steps_with_latency() -> None:
    for pipe, costs in _cases(250, seed=1):
        found = timeline(breadth_first(_looped(pipe), pipe.num_microbatches), costs).makespan
        assert found == _expected(pipe, costs), (pipe, costs)


def test_bubble_is_the_closed_form_for_90_random_contiguous_pipelines() -> None:
    for drawn, costs in _cases(90, seed=2):
        pipe, instant = replace(drawn, num_loops=1), replace(costs, latency=0)
        for make in (breadth_first, one_forward_one_backward):
            found = timeline(make(_looped(pipe), pipe.num_microbatches), instant)
            assert found.makespan == _expected(pipe, instant), (pipe, instant)
            assert Fraction(found.makespan) / Fraction(found.busy[0]) - 1 == pipe.bubble


def test_bubble_is_the_closed_form_for_80_random_interleaved_pipelines() -> None:
    for drawn, costs in _cases(80, seed=3):
        full = drawn.num_microbatches - drawn.num_microbatches % drawn.num_ranks
        some = drawn.num_microbatches if drawn.num_microbatches < 2 * drawn.num_ranks else full
        pipe, instant = replace(drawn, num_microbatches=some), replace(costs, latency=0)
        found = timeline(one_forward_one_backward(_looped(pipe), some), instant)
        assert Fraction(found.makespan) / Fraction(found.busy[0]) - 1 == pipe.bubble, (pipe, instant)


def test_makespan_is_the_closed_form_for_80_random_h1_pipelines() -> None:
    for drawn, costs in _cases(80, seed=4):
        pipe, instant = replace(drawn, num_loops=1), replace(costs, latency=0)
        found = timeline(zero_bubble_h1(range(pipe.num_ranks), pipe.num_microbatches), instant)
        expected = zero_bubble_h1_makespan(pipe, instant.forward, instant.backward)
        assert found.makespan == expected, (pipe, instant)


def test_the_closed_form_tells_a_wrong_order() -> None:
    """In every order with two forwards or two backwards of one rank exchanged the pipeline fills or drains later."""
    pipe, costs = Pipe(3, 4, 2), Costs(2, 4)
    right = breadth_first(_looped(pipe), pipe.num_microbatches)
    assert timeline(right, costs).makespan == _expected(pipe, costs)
    for kind, stage in ((Kind.FORWARD, 0), (Kind.FORWARD, 1), (Kind.BACKWARD, 5), (Kind.BACKWARD, 4)):
        wrong = _with_last_first(right, stage, kind)
        assert timeline(wrong, costs).makespan > _expected(pipe, costs), (kind, stage)


def _with_last_first(schedule: Schedule, stage: int, kind: Kind) -> Schedule:
    """The same schedule, but one stage begins with its last micro-batch and the next loop's action comes before it."""
    rows = [list(row) for row in schedule.ranks]
    row = rows[schedule.homes[stage]]
    places = [place for place, action in enumerate(row) if (action.stage, action.kind) == (stage, kind)]
    row.insert(places[0], row.pop(places[-1]))
    return replace(schedule, ranks=tuple(map(tuple, rows)))


@pytest.mark.parametrize("latency", [0.0, 0.25, 1.0, 3.0])
@pytest.mark.parametrize("loops", [1, 2, 4])
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_breadth_first_takes_the_closed_form_with_latency(ranks: int, loops: int, latency: float) -> None:
    homes = [stage % ranks for stage in range(ranks * loops)]
    costs = Costs(1, 2, latency=latency)
    for microbatches in range(ranks, 2 * ranks + 4):
        found = timeline(breadth_first(homes, microbatches), costs).makespan
        assert found == pytest.approx(_expected(Pipe(ranks, microbatches, loops), costs))


@pytest.mark.parametrize(
    ("microbatches", "latency", "percent", "interleaved_percent"),
    [(16, 0.25, 6.4, 13.7), (16, 1, 9.1, 38.3), (8, 0.25, 27.3, 27.3), (9, 0.25, 14.6, None), (10, 0.25, 10.2, None)],
)
def test_a_few_more_micro_batches_than_ranks_hide_latency(
    microbatches: int, latency: float, percent: float, interleaved_percent: float | None
) -> None:
    homes = [stage % 8 for stage in range(64)]
    costs = Costs(1, 2, latency=latency)
    assert 100 * timeline(breadth_first(homes, microbatches), costs).bubble == pytest.approx(percent, abs=0.05)
    if interleaved_percent is not None:
        found = timeline(one_forward_one_backward(homes, microbatches), costs).bubble
        assert 100 * found == pytest.approx(interleaved_percent, abs=0.05)


@pytest.mark.parametrize("latency", [0.0, 0.5])
def test_sends_and_receives_take_no_more_time_than_the_dependences_they_stand_for(latency: float) -> None:
    for order in (breadth_first([0, 1, 2, 0, 1, 2], 5), one_forward_one_backward([0, 1, 2], 5)):
        plain = timeline(order, Costs(latency=latency))
        assert timeline(lowered(order, zero_stage=3), Costs(latency=latency)).makespan == pytest.approx(plain.makespan)


def test_larger_stages_take_longer() -> None:
    found = timeline(breadth_first([0, 1], 3), Costs(1, 2, stages={1: 2.0}))
    assert found.busy == (9.0, 18.0)
    assert found.bubble == pytest.approx((1 + 18 + 2) / 18 - 1)


def test_reductions_begin_through_the_whole_backward() -> None:
    """Fractions of the makespan at which the gradients of each stage of rank 0 are complete."""

    def fractions(make: object) -> list[float]:
        assert callable(make)
        found = timeline(make([s % 4 for s in range(16)], 8))
        ends = {span.action.stage: span.end for span in found.spans if span.rank == 0 and span.action.kind == "B"}
        return [round(end / found.makespan, 2) for _, end in sorted(ends.items(), reverse=True)]

    assert fractions(breadth_first) == [0.54, 0.70, 0.85, 1.0]
    assert fractions(one_forward_one_backward) == [0.77, 0.85, 0.92, 1.0]


def test_a_link_carries_one_thing_after_the_other_and_computing_waits_for_parameters() -> None:
    schedule = lowered(breadth_first([0, 0], 1), zero_stage=3, num_buffers=1)
    found = timeline(schedule, Costs(1, 2, gather=3, reduce=4))
    assert [(str(span.action), span.start, span.end) for span in found.communication] == [
        ("0UNSHARD", 0, 3),
        ("1UNSHARD", 4, 7),
        ("1REDUCE_GRAD", 10, 14),
        ("0UNSHARD", 14, 17),
        ("0REDUCE_GRAD", 19, 23),
    ]
    assert [(wait.cause, wait.start, wait.end) for wait in found.waits] == [
        (Cause.PARAMETERS, 0, 3),
        (Cause.PARAMETERS, 4, 7),
        (Cause.PARAMETERS, 10, 17),
        (Cause.END, 19, 23),
    ]
    assert (found.makespan, found.busy, found.exposed) == (23, (6,), (17,))
