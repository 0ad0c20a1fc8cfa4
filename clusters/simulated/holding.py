"""What memory each rank of a job on paper needs, and for what: in the moment of its step in which most is alive."""

from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.clusters.simulated.alive import Walk
from meshwright.clusters.simulated.hosting import inputs_away
from meshwright.clusters.simulated.keeping import States
from meshwright.clusters.simulated.paper import Paper

__all__ = ["Held", "States", "fullest", "held_by"]


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes of one rank by cause, when they are most; they add up to the whole.

    Args:
        parameters: kept between steps.
        gradients: made so far, and buckets that they are sent from.
        optimizer: moments.
        gathered: whole copies of what is sharded, and buffers of collectives.
        activations: kept for backward by all micro-batches in flight.
        working: at once inside of one block, beyond what it keeps.
        fragmentation: held by the allocator beyond activations and working memory.
        overhead: context of the GPU's driver, buffers of collectives and of the framework.
        host: in the host's memory, which is no part of the whole; the most of a step.
    """

    parameters: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    working: float
    fragmentation: float
    overhead: float
    host: float = 0.0

    @property
    def causes(self) -> dict[str, float]:
        """What the rank's own memory is for."""
        return {name: float(each) for name, each in vars(self).items() if name != "host"}

    @property
    def total_bytes(self) -> float:
        """All together."""
        return sum(self.causes.values())

    @property
    def tensor_bytes(self) -> float:
        """Of tensors alone."""
        return self.total_bytes - self.fragmentation - self.overhead


def fullest(paper: Paper, states: Sequence[States]) -> tuple[int, Held]:
    """The rank of the pipeline that needs most, and what.

    Args:
        paper: the job.
        states: of each rank of the pipeline.
    """
    found = [held_by(paper, rank, each) for rank, each in enumerate(states)]
    rank = max(range(len(found)), key=lambda each: found[each].total_bytes)
    return rank, found[rank]


def held_by(paper: Paper, rank: int, states: States) -> Held:
    """What one rank of the pipeline needs at most."""
    reserves = paper.machine.efficiency.reserves
    walk = Walk(paper, rank, states)
    most, away = walk.fullest(), walk.shards_on_host
    return Held(
        parameters=0.0 if away else states.parameters,
        gradients=most.gradients,
        optimizer=0.0 if away else states.optimizer,
        gathered=most.gathered,
        activations=most.activations,
        working=most.working,
        fragmentation=reserves.fragmentation * (most.activations + most.working),
        overhead=reserves.overhead_bytes,
        host=inputs_away(paper, rank) + (states.parameters + states.gradients + states.optimizer if away else 0.0),
    )
