"""Memory of receives that are posted and not done, along the list of a rank."""

from dataclasses import replace
from typing import Any

import pytest

from meshwright.clusters.hardware import gpu
from meshwright.clusters.simulated import Cluster
from meshwright.clusters.simulated.efficiency import fitted
from meshwright.clusters.simulated.inbox import Inbox
from meshwright.clusters.simulated.machine import Machine
from meshwright.clusters.simulated.paper import Paper
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.pipeline.actions import Schedule
from meshwright.parallel.pipeline.check import RECEIVES
from meshwright.parallel.pipeline.choose import chosen
from meshwright.parallel.pipeline.posting import EARLY
from meshwright.parallel.pipeline.transfers import Timetable
from meshwright.parallel.work import Passes, Traced, Work

H100 = gpu("H100")
NOTHING = Passes(forward=Work(), backward=Work())
SIZE_BYTES = 3.0


def _paper(schedule: Schedule, *, on_host: bool) -> Paper:
    kind = replace(H100, generation="cpu", name="host") if on_host else H100
    mesh = Mesh(pp=schedule.num_ranks)
    return Paper(
        machine=Machine(mesh=mesh, cluster=Cluster(gpu=kind, num_gpus=mesh.world_size), efficiency=fitted()),
        schedule=schedule,
        traced=Traced(blocks={}, before=NOTHING, after=NOTHING),
        border_bytes=SIZE_BYTES,
    )


def _numbers(schedule: Schedule, rank: int, *, on_host: bool) -> list[float]:
    inbox, found = Inbox(_paper(schedule, on_host=on_host), rank), []
    for action in schedule.ranks[rank]:
        found.append(inbox.waiting_bytes / SIZE_BYTES)
        inbox.take(action)
    return [*found, inbox.waiting_bytes / SIZE_BYTES]


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "modular", "zbv"])
@pytest.mark.parametrize("on_host", [True, False])
def test_as_many_receives_wait_as_the_runtime_has_posted_and_not_done(name: str, on_host: bool) -> None:
    schedule = chosen(name, 8, 4, 6)[1]
    for rank, actions in enumerate(schedule.ranks):
        ahead = 1 + (EARLY if on_host else 0)
        due: list[list[Any]] = [[each for each in row if each is not None] for row in Timetable(schedule, rank).due]
        posted, done, taken, expected = sum(map(len, due[:ahead])), 0, 0, list[float]()
        for action in actions:
            expected.append(posted - taken)
            if "SEND" in action.kind.value or "RECV" in action.kind.value:
                done, taken = done + 1, taken + (action.kind in RECEIVES)
                posted = sum(map(len, due[: done + ahead]))
        assert _numbers(schedule, rank, on_host=on_host) == [*expected, 0.0], rank


def test_a_rank_without_a_pipeline_waits_for_nothing() -> None:
    assert set(_numbers(chosen("layered", 4, 1, 4)[1], 0, on_host=True)) == {0.0}


def test_hosts_receive_ahead_of_time_and_gpus_do_not() -> None:
    schedule = chosen("gpipe", 2, 2, 8)[1]
    ahead, alone = (max(_numbers(schedule, 1, on_host=each)) for each in (True, False))
    assert ahead == 1 + EARLY
    assert alone < ahead
