"""Memory of receives that are posted and not done, along the list of a rank."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from meshwright.clusters.hardware import gpu
from meshwright.clusters.simulated import Cluster
from meshwright.clusters.simulated.efficiency import fitted
from meshwright.clusters.simulated.inbox import Inbox
from meshwright.clusters.simulated.machine import Machine
from meshwright.clusters.simulated.paper import Paper
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.pipeline.actions import Kind, Schedule
from meshwright.parallel.pipeline.check import RECEIVES, SENDS
from meshwright.parallel.pipeline.choose import chosen
from meshwright.parallel.pipeline.posting import EARLY, EARLY_BYTES
from meshwright.parallel.pipeline.route import Border, Route, Shape
from meshwright.parallel.pipeline.transfers import Timetable, Transfers
from meshwright.parallel.work import Passes, Traced, Work

H100 = gpu("H100")
NOTHING = Passes(forward=Work(), backward=Work())


def _paper(schedule: Schedule, size_bytes: int, *, on_host: bool) -> Paper:
    kind = replace(H100, generation="cpu", name="host") if on_host else H100
    mesh = Mesh(pp=schedule.num_ranks)
    return Paper(
        machine=Machine(mesh=mesh, cluster=Cluster(gpu=kind, num_gpus=mesh.world_size), efficiency=fitted()),
        schedule=schedule,
        traced=Traced(blocks={}, before=NOTHING, after=NOTHING),
        border_bytes=size_bytes,
    )


def _on_paper(schedule: Schedule, rank: int, size_bytes: int, *, on_host: bool) -> list[float]:
    """Number of receives that wait, behind every action of a rank."""
    inbox, found = Inbox(_paper(schedule, size_bytes, on_host=on_host), rank), []
    for action in schedule.ranks[rank]:
        inbox.take(action)
        found.append(inbox.waiting_bytes / size_bytes)
    return found


class _Wire:
    """Counts receives that are posted and not done."""

    def __init__(self, early: int) -> None:
        self.early = early
        self.waiting = 0

    def receive(self, shapes: Any, source: int, tag: Any) -> Callable[[], list[Any]]:
        del shapes, source, tag
        self.waiting += 1
        return self._received

    def _received(self) -> list[Any]:
        self.waiting -= 1
        return []

    def send(self, values: Any, to: int, tag: Any) -> None: ...


class _Nothing:
    def __getattr__(self, name: str) -> Callable[..., list[Any]]:
        return lambda *_: []


def _in_fact(schedule: Schedule, rank: int, size_bytes: int, *, on_host: bool) -> list[float]:
    wire: Any = _Wire(EARLY if on_host else 0)
    nothing: Any = _Nothing()
    shape = Shape(torch.Size([size_bytes]), torch.uint8, True)
    borders = {stage: Border((0,), (shape,)) for stage in range(1, schedule.num_stages)}
    transfers = Transfers(Timetable(schedule, rank), [Route([], borders)] * schedule.num_microbatches, wire)
    forwards, found = schedule.count(Kind.FORWARD, rank), []
    for action in schedule.ranks[rank]:
        if action.kind in (*SENDS, *RECEIVES):
            transfers.do(action, nothing)
        forwards -= action.kind is Kind.FORWARD
        if action.kind is Kind.FORWARD and not forwards:
            transfers.forwarded(lambda: None)
        found.append(wire.waiting)
    return found


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "modular", "zbv"])
@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("size_bytes", [1 << 10, EARLY_BYTES // 6, 1 << 30])
def test_as_many_receives_wait_as_the_runtime_has_posted_and_not_done(
    name: str, on_host: bool, size_bytes: int
) -> None:
    schedule = chosen(name, 8, 4, 13)[1]
    for rank in range(4):
        found = _on_paper(schedule, rank, size_bytes, on_host=on_host)
        assert found == _in_fact(schedule, rank, size_bytes, on_host=on_host), rank
        assert found[-1] == 0
        assert max(found) > 0


def test_a_rank_without_a_pipeline_waits_for_nothing() -> None:
    assert set(_on_paper(chosen("layered", 4, 1, 4)[1], 0, 3, on_host=True)) == {0.0}


def test_hosts_receive_ahead_of_time_small_values_further_and_gpus_do_not() -> None:
    schedule = chosen("gpipe", 2, 2, 24)[1]
    sizes = (1 << 30, EARLY_BYTES // 8, 1)
    large, some, small = (max(_on_paper(schedule, 1, size_bytes, on_host=True)) for size_bytes in sizes)
    alone = max(_on_paper(schedule, 1, 1, on_host=False))
    assert alone == 1
    assert large == EARLY
    assert some == 7  # and the one that came
    assert small == 21  # seven further with every wait, until none is left
