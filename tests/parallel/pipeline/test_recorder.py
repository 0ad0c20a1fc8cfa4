"""A recorded step is the step, and its timeline has every action once, in the order of the schedule."""

import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import meshwright as mw
from meshwright.parallel.pipeline.actions import COMPUTE, Kind, Schedule
from meshwright.parallel.pipeline.recorder import offsets
from meshwright.parallel.pipeline.timeline import Cause, Timeline
from meshwright.parallel.pipeline.trace import trace
from meshwright.testing import run_ranks
from tests.parallel.models import llama, tokens
from tests.parallel.pipeline.test_trace import check_arrows


def test_clocks_that_may_be_equal_are_and_others_are_put_between_their_bounds() -> None:
    assert offsets([[0.0, 4.0], [0.5, 3.5]], [[1.0, 5.0], [1.2, 5.1]]) == [0.0, 0.0]
    (first, second) = offsets([[0.0, 4.0], [-49.0, -45.5]], [[1.0, 5.0], [-48.8, -44.9]])
    assert (first, second) == (0.0, pytest.approx(49.35, abs=0.55))


Recorded = tuple[Timeline, Schedule, list[Tensor], list[Tensor]]


def _recorded(mesh: mw.Mesh, options: dict[str, Any]) -> Recorded:
    model = mw.parallelize(llama(num_hidden_layers=4)(), mesh, num_microbatches=3, **options)

    def result(loss: Tensor) -> list[Tensor]:
        return [loss, *(each for each in model.full_gradients().values() if each is not None)]

    before = result(model.step(tokens(12)()))
    loss, found = model.record_step(tokens(12)())
    assert model.schedule is not None
    return found, model.schedule, before, result(loss)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "schedule", "collectives"),
    [(mw.Mesh(pp=2), "modular", (0, 0)), (mw.Mesh(fsdp=2), "layered", (2 * 4 - 2, 4))],
    ids=["pp", "fsdp"],
)
def test_a_recorded_step_is_the_step_in_the_order_of_its_schedule(
    mesh: mw.Mesh, schedule: str, collectives: tuple[int, int]
) -> None:
    every = run_ranks(_recorded, mesh, mesh, {"schedule": schedule})
    for found, planned, before, after in every:
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
        assert found.num_ranks == mesh.pp
        for rank, row in enumerate(planned.only(*COMPUTE).ranks):
            mine = [span for span in found.spans if span.rank == rank]
            assert [span.action for span in mine] == list(row)
            waits = [wait for wait in found.waits if wait.rank == rank]
            assert waits[-1].cause is Cause.END
            for one, other in pairwise(sorted([*mine, *waits], key=lambda each: each.start)):
                assert one.start <= one.end <= other.start
        assert 0 < max(found.busy) < found.makespan
        assert (found.count(Kind.GATHER), found.count(Kind.REDUCE)) == collectives
        check_arrows(json.loads(trace(found))["traceEvents"], planned.count(Kind.SEND_ACTIVATION) * 2)
    if mesh.pp > 1:
        assert every[0][0] == every[1][0]


def test_a_model_without_a_schedule_has_nothing_to_record() -> None:
    with pytest.raises(ValueError, match="no order to record"):
        mw.parallelize(llama()(), mw.Mesh()).record_step(tokens()())
