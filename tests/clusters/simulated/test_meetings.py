"""What ranks do because others do the same: how often they meet, and what they copy, counted by hand."""

import pytest

from meshwright.clusters.hardware import gpu
from meshwright.clusters.simulated import Cluster
from meshwright.clusters.simulated.efficiency import fitted
from meshwright.clusters.simulated.machine import Machine
from meshwright.clusters.simulated.meetings import StageBytes, copied_bytes, meetings
from meshwright.clusters.simulated.paper import Paper
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.pipeline.actions import Schedule
from meshwright.parallel.work import Passes, Sent, Traced, Work

NOTHING = Passes(forward=Work(), backward=Work())
SUMS = Work(sent=(Sent("tp", "all_reduce", 1.0),) * 2)
STEP = "0UNSHARD,0F0,0F1,0B0,0B1,0REDUCE_GRAD"


def _paper(mesh: Mesh, *, sent: tuple[Sent, ...] = (), closing: tuple[Sent, ...] = ()) -> Paper:
    cluster = Cluster(gpu=gpu("H100"), num_gpus=mesh.world_size)
    return Paper(
        machine=Machine(mesh=mesh, cluster=cluster, efficiency=fitted()),
        schedule=Schedule.read(STEP, name="here"),
        traced=Traced(blocks={"0": Passes(forward=SUMS, backward=SUMS)}, before=NOTHING, after=NOTHING),
        stages={0: StageBytes(gathered=100.0, reduced=1000.0)},
        rest=StageBytes(gathered=1.0, reduced=10.0),
        sent=sent,
        closing=closing,
    )


@pytest.mark.parametrize(
    ("mesh", "met"),
    [
        (Mesh(), 0),
        (Mesh(tp=2), 2 * 4),  # two in each direction, for each of two micro-batches
        (Mesh(dp=2), 2 + 1),  # a gather and a reduction of the schedule, and the end
        (Mesh(dp=2, tp=2), 2 * 4 + 2 + 1),
    ],
    ids=str,
)
def test_ranks_meet_in_collectives_of_blocks_and_of_the_schedule_and_at_the_end(mesh: Mesh, met: int) -> None:
    assert meetings(_paper(mesh), 0) == met


def test_ranks_meet_in_each_sum_that_ends_a_step_and_in_what_no_schedule_shows() -> None:
    one = Sent("dp", "all_reduce", 1.0)
    assert meetings(_paper(Mesh(dp=2), sent=(one, one), closing=(one,)), 0) == 2 + 1 + 2 + 1


def test_gathered_parameters_are_copied_out_of_buffers_and_gradients_into_them() -> None:
    assert copied_bytes(_paper(Mesh(fsdp=2)), 0) == 2 * (100.0 + 1.0) + 3 * (1000.0 + 10.0)
    assert copied_bytes(_paper(Mesh(dp=2)), 0) == 2 * (100.0 + 1.0) + 2 * (1000.0 + 10.0)
    sent = tuple(Sent("fsdp", kind, 1e4) for kind in ("all_gather", "reduce_scatter", "all_reduce"))
    assert copied_bytes(_paper(Mesh(dp=2), sent=sent), 0) == (2 + 3 + 2) * 1e4 + 2 * 101.0 + 2 * 1010.0
