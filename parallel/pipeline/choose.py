"""What `schedule=` names: a placement of blocks and the order in which ranks compute."""

from meshwright.parallel.errors import ScheduleError
from meshwright.parallel.pipeline.actions import Schedule
from meshwright.parallel.pipeline.lower import lowered
from meshwright.parallel.pipeline.orders import accumulation, breadth_first, one_forward_one_backward
from meshwright.parallel.pipeline.placements import Placement, contiguous, looped, modular

__all__ = ["ACROSS_RANKS", "ON_ONE_RANK", "chosen"]

ON_ONE_RANK = ("accumulate", "layered")
ACROSS_RANKS = ("gpipe", "1f1b", "interleaved", "modular")


def chosen(
    name: str,
    num_blocks: int,
    num_ranks: int,
    num_microbatches: int,
    *,
    num_loops: int | None = None,
    zero_stage: int = 0,
    num_buffers: int = 2,
) -> tuple[Placement, Schedule]:
    """Placement and schedule of a model.

    Args:
        name: one of `ON_ONE_RANK` for one rank, else of `ACROSS_RANKS`.
        num_blocks: of the model; one that is stepped as a whole counts as one block.
        num_ranks: degree of the pipeline.
        num_microbatches: of one step.
        num_loops: stages of each rank, for "interleaved" (2 by default) and "modular" (one for each block by default).
        zero_stage: what data-parallel ranks share (see `lowered`).
        num_buffers: stages that a rank holds whole, where parameters are shared.

    Raises:
        ScheduleError: for fewer blocks than stages.

    >>> from meshwright.parallel.pipeline.actions import COMPUTE
    >>> print(chosen("modular", 4, 2, 2)[1].only(*COMPUTE).write(), end="")
    0F0,0F1,2F0,2F1,2B0,2B1,0B0,0B1
    1F0,1F1,3F0,3F1,3B0,3B1,1B0,1B1
    """
    placement = _placement(name, num_blocks, num_ranks, num_loops)
    if name == "accumulate":
        order = accumulation(placement.homes, num_microbatches)
    elif name in ("1f1b", "interleaved"):
        order = one_forward_one_backward(placement.homes, num_microbatches)
    else:
        order = breadth_first(placement.homes, num_microbatches)
    return placement, lowered(order, zero_stage=zero_stage, num_buffers=num_buffers)


def _placement(name: str, num_blocks: int, num_ranks: int, num_loops: int | None) -> Placement:
    if name in ("interleaved", "modular"):
        if name == "modular" and num_loops is None:
            return modular(num_blocks, num_ranks)
        return looped(num_blocks, num_ranks, num_loops=2 if num_loops is None else num_loops)
    if num_loops is not None:
        raise ScheduleError(f"schedule {name!r} takes no num_loops={num_loops}; use 'interleaved' or 'modular'")
    return modular(num_blocks, 1) if name in ON_ONE_RANK else contiguous(num_blocks, num_ranks)
