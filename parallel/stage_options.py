"""Options that say how a model is cut into stages and in which order they run."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Literal, TypedDict, get_args

from meshwright.parallel.errors import WrapError, nearest
from meshwright.parallel.pipeline.actions import Schedule
from meshwright.parallel.pipeline.choose import Asked, name_of
from meshwright.parallel.pipeline.files import is_file, read_schedule
from meshwright.parallel.pipeline.placements import Placement

__all__ = ["ScheduleKind", "StageKeywords", "StageOptions"]

ScheduleKind = Literal["accumulate", "layered", "gpipe", "1f1b", "interleaved", "modular", "zb-h1", "zbv"]
_COUNTED = ("parameters", "flops")


class StageKeywords(TypedDict, total=False):
    """Keyword arguments about stages; see `StageOptions`."""

    schedule: ScheduleKind | Schedule | str | Path
    blocks: Sequence[str] | None
    placement: Placement | None
    stage_costs: Literal["parameters", "flops"] | Sequence[float] | None
    num_loops: int | None
    group_size: int | None
    num_buffers: int
    recompute: Literal["blocks"] | Sequence[str] | None
    offload_inputs: bool


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """How a model is cut into stages, and in which order they run.

    Args:
        schedule: "accumulate" takes one micro-batch after the other through the model, "layered" all of them through
            a block before the next one: their gradients leave during the whole backward. With the axis `pp`: "gpipe",
            "1f1b", "interleaved" (1F1B with several stages on each rank), "modular" (layered, blocks dealt in turn),
            "zb-h1" or "zbv" (backward split in two). Or a `Schedule`, or a path ending in ".csv" of one as text: its
            order of computing is kept.
        blocks: patterns (`fnmatch`) of the paths of the repeated blocks, in the order in which they are called; by
            default they are found by structure.
        placement: which blocks make a stage and which rank runs it, if not as the schedule would have it.
        stage_costs: what to cut stages evenly by: "parameters", "flops" (of one forward on `example`), or a number for
            each block; by default the number of blocks.
        num_loops: stages of each rank, for "interleaved" (2 by default) and "modular" (one for each block by default).
        group_size: micro-batches that go through a stage before the next stage, for "layered" and "modular" (all by
            default) and "interleaved" (as many as ranks by default).
        num_buffers: stages whose parameters are whole at once, where a layered step shards them.
        recompute: blocks of which only the inputs are kept for backward: "blocks" (all) or patterns of their paths.
        offload_inputs: keep these inputs in host memory until they are needed.

    Raises:
        WrapError: for values that do not exist.
        ScheduleError: for a file that holds no schedule.
    """

    schedule: ScheduleKind | Schedule | str | Path = "accumulate"
    blocks: Sequence[str] | None = None
    placement: Placement | None = None
    stage_costs: str | Sequence[float] | None = None
    num_loops: int | None = None
    group_size: int | None = None
    num_buffers: int = 2
    recompute: Literal["blocks"] | Sequence[str] | None = None
    offload_inputs: bool = False

    def __post_init__(self) -> None:
        if is_file(self.schedule):
            assert isinstance(self.schedule, str | Path), self.schedule
            object.__setattr__(self, "schedule", read_schedule(self.schedule))
        names = get_args(ScheduleKind)
        if not isinstance(self.schedule, Schedule) and self.schedule not in names:
            raise WrapError(
                f"schedule={self.schedule!r} does not exist; {nearest(str(self.schedule), names)} (or a path ending in "
                ".csv)"
            )
        for name in ("num_loops", "group_size", "num_buffers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise WrapError(f"{name}={value} must be at least 1")
        if isinstance(self.blocks, str):
            raise WrapError(f"blocks={self.blocks!r} is one text; write a list: blocks=[{self.blocks!r}]")
        if self.placement is not None and not isinstance(self.placement, Placement):
            raise WrapError(f"placement={self.placement!r} is none; write Placement(cuts, homes)")
        _check_costs(self.stage_costs)
        _check_recompute(self.recompute, self.offload_inputs)

    @property
    def schedule_name(self) -> str:
        """How reports and errors call the schedule."""
        return name_of(self.order)

    @property
    def order(self) -> str | Schedule:
        """The schedule, or the name of one."""
        assert not isinstance(self.schedule, Path), "read when the options were made"
        return self.schedule

    @property
    def cuts_by_hand(self) -> bool:
        """Whether the user says of stages what only a look at the model can find to be wrong."""
        given = (self.blocks, self.placement, self.stage_costs)
        return isinstance(self.schedule, Schedule) or any(each is not None for each in given)

    @property
    def asked(self) -> Asked:
        """What is asked for besides a schedule."""
        return Asked(
            num_loops=self.num_loops,
            group_size=self.group_size,
            placement=self.placement,
            stage_costs=self.stage_costs,
        )


def _check_recompute(recompute: str | Sequence[str] | None, offload_inputs: bool) -> None:
    if isinstance(recompute, str) and recompute != "blocks":
        raise WrapError(f"recompute={recompute!r} is one text; write 'blocks' for all, or a list: [{recompute!r}]")
    if isinstance(recompute, bool):
        raise WrapError(f"recompute={recompute} is no choice of blocks; write 'blocks' for all, or leave it out")
    if offload_inputs and not recompute:
        raise WrapError("offload_inputs moves the inputs of recomputed blocks; name these with recompute='blocks'")


def _check_costs(costs: str | Sequence[float] | None) -> None:
    if isinstance(costs, str):
        if costs not in _COUNTED:
            raise WrapError(f"stage_costs={costs!r} does not exist; {nearest(costs, _COUNTED)} (or a list of numbers)")
        return
    for number, cost in enumerate(costs or ()):
        if not isfinite(cost) or cost < 0:
            raise WrapError(f"stage_costs[{number}]={cost} is no cost; give finite numbers of at least 0")
