"""What a schedule takes and counts, as formulas: checked against the simulated walk, and used before anything is run.

Lamy-Poirier, "Layered gradient accumulation and modular pipeline parallelism" (arXiv 2106.02679) and "Breadth-First
Pipeline Parallelism" (arXiv 2211.05953); Narayanan et al., interleaved 1F1B (arXiv 2104.04473); Qi et al., zero bubble
(arXiv 2401.10241). Where a formula says more than they do, it was derived and is held by the tests.
"""

from dataclasses import dataclass
from fractions import Fraction

__all__ = ["Pipe", "gathers", "in_flight", "makespan", "reductions", "zero_bubble_h1_makespan"]


@dataclass(frozen=True)
class Pipe:
    """The numbers that a schedule's formulas ask for.

    Args:
        num_ranks: P.
        num_microbatches: M.
        num_loops: V, stages of each rank.
    """

    num_ranks: int
    num_microbatches: int
    num_loops: int = 1

    @property
    def bubble(self) -> Fraction:
        """Idle over computing time without latency: (P - 1) / (M V) where M >= P, whatever forward and backward take.

        With fewer micro-batches than ranks each further loop waits P - M of them. Holds for breadth-first (with V = 1
        GPipe) and for 1F1B at any M; for interleaved 1F1B in groups of P where M is a multiple of P or below 2 P.

        >>> Pipe(4, 8, 4).bubble
        Fraction(3, 32)
        """
        waits = self.num_ranks - 1 + (self.num_loops - 1) * max(0, self.num_ranks - self.num_microbatches)
        return Fraction(waits, self.num_microbatches * self.num_loops)


def makespan(pipe: Pipe, forward: float, backward: float, *, latency: float = 0.0) -> float:
    """Time of a breadth-first step, stages of equal size.

    A rank is through with a loop after M times; the first micro-batch comes back for the next loop after P hops. It
    waits for the difference, in each direction.

    Args:
        pipe: its numbers.
        forward: of one micro-batch through one stage.
        backward: of the same.
        latency: of a hop to another rank, where computing does not hide it.

    >>> makespan(Pipe(4, 8, 4), 1, 2), makespan(Pipe(8, 8, 8), 1, 2, latency=0.25)
    (105.0, 244.5)
    """
    ranks, microbatches, loops = pipe.num_ranks, pipe.num_microbatches, pipe.num_loops
    hop = latency if ranks > 1 else 0.0
    return sum(
        loops * microbatches * time
        + (ranks - 1) * (time + hop)
        + (loops - 1) * max(0.0, ranks * (time + hop) - microbatches * time)
        for time in (forward, backward)
    )


def zero_bubble_h1_makespan(pipe: Pipe, forward: float, backward: float) -> float:
    """Time of a ZB-H1 step whose two halves of backward take equal time.

    The paper gives (P - 1)(F + I - W) of idle time for F = I = W; with F and I unequal the larger one fills the
    pipeline, and each micro-batch below P adds the smaller one.

    >>> zero_bubble_h1_makespan(Pipe(4, 8), 1, 2)
    27
    """
    ranks, microbatches = pipe.num_ranks, pipe.num_microbatches
    half = backward / 2
    idle = (ranks - 1) * max(forward, half) + max(0, ranks - microbatches) * min(forward, half)
    return microbatches * (forward + backward) + idle


def in_flight(pipe: Pipe, *, depth_first: bool) -> int:
    """Most (stage, micro-batch) pairs that a rank keeps for backward: M V breadth-first, fewer in (interleaved) 1F1B.

    >>> in_flight(Pipe(4, 8, 4), depth_first=False), in_flight(Pipe(4, 8, 4), depth_first=True)
    (32, 19)
    """
    ranks, microbatches, loops = pipe.num_ranks, pipe.num_microbatches, pipe.num_loops
    if not depth_first:
        return microbatches * loops
    if loops == 1:
        return min(ranks, microbatches)
    return min(microbatches * loops, (loops - 1) * ranks + 2 * (ranks - 1) + 1)


def gathers(num_stages: int, num_microbatches: int, *, layered: bool, num_buffers: int = 2) -> int:
    """Gathers of parameters in a step of one rank with more stages than buffers (ZeRO-3).

    Stages that are whole where forward turns into backward are not gathered again.

    >>> gathers(32, 16, layered=True), gathers(32, 16, layered=False)
    (62, 962)
    """
    if layered:
        return 2 * num_stages - num_buffers
    return num_microbatches * 2 * (num_stages - num_buffers) + num_buffers


def reductions(num_stages: int, num_microbatches: int, *, layered: bool) -> int:
    """Reductions of sharded gradients in a step of one rank (ZeRO-2 and 3).

    >>> reductions(32, 16, layered=True), reductions(32, 16, layered=False)
    (32, 512)
    """
    return num_stages if layered else num_stages * num_microbatches
