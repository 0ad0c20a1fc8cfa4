"""A schedule on paper: when each action begins and ends, if computing and sending take given times.

Costs are in any one unit; the closed forms of the literature are exact here (see the tests).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from meshwright.parallel.pipeline.actions import COMPUTE, Action, Kind, Schedule
from meshwright.parallel.pipeline.check import check, halves_of, needs_in, walk

__all__ = ["Costs", "Span", "Timeline", "timeline"]


@dataclass(frozen=True)
class Costs:
    """What actions cost, for a stage of size 1.

    Args:
        forward: of one micro-batch.
        backward: whole; its halves take half of it each.
        recompute: of one forward, where the schedule says so.
        latency: from the end of the making action to the other rank, hidden where the receiver has other work.
        stages: how much larger a stage is than 1; 1 where it is not named.
    """

    forward: float = 1.0
    backward: float = 2.0
    recompute: float = 1.0
    latency: float = 0.0
    stages: Mapping[int, float] = field(default_factory=dict)

    def of(self, action: Action) -> float:
        """Time that an action occupies its rank."""
        of_kind = {
            Kind.FORWARD: self.forward,
            Kind.BACKWARD: self.backward,
            Kind.INPUT_GRADIENT: self.backward / 2,
            Kind.WEIGHT_GRADIENT: self.backward / 2,
            Kind.RECOMPUTE: self.recompute,
        }
        return of_kind.get(action.kind, 0.0) * self.stages.get(action.stage, 1.0)


@dataclass(frozen=True)
class Span:
    """One action of one rank and when it runs."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """When a schedule's actions run.

    Attributes:
        spans: those of computing actions.
        makespan: when the last one ends.
        busy: time each rank computes.
    """

    spans: tuple[Span, ...]
    makespan: float
    busy: tuple[float, ...]

    @property
    def bubble(self) -> float:
        """Idle time of the busiest rank over its computing time."""
        return self.makespan / max(self.busy) - 1


def timeline(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """Times a schedule, each rank in its own order, each action as soon as its inputs are there.

    Raises:
        ScheduleError: when the schedule cannot be run (see `check`).

    >>> from meshwright.parallel.pipeline.orders import breadth_first
    >>> timeline(breadth_first([0, 1, 0, 1], 4)).bubble  # (P - 1) / (M V)
    0.125
    """
    check(schedule)
    found = costs or Costs()
    ends: dict[Action, tuple[float, int]] = {}
    clocks = [0.0] * schedule.num_ranks
    spans: list[Span] = []

    def visit(rank: int, action: Action) -> None:
        makers = [ends[need] for need in needs_in(schedule, action)]
        arrivals = [end if maker == rank else end + found.latency for end, maker in makers]
        start = max([clocks[rank], *arrivals])
        clocks[rank] = start + found.of(action)
        for made in (action, *halves_of(action)):
            ends[made] = (clocks[rank], rank)
        if action.kind in COMPUTE:
            spans.append(Span(rank, action, start, clocks[rank]))

    walk(schedule, visit)
    busy = [sum(each.end - each.start for each in spans if each.rank == rank) for rank in range(schedule.num_ranks)]
    return Timeline(tuple(spans), max(clocks), tuple(busy))
