"""Bad schedules are refused before they run, with the action each rank is stuck at."""

from dataclasses import replace

import pytest

from meshwright.parallel.errors import ScheduleError
from meshwright.parallel.pipeline.actions import Action, Schedule
from meshwright.parallel.pipeline.check import check
from meshwright.parallel.pipeline.lower import lowered
from meshwright.parallel.pipeline.orders import breadth_first


def test_ranks_that_wait_for_each_other_are_named() -> None:
    bad = Schedule.read("0F0,0B0,0F1,0B1\n1F1,1F0,1B0,1B1")
    with pytest.raises(ScheduleError, match=r"stuck with posted sends: rank 0 at 0B0; rank 1 at 1F1"):
        check(bad)


def test_a_deadlock_of_blocking_sends_is_found_where_posted_ones_run() -> None:
    schedule = lowered(breadth_first([0, 1, 0, 1], 4))
    check(schedule, "posted")
    with pytest.raises(ScheduleError, match=r"stuck with blocking sends: rank 0 at .*; rank 1 at "):
        check(schedule, "blocking")
    check(lowered(breadth_first([0, 1, 0, 1], 4), transport="blocking"), "blocking")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("0F0\n1F0,1B0", "lacks 0I0, 0W0"),
        ("0F0,0B0,0B0\n1F0,1B0", "0I0.* more than once"),
        ("0F0,0SEND_F0,0RECV_B0,0B0\n1F0,1B0,1SEND_B0", "lacks 1RECV_F0"),
        ("0F0,0I0\n1F0,1B0", "lacks 0W0"),
        ("0F0,0UNSHARD,0B0\n1F0,1B0", "0F0 finds the parameters of stage 0 not gathered"),
        ("0B0,0F0\n1F0,1B0", "stuck"),
        ("0F0,0W0,0I0\n1F0,1B0", "stuck"),
        ("0SEND_F0,0F0,0RECV_B0,0B0\n1RECV_F0,1F0,1B0,1SEND_B0", "stuck"),
        ("0F0,0SEND_F0,0RECV_B0,0B0\n1RECV_F0,1F0,1SEND_B0,1B0", "stuck"),
        ("0F0,0F1,0B0,0REDUCE_GRAD,0B1", r"stages \[0\] are not reduced"),
        ("0UNSHARD,0F0,0RESHARD,0RECOMPUTE0,0UNSHARD,0B0", "0RECOMPUTE0 finds the parameters"),
    ],
)
def test_what_is_missing_twice_or_out_of_order_is_named(text: str, why: str) -> None:
    with pytest.raises(ScheduleError, match=why):
        check(Schedule.read(text))


def test_taking_any_action_away_is_found() -> None:
    schedule = lowered(breadth_first([0, 1, 2, 0, 1, 2], 2))
    for rank, row in enumerate(schedule.ranks):
        for place, action in enumerate(row):
            if action.microbatch is None:
                continue
            rows = list(schedule.ranks)
            rows[rank] = row[:place] + row[place + 1 :]
            with pytest.raises(ScheduleError):
                check(replace(schedule, ranks=tuple(rows)))


def test_facts_count_each_rank_for_itself() -> None:
    facts = check(lowered(breadth_first([0, 1, 0, 1], 3), zero_stage=3))
    assert facts.peak_activations == (6, 6)
    assert facts.peak_gathered == (2, 2)
    assert facts.gathers == facts.reductions == (2, 2)
    assert facts.sends == (9, 9)
    assert Action.parse("0UNSHARD") in lowered(breadth_first([0, 1], 1), zero_stage=3).ranks[0]
