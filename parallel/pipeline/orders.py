"""In which order each rank computes: pure functions from homes of stages and a number of micro-batches to schedules.

What they give holds compute only; `lower.lowered` adds sends, receives, gathers and reductions. Every one takes any
number of micro-batches and any homes; stages need not be dealt evenly.
"""

from collections.abc import Sequence
from itertools import chain

from meshwright.parallel.errors import ScheduleError
from meshwright.parallel.pipeline.actions import Action, Kind, Schedule
from meshwright.parallel.pipeline.check import stuck_at

__all__ = ["accumulation", "breadth_first", "hybrid", "one_forward_one_backward"]

Homes = Sequence[int]


def breadth_first(homes: Homes, num_microbatches: int) -> Schedule:
    """All micro-batches through a stage before the next stage, forward and backward, ascending.

    With one rank this is layered gradient accumulation; with one stage for each rank GPipe (arXiv 1811.06965); with
    stages dealt in turn the modular pipeline (arXiv 2106.02679), also named breadth-first (arXiv 2211.05953).

    >>> print(breadth_first([0, 0], 2).write(), end="")
    0F0,0F1,1F0,1F1,1B0,1B1,0B0,0B1
    """
    return hybrid(homes, num_microbatches, group=num_microbatches)


def accumulation(homes: Homes, num_microbatches: int) -> Schedule:
    """One micro-batch after the other through the whole model: plain gradient accumulation.

    >>> print(accumulation([0, 0], 2).write(), end="")
    0F0,1F0,1B0,0B0,0F1,1F1,1B1,0B1
    """
    return hybrid(homes, num_microbatches, group=1)


def hybrid(homes: Homes, num_microbatches: int, *, group: int) -> Schedule:
    """Groups of micro-batches one after the other (depth), each breadth-first.

    A group of all is `breadth_first`, groups of one are `accumulation`; between them activations of `group`
    micro-batches are held, and states are gathered once for each group.
    """
    _check(homes, num_microbatches, group)
    ranks = []
    for rank in range(max(homes) + 1):
        mine = _stages(homes, rank)
        row: list[Action] = []
        for microbatches in _groups(num_microbatches, group):
            row += [Action(stage, Kind.FORWARD, each) for stage in mine for each in microbatches]
            row += [Action(stage, Kind.BACKWARD, each) for stage in reversed(mine) for each in microbatches]
        ranks.append(tuple(row))
    names = {1: "accumulation", num_microbatches: "breadth-first"}
    return Schedule(names.get(group, f"hybrid of {group}"), tuple(homes), num_microbatches, tuple(ranks))


def one_forward_one_backward(homes: Homes, num_microbatches: int, *, group: int | None = None) -> Schedule:
    """1F1B (arXiv 2006.09503), and interleaved 1F1B where ranks have several stages (arXiv 2104.04473).

    After as many forwards as it takes to fill the pipeline behind it, a rank alternates. Where that order is stuck,
    because stages are dealt unevenly or the last group is small, ranks that wait do forwards first.

    Args:
        homes: stage -> rank.
        num_microbatches: of one step.
        group: micro-batches that go through a stage before the rank's next stage; the number of ranks by default.
    """
    num_ranks = max(homes, default=0) + 1
    size = num_ranks if group is None else group
    _check(homes, num_microbatches, size)
    groups = _groups(num_microbatches, size)
    if len(groups) > 1 and len(groups[-1]) < size:  # a small group would leave the pipeline half empty
        groups[-2:] = [range(groups[-2].start, num_microbatches)]
    forwards, backwards, warmups = [], [], []
    for rank in range(num_ranks):
        mine = _stages(homes, rank)
        forwards.append([Action(stage, Kind.FORWARD, each) for group in groups for stage in mine for each in group])
        backwards.append(
            [Action(stage, Kind.BACKWARD, each) for group in groups for stage in mine[::-1] for each in group]
        )
        behind = num_ranks - rank - 1
        warmups.append(behind if len(mine) == 1 else 2 * behind + (len(mine) - 1) * size)
    while True:
        rows = tuple(_alternated(*each) for each in zip(forwards, backwards, warmups, strict=True))
        schedule = Schedule("1F1B", tuple(homes), num_microbatches, rows)
        waiting = [rank for rank, each in stuck_at(schedule).items() if each.kind is Kind.BACKWARD]
        if not waiting:
            return schedule
        for rank in waiting:
            warmups[rank] += 1


def _groups(num_microbatches: int, size: int) -> list[range]:
    return [range(start, min(start + size, num_microbatches)) for start in range(0, num_microbatches, size)]


def _alternated(forwards: Sequence[Action], backwards: Sequence[Action], warmup: int) -> tuple[Action, ...]:
    first = min(warmup, len(forwards))
    pairs = zip(forwards[first:], backwards, strict=False)
    return (*forwards[:first], *chain.from_iterable(pairs), *backwards[len(forwards) - first :])


def _stages(homes: Homes, rank: int) -> list[int]:
    return [stage for stage, home in enumerate(homes) if home == rank]


def _check(homes: Homes, num_microbatches: int, group: int) -> None:
    idle = sorted(set(range(max(homes, default=-1) + 1)) - set(homes))
    if not homes or idle:
        raise ScheduleError(f"ranks {idle} have no stage (homes {list(homes)})")
    if num_microbatches < 1 or group < 1:
        raise ScheduleError(f"{num_microbatches} micro-batches in groups of {group}: both must be at least 1")
