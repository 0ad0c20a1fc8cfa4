"""What is alive at once where parameters and gradients come and go, on sizes that can be added up by hand."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from meshwright.clusters.hardware import gpu
from meshwright.clusters.simulated import Cluster
from meshwright.clusters.simulated.alive import Moment, Walk
from meshwright.clusters.simulated.efficiency import fitted
from meshwright.clusters.simulated.keeping import Share, States
from meshwright.clusters.simulated.machine import Machine
from meshwright.clusters.simulated.paper import Paper
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.pipeline.actions import Schedule
from meshwright.parallel.work import Passes, Traced, Work

NOTHING = Passes(forward=Work(), backward=Work())
BLOCK = Passes(
    forward=Work(saved_bytes=100.0, working_bytes=1.0),
    backward=Work(working_bytes=10.0, growing_bytes=30.0, holding_bytes=50.0),
    input_bytes=20.0,
    reread_bytes=20.0,
    made_bytes=40.0,
)
HEAVY = replace(BLOCK, backward=Work(working_bytes=500.0, growing_bytes=520.0))
LARGE = replace(BLOCK, made_bytes=1000.0)
HALF = Share(whole=1000.0, trained=1000.0, shard=500.0)


def _moment(text: str, states: dict[str, Any], **how: Any) -> Moment:
    """The fullest of a list of actions of one rank on two blocks, one stage each unless all are on the first."""
    schedule = Schedule.read(text, name="here")
    stages = {"0": 0, "1": 1} if schedule.num_stages == 2 else {}
    blocks: Mapping[str, Passes] = how.pop("blocks", {"0": BLOCK, "1": BLOCK})
    cluster = Cluster(gpu=gpu("H100"), num_gpus=1)
    paper = Paper(
        machine=Machine(mesh=Mesh(), cluster=cluster, efficiency=fitted()),
        schedule=schedule,
        traced=Traced(blocks=blocks, before=how.pop("before", NOTHING), after=how.pop("after", NOTHING)),
        stage_of=stages,
        **how,
    )
    return Walk(paper, 0, States(parameters=0.0, gradients=0.0, optimizer=0.0, **states)).fullest()


WHOLE = "0F0,0B0,0F1,0B1"
LAYERED = "0F0,0F1,1F0,1F1,1B0,1B1,0B0,0B1"


def _parts(found: Moment) -> tuple[float, ...]:
    return found.gradients, found.gathered, found.activations, found.working


def test_gradients_are_not_there_before_they_are_made() -> None:
    assert _parts(_moment("0F0,0B0", {})) == (0.0, 0.0, 200.0, 30.0)
    assert _parts(_moment("0F0,0B0", {}, blocks={"0": HEAVY, "1": BLOCK})) == (40.0, 0.0, 100.0, 520.0)


def test_gradients_of_an_earlier_microbatch_are_there_at_the_peak_of_the_next() -> None:
    assert _parts(_moment(WHOLE, {})) == (80.0, 0.0, 200.0, 10.0)


def test_buckets_are_there_from_the_start_and_take_gradients_of_the_last_microbatch() -> None:
    assert _parts(_moment("0F0,0B0", {"buckets": 80.0})) == (80.0, 0.0, 200.0, 10.0)
    assert _parts(_moment(WHOLE, {"buckets": 80.0})) == (160.0, 0.0, 200.0, 10.0)
    assert _parts(_moment(LAYERED, {"buckets": 80.0})) == (80.0, 0.0, 400.0, 30.0)
    large = {"0": LARGE, "1": LARGE}
    assert _parts(_moment(LAYERED, {"buckets": 2000.0}, blocks=large)) == (3000.0, 0.0, 300.0, 10.0)


def test_gradients_that_no_bucket_takes_stay() -> None:
    alone = {"buckets": 1.0, "alone": {"0": 40.0, "1": 30.0}}
    assert _moment("0F0,0B0", alone, blocks={"0": HEAVY, "1": BLOCK}).gradients == 31.0


@pytest.mark.parametrize(("shown", "kept"), [(False, 20.0 + 80.0), (True, 40.0 + 160.0)])
def test_what_is_recomputed_keeps_inputs_and_once_more_what_forward_keeps(shown: bool, kept: float) -> None:
    text = "0F0,0RECOMPUTE0,0B0" if shown else "0F0,0B0"
    found = _moment(text, {}, recomputed=frozenset("01"))
    assert (found.activations, found.working) == (kept, 70.0)  # held to the end, and gradients pile up


def test_what_a_stage_sends_is_kept_to_go_back_from() -> None:
    one = Passes(forward=Work(saved_bytes=100.0), backward=Work())
    sends = "0F0,0B0,0F1,0B1\n1F0,1B0,1F1,1B1"
    assert [_moment(sends, {}, blocks={"0": one, "1": one}, border_bytes=each).total for each in (0.0, 7.0)] == [
        100,
        107,
    ]


def test_parts_of_a_tied_block_make_all_gradients_before_they_add_any() -> None:
    blocks, tied = {"0": LARGE, "1": LARGE}, replace(NOTHING, is_tied=True)
    plain, after = (_moment(LAYERED, {"buckets": 1e4}, blocks=blocks, after=each) for each in (NOTHING, tied))
    assert (plain.working, after.working) == (10.0, 30.0)


SHARES = {"": Share(whole=10.0, trained=10.0, shard=5.0), "0": HALF, "1": HALF}
TURNS = "0UNSHARD,0F0,0RESHARD,1UNSHARD,1F0,1B0,1RESHARD,1REDUCE_GRAD,0UNSHARD,0B0,0RESHARD,0REDUCE_GRAD"
STAYING = "0F0,1F0,1B0,1REDUCE_GRAD,0B0,0REDUCE_GRAD"


def test_units_are_whole_in_turn_and_gradients_lie_in_buffers_while_they_are_reduced() -> None:
    large = {"0": LARGE, "1": LARGE}
    # the rest, a sum under way, and a stage that is copied out of its buffer
    assert _parts(_moment(TURNS, {"shares": SHARES}, blocks=large)) == (500.0, 10.0 + 1000.0 + 2 * 1000.0, 100.0, 0.0)
    two, one = (
        _moment(STAYING, {"shares": SHARES, "zero_stage": 2, "num_buffers": each}, blocks=large) for each in (2, 1)
    )
    assert _parts(two) == (1000.0 + 500.0, 10.0 + 2 * 1000.0 + 2 * 1000.0, 0.0, 0.0)
    assert _parts(one) == (1000.0 + 500.0, 10.0 + 2 * 1000.0 + 1000.0, 0.0, 0.0)


def test_blocks_of_modules_are_whole_one_at_a_time_and_the_next_is_on_its_way() -> None:
    blocks = {str(number): LARGE for number in range(4)}
    states = {"shares": {"": SHARES[""], **dict.fromkeys(blocks, HALF)}, "follows": False}
    # the rest, the first block, its buffer, and the sum of the second
    assert _parts(_moment("0F0,0B0", states, blocks=blocks)) == (3 * 500.0, 10.0 + 3 * 1000.0, 100.0, 0.0)
    heavy = {**blocks, "1": replace(LARGE, backward=Work(working_bytes=1e5, growing_bytes=1e5))}
    # the rest, the second block, the first on its way, and the sum of the third
    assert _parts(_moment("0F0,0B0", states, blocks=heavy)) == (2 * 500.0, 10.0 + 3 * 1000.0, 200.0, 1e5)
    whole = _moment("0F0,0B0,0F1,0B1", {**states, "zero_stage": 1}, blocks=blocks)
    assert whole.gradients == 4 * 1000.0
    assert whole.gathered >= 10.0 + 4 * 1000.0
