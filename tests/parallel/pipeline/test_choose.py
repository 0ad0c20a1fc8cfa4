"""What `schedule=` names is complete, fits its ranks and is the order that the name says."""

from fractions import Fraction

import pytest

from meshwright.parallel.errors import ScheduleError
from meshwright.parallel.pipeline.actions import Kind
from meshwright.parallel.pipeline.check import check
from meshwright.parallel.pipeline.choose import ACROSS_RANKS, ON_ONE_RANK, chosen
from meshwright.parallel.pipeline.timeline import timeline


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
@pytest.mark.parametrize("num_microbatches", [1, 3, 4, 7])
@pytest.mark.parametrize(
    ("name", "num_ranks"), [*((each, 1) for each in ON_ONE_RANK), *((each, 3) for each in ACROSS_RANKS)]
)
def test_every_name_gives_a_schedule_that_runs_to_its_end(
    name: str, num_ranks: int, num_microbatches: int, zero_stage: int
) -> None:
    placement, schedule = chosen(name, 7, num_ranks, num_microbatches, zero_stage=zero_stage)
    facts = check(schedule)
    assert schedule.homes == placement.homes
    assert schedule.num_ranks == num_ranks
    if name in ("layered", "modular") and zero_stage == 3:
        own = [len(schedule.stages_of(rank)) for rank in range(num_ranks)]
        assert facts.gathers == tuple(2 * each - min(each, 2) for each in own)
        assert facts.reductions == tuple(own)


def test_the_bubble_is_divided_by_the_stages_of_a_rank() -> None:
    bubbles = {
        name: timeline(chosen(name, 8, 4, 8)[1].only(Kind.FORWARD, Kind.BACKWARD)).bubble
        for name in ("gpipe", "modular")
    }
    assert Fraction(bubbles["gpipe"]).limit_denominator(1000) == Fraction(3, 8)
    assert Fraction(bubbles["modular"]).limit_denominator(1000) == Fraction(3, 16)


def test_loops_are_stages_of_each_rank() -> None:
    assert chosen("interleaved", 8, 2, 2)[0].homes == (0, 1, 0, 1)
    assert chosen("modular", 8, 2, 2, num_loops=1)[0].cuts == (0, 4, 8)
    for name, num_ranks in (("1f1b", 2), ("gpipe", 2), ("layered", 1)):
        with pytest.raises(ScheduleError, match="takes no num_loops=2; use 'interleaved' or 'modular'"):
            chosen(name, 8, num_ranks, 2, num_loops=2)
