"""The stages of a model on a mesh: which blocks each holds, which rank runs it, and what this rank does in a step."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

from torch import nn

from meshwright.parallel.blocks import candidates, find_blocks
from meshwright.parallel.errors import ScheduleError, WrapError, nearest
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.options import Options
from meshwright.parallel.pipeline.actions import Action, Schedule
from meshwright.parallel.pipeline.lower import lowered, only_forward
from meshwright.parallel.pipeline.transfers import Timetable

__all__ = ["Stages", "stages_of"]


@dataclass(frozen=True, eq=False)
class Stages:
    """A model cut into stages.

    Args:
        blocks: name -> module; none where the model is stepped as a whole.
        stage_of: block -> stage.
        schedule: of one step, all ranks of the pipeline.
        forward: of one micro-batch without gradients.
        rank: of this process in the pipeline.
        recomputed: names of blocks of which only the inputs are kept.
    """

    blocks: Mapping[str, nn.Module]
    stage_of: Mapping[str, int]
    schedule: Schedule
    forward: Schedule
    rank: int
    recomputed: frozenset[str] = frozenset()

    @property
    def actions(self) -> tuple[Action, ...]:
        """What this rank does."""
        return self.schedule.ranks[self.rank]

    @property
    def forward_actions(self) -> tuple[Action, ...]:
        """What this rank does for one micro-batch without gradients."""
        return self.forward.ranks[self.rank]

    @cached_property
    def timetable(self) -> Timetable:
        """The messages of this rank in a step."""
        return Timetable(self.schedule, self.rank)

    @cached_property
    def forward_timetable(self) -> Timetable:
        """Those of one micro-batch without gradients."""
        return Timetable(self.forward, self.rank)

    @property
    def homes(self) -> dict[str, int]:
        """Block -> rank of the pipeline."""
        return {block: self.schedule.homes[stage] for block, stage in self.stage_of.items()}

    @property
    def mine(self) -> dict[str, int]:
        """Block -> stage, of this rank's stages."""
        return {block: stage for block, stage in self.stage_of.items() if self.schedule.homes[stage] == self.rank}


def stages_of(module: nn.Module, mesh: Mesh, rank: int, options: Options) -> Stages:
    """Cuts a model as the options ask; their costs are numbers by now.

    Raises:
        WrapError: when the model has no blocks that repeat or that `options.blocks` names, and needs them.
        ScheduleError: when it has too few, or what is asked for does not fit it.
    """
    blocks = {} if options.order == "accumulate" else find_blocks(module, options.blocks)
    if options.order != "accumulate" and not blocks:
        way_out = "pp=1" if mesh.pp > 1 else "schedule='accumulate'"
        named = candidates(module)
        raise WrapError(
            f"schedule={options.schedule_name!r} goes block by block, but the model has no list of repeated blocks; "
            f"name them with blocks=[...]{f' (some of {named})' if named else ''}, or use {way_out}"
        )
    try:
        placement, schedule = options.chosen(mesh, max(len(blocks), 1))
    except ScheduleError as error:
        raise ScheduleError(f"{error} ({_shown(list(blocks))})") from error
    stage_of = {name: placement.stage_of(number) for number, name in enumerate(blocks)}
    zero_stage = options.zero_stage if mesh.fsdp > 1 else 0
    forward = lowered(only_forward(schedule), zero_stage=zero_stage, num_buffers=options.num_buffers)
    recomputed = frozenset(_recomputed(list(blocks), options.recompute))
    return Stages(blocks, stage_of, schedule, forward, mesh.coordinates(rank)["pp"], recomputed)


def _recomputed(blocks: Sequence[str], asked: str | Sequence[str] | None) -> Iterator[str]:
    """Blocks that the option `recompute` names."""
    patterns = ("*",) if asked == "blocks" else asked or ()
    for pattern in patterns:
        found = [block for block in blocks if fnmatchcase(block, pattern)]
        if not found:
            raise WrapError(f"recompute: no block fits {pattern!r}; {nearest(pattern, blocks)}")
        yield from found


def _shown(blocks: Sequence[str]) -> str:
    if len(blocks) < 2:
        return f"one block, however often it is called: {blocks[0]}" if blocks else "stepped as a whole"
    return f"blocks {blocks[0]} to {blocks[-1]}"
