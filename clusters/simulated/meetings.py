"""What ranks of a job on paper do because others do the same: sums that end a step, buffers, meetings."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from meshwright.parallel.pipeline.actions import Kind

if TYPE_CHECKING:
    from meshwright.clusters.simulated.paper import Paper

__all__ = ["StageBytes", "closing_s", "copied_bytes", "handled_s", "meetings"]

_COPIED = {"all_gather": 2.0, "reduce_scatter": 3.0, "all_reduce": 2.0}
"""Bytes read and written for each that data axes send: parameters out of the buffer that they came in, gradients into
one, which is cleared first where shards are padded."""


@dataclass(frozen=True, kw_only=True)
class StageBytes:
    """Bytes that one stage gathers and reduces, of all ranks that share them.

    Args:
        gathered: of parameters along `fsdp`.
        reduced: of gradients, along `fsdp` if there is one, then along `dp`.
    """

    gathered: float = 0.0
    reduced: float = 0.0


def closing_s(paper: "Paper", axis: str) -> float:
    """Seconds of the sums that end a step along an axis."""
    return sum(paper.machine.sent_s(each) for each in paper.closing if each.axis == axis)


def copied_bytes(paper: "Paper", rank: int) -> float:
    """Read and written between the buffers that data axes send and parameters or gradients, in a step."""
    reduced = _COPIED["reduce_scatter" if paper.machine.mesh.fsdp > 1 else "all_reduce"]
    found = sum(_COPIED[each.kind] * each.size_bytes for each in paper.sent)
    found += _COPIED["all_gather"] * paper.rest.gathered + reduced * paper.rest.reduced
    for action in paper.schedule.ranks[rank]:
        of = paper.stages.get(action.stage, StageBytes())
        if action.kind is Kind.GATHER:
            found += _COPIED["all_gather"] * of.gathered
        elif action.kind is Kind.REDUCE:
            found += reduced * of.reduced
    return found


def handled_s(paper: "Paper") -> float:
    """Seconds in which hooks gather and reduce units: where the schedule does not, torch's `fully_shard` does."""
    if paper.machine.mesh.fsdp == 1:
        return 0.0
    calls = sum(each.kind in ("all_gather", "reduce_scatter") for each in paper.sent)
    return calls * paper.machine.efficiency.links.unit_s


def meetings(paper: "Paper", rank: int) -> int:
    """Times in a step that a rank cannot go on before others have come as far."""
    count, mesh = paper.schedule.num_microbatches, paper.machine.mesh
    stages = paper.schedule.stages_of(rank)
    passes = [each for stage in stages for each in (*paper.blocks(stage).values(), *paper.around(stage))]
    met = sum(
        paper.machine.group(one.axis).size > 1 for each in passes for one in (*each.forward.sent, *each.backward.sent)
    )
    shown = sum(action.kind in (Kind.GATHER, Kind.REDUCE) for action in paper.schedule.ranks[rank])
    at_end = len(paper.closing) + (mesh.data_degree > 1)
    return count * met + (shown if mesh.data_degree > 1 else 0) + len(paper.sent) + at_end
