"""What moves to the host's memory and back: seconds over the link, bytes that leave a rank and come again."""

from dataclasses import replace
from typing import Any

import pytest

from meshwright.clusters.hardware import gpu
from meshwright.clusters.simulated import Cluster
from meshwright.clusters.simulated.alive import Walk
from meshwright.clusters.simulated.efficiency import fitted
from meshwright.clusters.simulated.holding import held_by
from meshwright.clusters.simulated.hosting import check_link, moves_s, updated_s
from meshwright.clusters.simulated.keeping import Share, States
from meshwright.clusters.simulated.machine import Machine
from meshwright.clusters.simulated.paper import Paper
from meshwright.parallel.errors import WrapError
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.pipeline.actions import Kind, Schedule
from meshwright.parallel.pipeline.lower import lowered
from meshwright.parallel.pipeline.orders import breadth_first
from meshwright.parallel.work import Passes, Product, Sent, Traced, Work

NOTHING = Passes(forward=Work(), backward=Work())
BLOCK = Passes(
    forward=Work(products=(Product(64, 64, 64),), saved_bytes=100e6),
    backward=Work(products=2 * (Product(64, 64, 64),)),
    input_bytes=20e6,
    reread_bytes=20e6,
    made_bytes=40.0,
)
H100 = gpu("H100")
CPU = replace(H100, generation="cpu", name="host")
SHARDED = {"0": Share(whole=1000.0, trained=1000.0, shard=500.0), "": Share(whole=10.0, trained=10.0, shard=5.0)}


def _schedule(num_blocks: int, *, offload: bool) -> Schedule:
    return lowered(breadth_first([0] * num_blocks, 2), recompute=True, offload=offload)


def _paper(*, kind: Any = H100, mesh: Mesh | None = None, num_blocks: int = 4, **how: Any) -> Paper:
    names = list(map(str, range(num_blocks)))
    mesh = mesh or Mesh()
    how = {"schedule": _schedule(num_blocks, offload=True)} | how
    return Paper(
        machine=Machine(mesh=mesh, cluster=Cluster(gpu=kind, num_gpus=mesh.world_size), efficiency=fitted()),
        traced=Traced(blocks=dict.fromkeys(names, BLOCK), before=NOTHING, after=NOTHING),
        stage_of={name: int(name) for name in names} if how["schedule"].num_stages > 1 else {},
        **{"recomputed": frozenset(names), **how},
    )


def test_inputs_leave_and_come_back_over_the_link_in_order_with_what_computes() -> None:
    hosted, kept = _paper(), _paper(schedule=_schedule(4, offload=False))
    moves = hosted.schedule.count(Kind.OFFLOAD)
    assert moves == hosted.schedule.count(Kind.FETCH) > 4
    one_s = 20e6 / (0.8 * 63e9)
    assert hosted.step.offload_s == pytest.approx(2 * moves * one_s)
    assert hosted.step.pp_bubble_s == pytest.approx(0.0, abs=1e-12)
    assert hosted.timeline.makespan == pytest.approx(kept.timeline.makespan + 2 * moves * one_s)
    assert hosted.step.total_s - hosted.step.offload_s == pytest.approx(kept.step.total_s)


def test_on_a_cpu_inputs_are_copied_once_and_come_back_by_name() -> None:
    paper = _paper(kind=CPU)
    copied_s = paper.machine.efficiency.memory_s(2 * 20e6, CPU)
    assert moves_s(paper, 0) == {Kind.OFFLOAD: copied_s, Kind.FETCH: 0.0}
    assert paper.step.offload_s == pytest.approx(paper.schedule.count(Kind.OFFLOAD) * copied_s)


def test_stages_whose_blocks_are_not_recomputed_keep_their_inputs() -> None:
    paper = _paper(recomputed=frozenset("0"))
    assert set(moves_s(paper, 1).values()) == {0.0}


def test_what_is_in_the_host_s_memory_is_not_on_the_rank() -> None:
    states = States(parameters=7.0, gradients=0.0, optimizer=14.0)
    hosted, kept = (_paper(schedule=_schedule(8, offload=each), num_blocks=8) for each in (True, False))
    away, here = (held_by(each, 0, states) for each in (hosted, kept))
    most = 8 * 2 * 20e6  # inputs of all blocks and micro-batches
    assert here.activations + here.working == pytest.approx(most + 80e6)
    assert here.host == 0.0
    assert away.host >= most - 4 * 20e6
    assert away.activations <= 100e6 + 4 * 20e6
    assert away.total_bytes == pytest.approx(sum(away.causes.values()))
    walk = Walk(hosted, 0, states)
    walk.fullest()
    assert walk.kept == pytest.approx(0.0)  # all came back


def test_on_a_cpu_what_is_away_is_still_there() -> None:
    states = States(parameters=7.0, gradients=0.0, optimizer=14.0)
    away, here = (
        held_by(_paper(kind=CPU, schedule=_schedule(8, offload=each), num_blocks=8), 0, states)
        for each in (True, False)
    )
    assert away.host == 0.0
    assert away.activations == here.activations


def _sharded(kind: Any, **how: Any) -> Paper:
    sent = (Sent("fsdp", "all_gather", 2e9), Sent("fsdp", "all_gather", 2e9), Sent("fsdp", "reduce_scatter", 2e9))
    schedule = Schedule.read("0F0,0B0", name="plain")
    return _paper(
        kind=kind, mesh=Mesh(fsdp=2), num_blocks=1, recomputed=frozenset(), schedule=schedule, sent=sent,
        optimizer_bytes=7e9, **how,
    )  # fmt: skip


def test_shards_in_the_host_s_memory_travel_and_are_updated_there() -> None:
    plain, hosted = (_sharded(H100, shards_on_host=each) for each in (False, True))
    assert plain.step.offload_s == 0.0
    moved_s, busy_s = 2 * 1e9 / (0.8 * 63e9), plain.step.compute_s
    assert hosted.step.offload_s == pytest.approx(moved_s - busy_s)
    assert updated_s(hosted) == pytest.approx(7e9 / (0.8 * 63e9))
    assert updated_s(plain) == plain.machine.efficiency.memory_s(7e9, H100)
    for each in (False, True):
        assert _sharded(CPU, shards_on_host=each).step == _sharded(CPU).step


def test_of_shards_in_the_host_s_memory_a_rank_holds_what_is_gathered_and_on_its_way() -> None:
    states = States(parameters=505.0, gradients=505.0, optimizer=1010.0, shares=SHARDED, follows=False)
    held = {each: held_by(_sharded(H100, shards_on_host=each), 0, states) for each in (False, True)}
    assert (held[False].parameters, held[False].optimizer, held[False].host) == (505.0, 1010.0, 0.0)
    assert (held[True].parameters, held[True].optimizer) == (0.0, 0.0)
    assert held[True].host == 505.0 + 1010.0 + 505.0
    last = Walk(_sharded(H100, shards_on_host=True), 0, states)
    last.fullest()
    assert last.gradients == 0.0
    on_cpu = held_by(_sharded(CPU, shards_on_host=True), 0, states)
    assert on_cpu == held_by(_sharded(CPU), 0, states)


def test_a_link_that_nobody_knows_is_refused_with_the_way_out() -> None:
    unknown = replace(H100, name="X1")
    said = r"nobody knows how fast X1 reaches its host's memory; take a GPU of the catalog"
    for paper in (_paper(kind=unknown), _sharded(unknown, shards_on_host=True)):
        with pytest.raises(WrapError, match=said):
            check_link(paper)
    for paper in (_paper(kind=unknown, schedule=_schedule(4, offload=False)), _sharded(unknown), _paper(kind=CPU)):
        check_link(paper)
