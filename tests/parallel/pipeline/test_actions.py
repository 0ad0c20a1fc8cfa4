"""Schedules are text that round-trips, torch's files included."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules

from meshwright.parallel.errors import ScheduleError
from meshwright.parallel.pipeline.actions import Action, Kind, Schedule
from meshwright.parallel.pipeline.check import check
from meshwright.parallel.pipeline.lower import lowered
from meshwright.parallel.pipeline.orders import breadth_first, one_forward_one_backward

_WHOLE = (Kind.GATHER, Kind.FREE, Kind.REDUCE)


@given(st.integers(0, 99), st.sampled_from(Kind), st.integers(0, 999))
def test_an_action_is_read_back_from_its_text(stage: int, kind: Kind, microbatch: int) -> None:
    action = Action(stage, kind, None if kind in _WHOLE else microbatch)
    assert Action.parse(str(action)) == action


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6))
def test_a_schedule_is_read_back_from_its_text(ranks: int, loops: int, microbatches: int) -> None:
    schedule = lowered(breadth_first([s % ranks for s in range(ranks * loops)], microbatches), zero_stage=3)
    assert Schedule.read(schedule.write(), name="breadth-first") == schedule


@pytest.mark.parametrize("text", ["", "F0", "2X0", "2F", "1UNSHARD3", "-1F0", "2F0 3F0"])
def test_text_that_is_no_action_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError):
        Action.parse(text)


def test_the_place_of_a_bad_cell_is_named() -> None:
    with pytest.raises(ScheduleError, match=r"line 2, cell 3: '1Q0'"):
        Schedule.read("0F0,0B0\n1F0,1B0,1Q0")


def test_empty_cells_and_overlapped_pairs_of_torch_are_read() -> None:
    schedule = Schedule.read("0F0,,0F1,(0F2;0B0)OVERLAP_F_B,0B1,0B2\n")
    assert [str(each) for each in schedule.ranks[0]] == ["0F0", "0F1", "0F2", "0B0", "0B1", "0B2"]


@pytest.mark.parametrize("name", ["0F0,0B0,2F0", "0F0,1F0\n0B0"])
def test_rows_that_fit_no_pipeline_are_refused(name: str) -> None:
    with pytest.raises(ScheduleError):
        Schedule.read(name)


def test_torch_reads_what_we_write() -> None:
    schedule = lowered(one_forward_one_backward([0, 1, 0, 1], 4), zero_stage=3)
    for line, actions in zip(schedule.write().splitlines(), schedule.ranks, strict=True):
        read = [torch_schedules._Action.from_str(cell) for cell in line.split(",")]
        assert [str(each) for each in read] == [str(each) for each in actions]


@pytest.mark.parametrize(("ranks", "loops", "microbatches"), [(2, 2, 4), (4, 2, 8), (4, 3, 4)])
def test_orders_of_torch_are_read_and_run(ranks: int, loops: int, microbatches: int) -> None:
    order = [_torch_order(rank, ranks, loops, microbatches) for rank in range(ranks)]
    text = "\n".join(",".join("" if each is None else str(each) for each in row) for row in order)
    theirs = Schedule.read(text)
    facts = check(theirs)
    ours = check(one_forward_one_backward([s % ranks for s in range(ranks * loops)], microbatches))
    assert facts.peak_activations == ours.peak_activations


def _torch_order(rank: int, ranks: int, loops: int, microbatches: int) -> list[object]:
    rounds = max(1, microbatches // ranks)
    group = microbatches // rounds
    warmup = min((loops - 1) * group + 2 * (ranks - 1 - rank), microbatches * loops)
    total = microbatches * loops

    def forward_stage(step: int) -> int:
        return (step // group % loops) * ranks + rank

    def backward_stage(step: int) -> int:
        return (loops - 1 - (step - warmup) // group % loops) * ranks + rank

    found: list[object] = torch_schedules._get_1f1b_rank_ops(
        loops, ranks, warmup, total - warmup, total - (total - warmup), rank, forward_stage, backward_stage
    )
    return found


def test_an_action_on_a_foreign_rank_is_refused() -> None:
    with pytest.raises(ScheduleError, match="stage 1 is run by rank 1"):
        Schedule("bad", (0, 1), 1, ((Action(1, Kind.FORWARD, 0),), ()))
    with pytest.raises(ScheduleError, match="1 micro-batches"):
        Schedule("bad", (0,), 1, ((Action(0, Kind.FORWARD, 1),),))
    with pytest.raises(ScheduleError, match="2 stages"):
        Schedule("bad", (0, 0), 1, ((Action(2, Kind.FORWARD, 0),),))
