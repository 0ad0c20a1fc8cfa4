"""Bounds: never above what they bound, and close to it where nothing comes on top."""

from dataclasses import replace

import pytest

from meshwright.clusters.simulated import step
from meshwright.clusters.simulated.bounds import Bounds, memory_bytes, training_of
from meshwright.clusters.simulated.candidates import groups
from meshwright.parallel.pipeline.closed_form import Pipe
from tests.clusters.simulated.settings import any_question


@pytest.mark.parametrize("at_most", [False, True])
@pytest.mark.parametrize("seed", range(100, 105))
def test_no_layout_is_below_its_bounds(seed: int, at_most: bool) -> None:
    drawn = any_question(seed)
    asked = replace(drawn, at_most=at_most, global_batch=8 if at_most else drawn.global_batch)
    bounds = Bounds(asked)
    for group in groups(asked):
        for dp, number, schedule, vpp, stage in list(group.choices())[:: 11 if at_most else 5]:
            computing_s = bounds.computing_s(group, dp)
            waiting_s = bounds.waiting_s(group, Pipe(group.base.pp, number, vpp), schedule)
            layout = group.layout(dp=dp, microbatches=number, schedule=schedule, vpp=vpp, zero_stage=stage)
            training = training_of(asked, layout)
            taken_s = step(training).total_s / layout.global_batch
            assert bounds.group_s(group) <= computing_s <= computing_s + waiting_s / dp <= taken_s
            fewer = max(1, number - 1)
            assert bounds.least_waiting_s(group, number) <= waiting_s
            assert bounds.least_waiting_s(group, number) <= bounds.least_waiting_s(group, fewer)
            needed = memory_bytes(asked, training)
            assert bounds.least_bytes(group, dp, fewer) <= bounds.least_bytes(group, dp, number) <= needed


def test_on_one_gpu_only_the_update_comes_on_top() -> None:
    asked = any_question(1)
    asked = replace(asked, cluster=replace(asked.cluster, num_gpus=1))
    group = next(iter(groups(asked)))
    found = step(training_of(asked, replace(group.base, global_batch=asked.global_batch)))
    rest_s = (found.total_s - found.optimizer_s - found.straggling_s) / asked.global_batch
    assert Bounds(asked).group_s(group) == pytest.approx(rest_s)


def test_interleaved_orders_that_only_fewer_micro_batches_can_have_count_in_the_least_waiting() -> None:
    """Three micro-batches on two ranks cannot be interleaved, two can: the walk must not end at three."""
    drawn = any_question(3)
    space = replace(drawn.space, schedules=("1f1b",), max_cp=1)
    asked = replace(drawn, model=replace(drawn.model, layers=12), at_most=True, global_batch=6, space=space)
    bounds = Bounds(asked)
    piped = [group for group in groups(asked) if group.base.pp == 2]
    assert piped
    for group in piped:
        two_s = bounds.waiting_s(group, Pipe(2, 2, 6), "1f1b")
        assert bounds.least_waiting_s(group, 3) <= two_s < bounds.waiting_s(group, Pipe(2, 3, 1), "1f1b")
