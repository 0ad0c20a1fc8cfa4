"""A step as it was: the moments that ranks noted beside their schedule, put together as a timeline.

What a rank does between its actions is neither work nor waiting; it is idle time, as on paper. A receive is waiting
from the moment its value was sent, and idle time before; the end of a step is waiting from the moment the last rank has
done its last action.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isnan

from meshwright.parallel.pipeline.actions import COMPUTE, Action, Kind, Schedule
from meshwright.parallel.pipeline.check import SENDS, other_end
from meshwright.parallel.pipeline.timeline import Cause, Costs, Span, Timeline, Wait

__all__ = ["Moments", "RankMoments", "costs_of", "measured"]


@dataclass(frozen=True)
class Moments:
    """When one action was what (seconds); NaN for what did not happen.

    Args:
        waits: it begins, and may have to wait.
        runs: it has what it needs.
        done: the rank goes on.
        arrived: the collective that it started is over; NaN where it started none.
    """

    waits: float
    runs: float
    done: float
    arrived: float

    @property
    def begun(self) -> float:
        """The first moment of an action."""
        return self.runs if isnan(self.waits) else self.waits


@dataclass(frozen=True)
class RankMoments:
    """The step of one rank.

    Args:
        start: of the step.
        actions: moments of the actions in the order of the schedule.
        end: of the step, gradients are there.
    """

    start: float
    actions: tuple[Moments, ...]
    end: float


def measured(schedule: Schedule, ranks: Sequence[RankMoments]) -> Timeline:
    """The timeline of a step, in seconds from the start of its first rank.

    >>> step = [RankMoments(5.0, (Moments(5, 6, 8, float("nan")), Moments(8, 8, 12, float("nan"))), 13.0)]
    >>> found = measured(Schedule.read("0F0,0B0"), step)
    >>> found.makespan, found.busy, found.exposed
    (8.0, (6.0,), (2.0,))
    """
    sent = {
        action: each.begun
        for row, rank in zip(schedule.ranks, ranks, strict=True)
        for action, each in zip(row, rank.actions, strict=True)
        if action.kind in SENDS
    }
    step = _Step(min(rank.start for rank in ranks), sent)
    last = max(rank.actions[-1].done for rank in ranks)
    for number, (row, rank) in enumerate(zip(schedule.ranks, ranks, strict=True)):
        for action, each in zip(row, rank.actions, strict=True):
            step.add(number, action, each)
        step.wait(Wait(number, Cause.END, last, rank.end))
    makespan = max(rank.end for rank in ranks) - step.origin
    busy = [0.0] * len(ranks)
    for span in step.spans:
        busy[span.rank] += span.end - span.start
    return Timeline(tuple(step.spans), makespan, tuple(busy), tuple(step.communication), tuple(step.waits), 1.0)


def costs_of(found: Timeline) -> Costs:
    """What forwards and backwards of each stage took on average: a plan with these costs is as long as it could be.

    >>> step = Timeline((Span(0, Action.parse("0F0"), 0.0, 2.0), Span(0, Action.parse("0B0"), 2.0, 8.0)), 8.0, (8.0,))
    >>> costs_of(step).forward, costs_of(step).backward
    (2.0, 6.0)
    """
    of_kind: dict[Kind, list[float]] = defaultdict(list)
    of_stage: dict[int, float] = defaultdict(float)
    for span in found.spans:
        of_kind[span.action.kind].append(span.end - span.start)
        of_stage[span.action.stage] += span.end - span.start
    mean = {kind: sum(times) / len(times) for kind, times in of_kind.items()}
    halves = mean.get(Kind.INPUT_GRADIENT, 0.0) + mean.get(Kind.WEIGHT_GRADIENT, 0.0)
    average = sum(of_stage.values()) / len(of_stage)
    return Costs(
        forward=mean[Kind.FORWARD],
        backward=mean.get(Kind.BACKWARD, halves),
        recompute=mean.get(Kind.RECOMPUTE, 0.0),
        stages={stage: time / average for stage, time in of_stage.items()},
        unit_s=found.unit_s,
    )


class _Step:
    """What is collected of a step."""

    def __init__(self, origin: float, sent: dict[Action, float]) -> None:
        self.origin = origin
        self.spans: list[Span] = []
        self.communication: list[Span] = []
        self.waits: list[Wait] = []
        self._sent = sent

    def add(self, rank: int, action: Action, each: Moments) -> None:
        """Takes one action."""
        if action.kind in COMPUTE:
            self.spans.append(self._span(rank, action, (each.runs, each.done)))
            self.wait(Wait(rank, Cause.PARAMETERS, each.begun, each.runs))
        elif action.microbatch is None:
            if not isnan(each.arrived):
                self.communication.append(self._span(rank, action, (each.runs, each.arrived)))
        else:
            self.communication.append(self._span(rank, action, (each.begun, each.done)))
            if action.kind not in SENDS:
                sent = self._sent.get(other_end(action), each.begun)
                self.wait(Wait(rank, Cause.TRANSFER, max(each.begun, sent), each.done))

    def wait(self, each: Wait) -> None:
        """Takes a wait, if it is one."""
        if each.end > each.start:
            self.waits.append(replace(each, start=each.start - self.origin, end=each.end - self.origin))

    def _span(self, rank: int, action: Action, times: tuple[float, float]) -> Span:
        start, end = times
        return Span(rank, action, start - self.origin, end - self.origin)
