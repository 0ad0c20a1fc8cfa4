"""What `schedule=` names is complete, fits its ranks and is the order that the name says."""

import re
from fractions import Fraction

import pytest

from meshwright.parallel.errors import ScheduleError
from meshwright.parallel.pipeline.actions import COMPUTE, Kind, Schedule
from meshwright.parallel.pipeline.check import check
from meshwright.parallel.pipeline.choose import ACROSS_RANKS, ON_ONE_RANK, Asked, chosen, complaints
from meshwright.parallel.pipeline.lower import lowered
from meshwright.parallel.pipeline.placements import Placement
from meshwright.parallel.pipeline.timeline import timeline
from meshwright.parallel.pipeline.zero_bubble import zero_bubble_h1

MINE = Schedule.read("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1", name="mine")
HALVES = Placement((0, 4, 8), (0, 1))


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
    assert chosen("modular", 8, 2, 2, asked=Asked(num_loops=1))[0].cuts == (0, 4, 8)


def test_backward_is_split_in_two_on_stages_that_zero_bubble_orders_take() -> None:
    one, two = chosen("zb-h1", 8, 2, 4), chosen("zbv", 8, 2, 4)
    assert (one[0].homes, two[0].homes) == ((0, 1), (0, 1, 1, 0))
    for _, schedule in (one, two):
        assert schedule.count(Kind.WEIGHT_GRADIENT) == schedule.count(Kind.INPUT_GRADIENT) == 4 * schedule.num_stages
        assert not schedule.has(Kind.BACKWARD)


@pytest.mark.parametrize("group_size", [1, 2, 3, 7])
@pytest.mark.parametrize(("name", "num_ranks"), [("layered", 1), ("modular", 2)])
def test_groups_hold_fewer_inputs_and_gather_and_reduce_once_each(name: str, num_ranks: int, group_size: int) -> None:
    _, schedule = chosen(name, 6, num_ranks, 7, asked=Asked(group_size=group_size), zero_stage=3)
    facts, stages, groups = check(schedule), 6 // num_ranks, -(-7 // group_size)
    assert facts.peak_activations == (group_size * stages,) * num_ranks
    assert facts.gathers == (2 * groups * (stages - 2) + 2,) * num_ranks  # two stay whole from turn to turn
    assert facts.reductions == (groups * stages,) * num_ranks


def test_groups_of_an_interleaved_order_are_as_many_as_ranks_unless_said() -> None:
    def order(**asked: int) -> Schedule:
        return chosen("interleaved", 4, 2, 5, asked=Asked(**asked))[1]

    assert order() == order(group_size=2)
    assert order(group_size=3).ranks != order().ranks
    assert check(order(group_size=3))
    assert chosen("layered", 4, 1, 5, asked=Asked(group_size=5))[1].ranks == chosen("layered", 4, 1, 5)[1].ranks


@pytest.mark.parametrize(
    ("name", "num_ranks", "asked", "cuts"),
    [
        ("gpipe", 2, Asked(), (0, 4, 8)),
        ("gpipe", 2, Asked(stage_costs=(9, 1, 1, 1, 1, 1, 1, 1)), (0, 1, 8)),
        ("interleaved", 2, Asked(stage_costs=(9, 1, 1, 1, 1, 1, 1, 1)), (0, 1, 2, 3, 8)),
        ("modular", 2, Asked(num_loops=1, stage_costs=(1,) * 7 + (9,)), (0, 7, 8)),
        ("zbv", 2, Asked(stage_costs=(1, 1, 1, 9, 1, 1, 1, 9)), (0, 3, 4, 7, 8)),
        ("1f1b", 2, Asked(placement=Placement((0, 3, 8), (0, 1))), (0, 3, 8)),
        ("layered", 1, Asked(placement=Placement((0, 3, 8), (0, 0))), (0, 3, 8)),
        (MINE, 2, Asked(), (0, 4, 8)),
        (MINE, 2, Asked(stage_costs=(9, 1, 1, 1, 1, 1, 1, 1)), (0, 1, 8)),
        (MINE, 2, Asked(placement=Placement((0, 3, 8), (0, 1))), (0, 3, 8)),
    ],
    ids=str,
)
def test_stages_are_cut_by_number_by_cost_or_by_hand(
    name: str | Schedule, num_ranks: int, asked: Asked, cuts: tuple[int, ...]
) -> None:
    placement, schedule = chosen(name, 8, num_ranks, 2, asked=asked)
    assert placement.cuts == cuts
    assert placement.homes == schedule.homes
    check(schedule)


def test_of_a_given_schedule_the_order_of_computing_is_kept() -> None:
    whole = lowered(MINE, zero_stage=3)
    assert chosen(whole, 4, 2, 2)[1].ranks == lowered(MINE).ranks
    assert chosen(MINE, 4, 2, 2, zero_stage=3)[1].ranks == whole.ranks
    split = zero_bubble_h1([0, 1], 2)
    assert chosen(split, 4, 2, 2)[1].only(*COMPUTE).ranks == split.ranks


@pytest.mark.parametrize(
    ("schedule", "num_ranks", "asked", "option", "text"),
    [
        ("1f1b", 2, Asked(num_loops=2), "num_loops", "takes no num_loops=2; use 'interleaved' or 'modular'"),
        ("layered", 1, Asked(num_loops=2), "num_loops", "takes no num_loops=2; use 'interleaved' or 'modular'"),
        ("gpipe", 2, Asked(group_size=2), "group_size", "use 'layered', 'interleaved' or 'modular'"),
        ("modular", 2, Asked(group_size=3), "group_size", "than num_microbatches=2; nearest legal: group_size=2"),
        ("accumulate", 1, Asked(stage_costs="flops"), "stage_costs", "without stage_costs; use 'layered'"),
        ("accumulate", 1, Asked(placement=Placement((0, 8), (0,))), "placement", "without placement; use 'layered'"),
        ("modular", 2, Asked(stage_costs="flops"), "stage_costs", "each block a stage.*num_loops=2"),
        ("layered", 1, Asked(stage_costs=(1, 2)), "stage_costs", "each block a stage"),
        ("1f1b", 4, Asked(placement=HALVES), "placement", "2 ranks .*but pp=4; nearest legal: pp=2"),
        ("1f1b", 2, Asked(placement=HALVES, stage_costs="flops"), "placement", "so stage_costs='flops' cannot"),
        ("modular", 2, Asked(placement=HALVES, num_loops=1), "placement", "so num_loops=1 cannot"),
        ("zbv", 2, Asked(placement=HALVES), "schedule", "dealt down and up again"),
        (MINE, 4, Asked(), "schedule", "2 ranks, but pp=4; nearest legal: pp=2"),
        (MINE, 2, Asked(num_loops=2), "num_loops", "takes no num_loops"),
        (MINE, 2, Asked(group_size=2), "group_size", "takes no group_size"),
        (MINE, 2, Asked(placement=Placement((0, 1, 2), (1, 0))), "placement", r"nearest legal: homes \[0, 1\]"),
        (Schedule.read("0F0,0B0,0F1,0B1\n1F1,1F0,1B0,1B1"), 2, Asked(), "schedule", "rank 0 at 0B0; rank 1 at 1F1"),
        (Schedule.read("0F0,1F0,0F1,1F1,1B0,0B0,1B1,0B1\n"), 1, Asked(num_loops=1), "num_loops", "takes no num_loops"),
        (Schedule("idle", (0,), 2, (*Schedule.read("0F0,0F1,0B0,0B1").ranks, ())), 2, Asked(), "schedule", "no stage"),
        (Schedule.read("0F0,0F1,0B0"), 1, Asked(), "schedule", "lacks 0I1, 0W1"),
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_said_with_the_option_and_a_way_out(
    schedule: str | Schedule, num_ranks: int, asked: Asked, option: str, text: str
) -> None:
    found = list(complaints(schedule, num_ranks, num_microbatches=2, asked=asked))
    assert [name for name, _ in found] == [option]
    assert re.search(text, found[0][1]), found[0][1]
    with pytest.raises(ScheduleError, match=text):
        chosen(schedule, 8, num_ranks, 2, asked=asked)


@pytest.mark.parametrize(
    ("schedule", "num_blocks", "asked", "text"),
    [
        (MINE, 1, Asked(), "2 stages, but the model has 1 blocks; nearest legal: a schedule of 1 stages"),
        ("1f1b", 9, Asked(placement=HALVES), r"the model has 9; nearest legal: cuts \[0, 4, 9\]"),
        ("1f1b", 3, Asked(placement=HALVES), "the model has 3; nearest legal: 2 stages"),
        ("1f1b", 9, Asked(stage_costs=(1, 2)), "stage_costs has 2 numbers, but the model has 9 blocks"),
        ("zbv", 3, Asked(), "3 blocks cannot make 4 stages"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model_is_refused(
    schedule: str | Schedule, num_blocks: int, asked: Asked, text: str
) -> None:
    with pytest.raises(ScheduleError, match=text):
        chosen(schedule, num_blocks, 2, 2, asked=asked)
