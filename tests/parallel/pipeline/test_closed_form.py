"""Formulas count what schedules do."""

import pytest

from meshwright.parallel.pipeline.check import check
from meshwright.parallel.pipeline.closed_form import Pipe, gathers, in_flight, reductions
from meshwright.parallel.pipeline.lower import lowered
from meshwright.parallel.pipeline.orders import accumulation, breadth_first, one_forward_one_backward


@pytest.mark.parametrize("buffers", [2, 3])
@pytest.mark.parametrize(("stages", "microbatches"), [(4, 1), (4, 3), (8, 2), (16, 4)])
def test_gathers_and_reductions_of_a_rank_are_counted(stages: int, microbatches: int, buffers: int) -> None:
    for make, layered in ((breadth_first, True), (accumulation, False)):
        facts = check(lowered(make([0] * stages, microbatches), zero_stage=3, num_buffers=buffers))
        assert facts.gathers[0] == gathers(stages, microbatches, layered=layered, num_buffers=buffers)
        assert facts.reductions[0] == reductions(stages, microbatches, layered=layered)
        assert facts.peak_gathered[0] == buffers


@pytest.mark.parametrize("pipe", [Pipe(1, 3, 2), Pipe(2, 2), Pipe(4, 3), Pipe(4, 8), Pipe(4, 8, 4), Pipe(8, 16, 8)])
def test_what_is_kept_for_backward_is_counted(pipe: Pipe) -> None:
    homes = [stage % pipe.num_ranks for stage in range(pipe.num_ranks * pipe.num_loops)]
    for make, depth_first in ((breadth_first, False), (one_forward_one_backward, True)):
        facts = check(make(homes, pipe.num_microbatches))
        assert max(facts.peak_activations) == in_flight(pipe, depth_first=depth_first)
