"""Real ranks whose blocks only sleep: what a step takes over what the simulated walk of its schedule says.

Each block sleeps a fixed time forward and a fixed time in backward, so that eight ranks do not share two processors;
what remains besides is the runtime, the transfers and the scheduler of the operating system. A step is timed on every
rank from the start of its first block to the end of its last; a step takes from the earliest start to the latest end.
"""

from statistics import median
from typing import Any

import torch
import torch.distributed as dist

import meshwright as mw
from benchmarks.sleeping import BACKWARD_S, FORWARD_S
from meshwright.parallel.pipeline.actions import COMPUTE
from meshwright.parallel.pipeline.choose import ACROSS_RANKS, chosen
from meshwright.parallel.pipeline.timeline import Costs, timeline
from meshwright.parallel.ranks import RankPool

__all__ = ["compare"]

RANKS = (4, 8)
_LOOPS = 2  # blocks of each rank


def _measure(name: Any, microbatches: int, steps: int) -> list[tuple[float, float]]:
    """First start and last end of each step on this rank."""
    from benchmarks.sleeping import SPANS, WIDTH, Sleeping

    torch.set_num_threads(1)
    ranks = dist.get_world_size()
    model = mw.parallelize(
        Sleeping(ranks * _LOOPS), mw.Mesh(pp=ranks), schedule=name, num_microbatches=microbatches, loss="sum"
    )
    batch = torch.ones(microbatches, WIDTH)
    found = []
    for _ in range(steps + 1):
        dist.barrier()
        SPANS.clear()
        model.step(batch)
        found.append((min(start_s for start_s, _ in SPANS), max(end_s for _, end_s in SPANS)))
    return found[1:]  # the first step also looks for the way of micro-batches


def compare(pool: RankPool, steps: int) -> dict[str, Any]:
    """Seconds of a step, measured and on paper, and their ratio, by schedule and ranks."""
    found: dict[str, Any] = {}
    for ranks in RANKS:
        microbatches = ranks + 2
        for name in ACROSS_RANKS:
            by_rank = pool.run(_measure, ranks, (name, microbatches, steps), timeout_s=300.0)
            measured_s = [
                max(end for _, end in step) - min(start for start, _ in step) for step in zip(*by_rank, strict=True)
            ]
            paper_s = _paper_s(name, ranks, microbatches)
            found[f"{name} on {ranks}"] = {
                "measured_s": median(measured_s),
                "best_s": min(measured_s),
                "paper_s": paper_s,
                "ratio": median(measured_s) / paper_s,
                "best_ratio": min(measured_s) / paper_s,
            }
    return found


def _paper_s(name: str, ranks: int, microbatches: int) -> float:
    placement, schedule = chosen(name, ranks * _LOOPS, ranks, microbatches)
    sizes = {stage: float(len(placement.blocks(stage))) for stage in range(len(placement.homes))}
    return timeline(schedule.only(*COMPUTE), Costs(FORWARD_S, BACKWARD_S, stages=sizes)).makespan
