"""Moments that ranks noted become a timeline: what is work, what is waiting, what is idle."""

from math import nan

import pytest

from meshwright.parallel.pipeline.actions import Kind, Schedule
from meshwright.parallel.pipeline.measured import Moments, RankMoments, costs_of, measured
from meshwright.parallel.pipeline.timeline import Cause, Wait, timeline

_FIRST = "0UNSHARD,0F0,0SEND_F0,0RECV_B0,0B0,0REDUCE_GRAD"
_SECOND = "1RECV_F0,1F0,1B0,1SEND_B0"


def _two_ranks() -> list[RankMoments]:
    first = (
        Moments(nan, 10, 10, 12),  # gathered until 12
        Moments(10, 12, 15, nan),
        Moments(15, nan, 16, nan),
        Moments(16, nan, 25, nan),
        Moments(25, 25, 30, nan),
        Moments(nan, 30, 30, 33),
    )
    second = (
        Moments(11, nan, 17, nan),  # sent at 15
        Moments(17, 17, 20, nan),
        Moments(20, 20, 24, nan),
        Moments(24, nan, 24, nan),
    )
    return [RankMoments(10, first, 34), RankMoments(10, second, 34)]


def test_waiting_begins_when_something_is_under_way() -> None:
    found = measured(Schedule.read(f"{_FIRST}\n{_SECOND}"), _two_ranks())
    assert found.waits == (
        Wait(0, Cause.PARAMETERS, 0, 2),
        Wait(0, Cause.TRANSFER, 14, 15),
        Wait(0, Cause.END, 20, 24),
        Wait(1, Cause.TRANSFER, 5, 7),
        Wait(1, Cause.END, 20, 24),
    )
    assert (found.makespan, found.busy, found.exposed) == (24, (8, 7), (7, 6))
    assert found.bubble == pytest.approx(24 / 8 - 1)
    links = [(str(span.action), span.start, span.end) for span in found.communication]
    assert links[0] == ("0UNSHARD", 0, 2)
    assert links[3] == ("0REDUCE_GRAD", 20, 23)


def test_gathers_and_reductions_that_send_nothing_are_not_counted() -> None:
    ranks = _two_ranks()
    silent = tuple(Moments(each.waits, each.runs, each.done, nan) for each in ranks[0].actions)
    found = measured(Schedule.read(f"{_FIRST}\n{_SECOND}"), [RankMoments(10, silent, 34), ranks[1]])
    assert (found.count(Kind.GATHER), found.count(Kind.REDUCE), found.count(Kind.SEND_ACTIVATION)) == (0, 0, 1)


def test_a_plan_with_measured_costs_takes_the_time_of_the_work() -> None:
    schedule = Schedule.read(f"{_FIRST}\n{_SECOND}")
    found = measured(schedule, _two_ranks())
    planned = timeline(schedule, costs_of(found))
    assert planned.unit_s == found.unit_s == 1.0
    assert sum(planned.busy) == pytest.approx(sum(found.busy))
