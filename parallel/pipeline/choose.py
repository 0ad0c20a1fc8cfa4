"""What `schedule=` and its companions ask for: a placement of blocks and the order in which ranks compute."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

from meshwright.parallel.errors import ScheduleError
from meshwright.parallel.pipeline.actions import Kind, Schedule
from meshwright.parallel.pipeline.check import check
from meshwright.parallel.pipeline.lower import lowered
from meshwright.parallel.pipeline.orders import accumulation, breadth_first, hybrid, one_forward_one_backward
from meshwright.parallel.pipeline.placements import Placement, contiguous, looped, modular, v_shaped
from meshwright.parallel.pipeline.zero_bubble import zero_bubble_h1, zero_bubble_v

__all__ = ["ACROSS_RANKS", "ON_ONE_RANK", "Asked", "chosen", "complaints", "name_of"]

ON_ONE_RANK = ("accumulate", "layered")
ACROSS_RANKS = ("gpipe", "1f1b", "interleaved", "modular", "zb-h1", "zbv")

_COMPUTED = (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT)
_LOOPED = ("interleaved", "modular")
_GROUPED = ("layered", "interleaved", "modular")
_ORDERS: dict[str, Callable[[Sequence[int], int], Schedule]] = {
    "accumulate": accumulation,
    "layered": breadth_first,
    "gpipe": breadth_first,
    "1f1b": one_forward_one_backward,
    "interleaved": one_forward_one_backward,
    "modular": breadth_first,
    "zb-h1": zero_bubble_h1,
    "zbv": zero_bubble_v,
}


class Lowering(TypedDict, total=False):
    """Keyword arguments of `lowered`."""

    zero_stage: int
    num_buffers: int
    recompute: bool
    offload: bool


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked for besides a schedule.

    Args:
        num_loops: stages of each rank, for "interleaved" (2 by default) and "modular" (one for each block by default).
        group_size: micro-batches that go through a stage before the next stage, for "layered" and "modular" (all of
            them by default) and "interleaved" (as many as ranks by default).
        placement: which blocks make a stage and which rank runs it; by default the schedule's own, cut evenly.
        stage_costs: one number for each block, by which stages are cut instead; or the name of what is counted.
    """

    num_loops: int | None = None
    group_size: int | None = None
    placement: Placement | None = None
    stage_costs: str | Sequence[float] | None = None


def chosen(
    schedule: str | Schedule,
    num_blocks: int,
    num_ranks: int,
    num_microbatches: int,
    *,
    asked: Asked = Asked(),
    **how: Unpack[Lowering],
) -> tuple[Placement, Schedule]:
    """Placement and schedule of a model.

    Args:
        schedule: one of `ON_ONE_RANK` for one rank, else of `ACROSS_RANKS`; or one whose order of computing is kept.
        num_blocks: of the model; one that is stepped as a whole counts as one block.
        num_ranks: degree of the pipeline.
        num_microbatches: of one step.
        asked: besides; costs as numbers.
        how: see `lowered`.

    Raises:
        ScheduleError: for what does not fit together, and for fewer blocks than stages.

    >>> print(chosen("modular", 4, 2, 2)[1].only(Kind.FORWARD, Kind.BACKWARD).write(), end="")
    0F0,0F1,2F0,2F1,2B0,2B1,0B0,0B1
    1F0,1F1,3F0,3F1,3B0,3B1,1B0,1B1
    """
    for _, text in complaints(schedule, num_ranks, num_microbatches=num_microbatches, asked=asked):
        raise ScheduleError(text)
    placement = _placement(schedule, num_blocks, num_ranks, asked)
    order = _order(schedule, placement.homes, num_microbatches, group_size=asked.group_size)
    return placement, lowered(order, **how)


def complaints(
    schedule: str | Schedule, num_ranks: int, *, num_microbatches: int, asked: Asked
) -> Iterator[tuple[str, str]]:
    """What does not fit together whatever the model is: the option at fault, and a text about it.

    >>> list(complaints("gpipe", 2, num_microbatches=4, asked=Asked(group_size=2)))
    [('group_size', "schedule 'gpipe' takes no group_size=2; use 'layered', 'interleaved' or 'modular'")]
    """
    found = [
        *_of_numbers(schedule, num_microbatches, asked),
        *_of_ranks(schedule, num_ranks, asked.placement),
        *_of_cuts(schedule, num_ranks, asked),
    ]
    yield from found
    if found or (isinstance(schedule, str) and asked.placement is None):
        return
    try:
        if isinstance(schedule, Schedule):
            check(schedule)
            _check_idle(schedule)
        elif asked.placement is not None:
            _order(schedule, asked.placement.homes, num_microbatches, group_size=asked.group_size)
    except ScheduleError as error:
        yield "schedule", str(error)


def name_of(schedule: str | Schedule) -> str:
    """How messages call a schedule."""
    return schedule if isinstance(schedule, str) else schedule.name


def _of_numbers(schedule: str | Schedule, num_microbatches: int, asked: Asked) -> Iterator[tuple[str, str]]:
    """Complaints about loops, groups and micro-batches."""
    name, group_size = name_of(schedule), asked.group_size
    if asked.num_loops is not None and schedule not in _LOOPED:
        yield "num_loops", f"schedule {name!r} takes no num_loops={asked.num_loops}; use 'interleaved' or 'modular'"
    if group_size is not None and schedule not in _GROUPED:
        way_out = "use 'layered', 'interleaved' or 'modular'"
        yield "group_size", f"schedule {name!r} takes no group_size={group_size}; {way_out}"
    elif group_size is not None and not 1 <= group_size <= num_microbatches:
        yield (
            "group_size",
            f"group_size={group_size} takes more micro-batches at once than num_microbatches={num_microbatches}; "
            f"nearest legal: group_size={num_microbatches}",
        )
    if isinstance(schedule, Schedule) and schedule.num_microbatches != num_microbatches:
        yield (
            "schedule",
            f"schedule {name} is one of {schedule.num_microbatches} micro-batches, but num_microbatches="
            f"{num_microbatches}; nearest legal: num_microbatches={schedule.num_microbatches}",
        )


def _of_ranks(schedule: str | Schedule, num_ranks: int, placement: Placement | None) -> Iterator[tuple[str, str]]:
    """Complaints about which rank runs what."""
    if isinstance(schedule, Schedule) and schedule.num_ranks != num_ranks:
        yield (
            "schedule",
            f"schedule {schedule.name} is one of {schedule.num_ranks} ranks, but pp={num_ranks}; "
            f"nearest legal: pp={schedule.num_ranks}",
        )
    if placement is None:
        return
    if placement.num_ranks != num_ranks:
        yield (
            "placement",
            f"placement deals stages to {placement.num_ranks} ranks (homes {list(placement.homes)}), but "
            f"pp={num_ranks}; nearest legal: pp={placement.num_ranks}",
        )
    if isinstance(schedule, Schedule) and placement.homes != schedule.homes:
        yield (
            "placement",
            f"placement has homes {list(placement.homes)}, but schedule {schedule.name} runs its stages on ranks "
            f"{list(schedule.homes)}; nearest legal: homes {list(schedule.homes)}",
        )


def _of_cuts(schedule: str | Schedule, num_ranks: int, asked: Asked) -> Iterator[tuple[str, str]]:
    """Complaints about where stages begin and end."""
    if schedule == "accumulate":
        way_out = "layered" if num_ranks == 1 else "modular"
        for option in ("placement", "stage_costs"):
            if getattr(asked, option) is not None:
                yield option, f"schedule 'accumulate' steps the model as a whole, without {option}; use {way_out!r}"
    elif asked.placement is not None:
        for option in ("num_loops", "stage_costs"):
            given = getattr(asked, option)
            if given is not None:
                text = f"placement says where stages begin and end, so {option}={given!r} cannot; leave out one"
                yield "placement", text
    elif asked.stage_costs is not None and _each_block_is_a_stage(schedule, asked):
        way_out = "leave stage_costs out, or use 'modular' with num_loops=2, '1f1b' or 'gpipe'"
        yield "stage_costs", f"schedule {schedule!r} makes each block a stage, so there is nothing to cut; {way_out}"


def _each_block_is_a_stage(schedule: str | Schedule, asked: Asked) -> bool:
    return schedule == "layered" or (schedule == "modular" and asked.num_loops is None)


def _check_idle(schedule: Schedule) -> None:
    idle = sorted(set(range(schedule.num_ranks)) - set(schedule.homes))
    if idle:
        raise ScheduleError(f"schedule {schedule.name} gives ranks {idle} no stage; leave these ranks out")


def _order(
    schedule: str | Schedule, homes: Sequence[int], num_microbatches: int, *, group_size: int | None
) -> Schedule:
    if isinstance(schedule, Schedule):
        return schedule.only(*_COMPUTED)
    if group_size is None:
        return _ORDERS[schedule](homes, num_microbatches)
    if schedule == "interleaved":
        return one_forward_one_backward(homes, num_microbatches, group=group_size)
    return hybrid(homes, num_microbatches, group=group_size)


def _placement(schedule: str | Schedule, num_blocks: int, num_ranks: int, asked: Asked) -> Placement:
    if asked.placement is not None:
        return _fitting(asked.placement, num_blocks)
    if isinstance(schedule, Schedule):
        return _under(schedule, num_blocks, _numbers(asked, num_blocks))
    if schedule in ON_ONE_RANK:
        return modular(num_blocks, 1)
    if schedule == "modular" and asked.num_loops is None:
        return modular(num_blocks, num_ranks)
    costs = _numbers(asked, num_blocks)
    if schedule in _LOOPED:
        return looped(num_blocks, num_ranks, num_loops=asked.num_loops or 2, costs=costs)
    return (v_shaped if schedule == "zbv" else contiguous)(num_blocks, num_ranks, costs=costs)


def _fitting(placement: Placement, num_blocks: int) -> Placement:
    if placement.num_blocks != num_blocks:
        cuts, most = placement.cuts, len(placement.homes)
        nearest = f"cuts {[*cuts[:-1], num_blocks]}" if cuts[-2] < num_blocks else f"{min(most, num_blocks)} stages"
        raise ScheduleError(
            f"placement has {placement.num_blocks} blocks (cuts {list(cuts)}), but the model has {num_blocks}; "
            f"nearest legal: {nearest}"
        )
    return placement


def _under(schedule: Schedule, num_blocks: int, costs: Sequence[float] | None) -> Placement:
    """Blocks cut into the stages of a schedule that was given."""
    if schedule.num_stages > num_blocks:
        raise ScheduleError(
            f"schedule {schedule.name} has {schedule.num_stages} stages, but the model has {num_blocks} blocks; "
            f"nearest legal: a schedule of {num_blocks} stages"
        )
    return Placement(looped(num_blocks, 1, num_loops=schedule.num_stages, costs=costs).cuts, schedule.homes)


def _numbers(asked: Asked, num_blocks: int) -> Sequence[float] | None:
    costs = asked.stage_costs
    assert not isinstance(costs, str), f"stage_costs={costs!r} are counted before"
    if costs is not None and len(costs) != num_blocks:
        raise ScheduleError(
            f"stage_costs has {len(costs)} numbers, but the model has {num_blocks} blocks; give one for each, in order"
        )
    return costs
