"""What memory each rank of a job on paper needs, and for what: states, and what the walk of its schedule keeps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from meshwright.clusters.simulated.paper import Paper
from meshwright.parallel.pipeline.actions import COMPUTE, Action, Kind
from meshwright.parallel.work import Passes

__all__ = ["Held", "States", "fullest", "held_by"]

_LAST = (Kind.BACKWARD, Kind.WEIGHT_GRADIENT)


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes that a rank keeps between steps, and those of parameters and gradients that are whole in between.

    Args:
        parameters: kept.
        gradients: after a step.
        optimizer: AdamW's two moments.
        gathered: whole copies of what is sharded, and whole gradients before they are reduced.
    """

    parameters: float
    gradients: float
    optimizer: float
    gathered: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes of one rank by cause; they add up to the whole.

    Args:
        parameters: kept between steps.
        gradients: the same.
        optimizer: moments.
        gathered: whole copies of what is sharded.
        activations: kept for backward by all micro-batches in flight.
        working: at once inside of one block, beyond what it keeps.
        fragmentation: held by the allocator beyond activations and working memory.
        overhead: context of the GPU's driver, buffers of collectives and of the framework.
    """

    parameters: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    working: float
    fragmentation: float
    overhead: float

    @property
    def total_bytes(self) -> float:
        """All together."""
        return sum(map(float, vars(self).values()))

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
    activations, working = max(_moments(paper, rank), key=sum)
    return Held(
        parameters=states.parameters,
        gradients=states.gradients,
        optimizer=states.optimizer,
        gathered=states.gathered,
        activations=activations,
        working=working,
        fragmentation=reserves.fragmentation * (activations + working),
        overhead=reserves.overhead_bytes,
    )


def _moments(paper: Paper, rank: int) -> Iterator[tuple[float, float]]:
    """Bytes kept and at work in each action."""
    stages = {stage: _Stage.of(paper, stage) for stage in paper.schedule.stages_of(rank)}
    shown = paper.schedule.has(Kind.RECOMPUTE)
    kept, again = 0.0, set[Action]()
    for action in paper.schedule.ranks[rank]:
        if action.kind not in COMPUTE:
            continue
        of = stages[action.stage]
        if action.kind is Kind.FORWARD:
            yield kept + of.kept, of.forward
            kept += of.kept
            continue
        mine = Action(action.stage, Kind.RECOMPUTE, action.microbatch)
        if action.kind is Kind.RECOMPUTE and mine not in again:
            again.add(mine)
            kept += of.remade
        yield kept, of.backward + (0.0 if shown else of.remade_at_once)
        if action.kind in _LAST:
            kept -= of.kept + (of.remade if mine in again else 0.0)


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """Bytes of one micro-batch on one stage: kept, kept again, at work, and again for one block alone."""

    kept: float
    remade: float
    forward: float
    backward: float
    remade_at_once: float

    @classmethod
    def of(cls, paper: Paper, stage: int) -> "_Stage":
        blocks, around = paper.blocks(stage), list(paper.around(stage))
        remade = [each for name, each in blocks.items() if name in paper.recomputed]
        whole = [each for name, each in blocks.items() if name not in paper.recomputed]
        every = [*blocks.values(), *around]
        return cls(
            kept=sum(each.input_bytes for each in remade) + _saved([*whole, *around]),
            remade=_saved(remade),
            forward=max((each.forward.working_bytes for each in every), default=0.0)
            + max((each.forward.saved_bytes for each in remade), default=0.0),
            backward=max((each.backward.working_bytes for each in every), default=0.0),
            remade_at_once=max((each.forward.saved_bytes for each in remade), default=0.0),
        )


def _saved(several: Sequence[Passes]) -> float:
    return sum(each.forward.saved_bytes for each in several)
