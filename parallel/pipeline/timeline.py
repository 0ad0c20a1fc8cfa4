"""When each action of a schedule begins and ends: on paper, if actions take given times, or as a step was measured.

Costs are in any one unit; the closed forms of the literature are exact here (see the tests).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from meshwright.parallel.pipeline.actions import COMPUTE, Action, Kind, Schedule
from meshwright.parallel.pipeline.check import SENDS, check, halves_of, needs_in, other_end, walk

__all__ = ["Cause", "Costs", "Span", "Timeline", "Wait", "in_order", "timeline"]


@dataclass(frozen=True)
class Costs:
    """What actions cost, for a stage of size 1.

    Args:
        forward: of one micro-batch.
        backward: whole; its halves take half of it each.
        recompute: of one forward, where the schedule says so.
        latency: from the end of the making action to the other rank, hidden where the receiver has other work.
        gather: of parameters; a rank's gathers and reductions go one after the other, beside its computing.
        reduce: of gradients.
        stages: how much larger a stage is than 1; 1 where it is not named.
        unit_s: seconds of a unit, where it is known.
        exact: (stage, kind) -> cost, before all of the above.
        hops: (rank, rank) -> latency, before `latency`.
    """

    forward: float = 1.0
    backward: float = 2.0
    recompute: float = 1.0
    latency: float = 0.0
    gather: float = 0.0
    reduce: float = 0.0
    stages: Mapping[int, float] = field(default_factory=dict)
    unit_s: float | None = None
    exact: Mapping[tuple[int, Kind], float] = field(default_factory=dict)
    hops: Mapping[tuple[int, int], float] = field(default_factory=dict)

    def of(self, action: Action) -> float:
        """Time that an action occupies the processor of its rank, or its link."""
        known = self.exact.get((action.stage, action.kind))
        if known is not None:
            return known
        of_kind = {
            Kind.FORWARD: self.forward,
            Kind.BACKWARD: self.backward,
            Kind.INPUT_GRADIENT: self.backward / 2,
            Kind.WEIGHT_GRADIENT: self.backward / 2,
            Kind.RECOMPUTE: self.recompute,
            Kind.GATHER: self.gather,
            Kind.REDUCE: self.reduce,
        }
        return of_kind.get(action.kind, 0.0) * self.stages.get(action.stage, 1.0)

    def hop(self, sender: int, receiver: int) -> float:
        """Latency between two ranks of the pipeline; none within one."""
        return 0.0 if sender == receiver else self.hops.get((sender, receiver), self.latency)


@dataclass(frozen=True)
class Span:
    """One action of one rank and when it runs."""

    rank: int
    action: Action
    start: float
    end: float


class Cause(StrEnum):
    """What a rank waits for while it could compute."""

    PARAMETERS = "parameters"
    TRANSFER = "transfer"
    END = "end of step"


@dataclass(frozen=True)
class Wait:
    """Time a rank waits for communication that is under way: what of it is not hidden behind computing."""

    rank: int
    cause: Cause
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """When a schedule's actions run.

    Attributes:
        spans: those of computing actions.
        makespan: when the last one ends, or the last reduction.
        busy: time each rank computes.
        communication: gathers, reductions, sends and receives, from their start to their end.
        waits: for communication under way. What a rank neither computes nor waits it is idle, as the schedule has it.
        unit_s: seconds of a unit; None on paper.
    """

    spans: tuple[Span, ...]
    makespan: float
    busy: tuple[float, ...]
    communication: tuple[Span, ...] = ()
    waits: tuple[Wait, ...] = ()
    unit_s: float | None = None

    @property
    def num_ranks(self) -> int:
        """Degree of the pipeline."""
        return len(self.busy)

    @property
    def bubble(self) -> float:
        """Time the busiest rank does not compute over the time it does."""
        return self.makespan / max(self.busy) - 1

    @property
    def exposed(self) -> tuple[float, ...]:
        """Time each rank waits for communication under way."""
        return tuple(sum(w.end - w.start for w in self.waits if w.rank == rank) for rank in range(self.num_ranks))

    def count(self, kind: Kind) -> int:
        """How often ranks communicate in one way.

        >>> from meshwright.parallel.pipeline.orders import breadth_first
        >>> timeline(breadth_first([0, 1], 4)).count(Kind.GATHER)
        0
        """
        return sum(span.action.kind is kind for span in self.communication)


def timeline(schedule: Schedule, costs: Costs | None = None, *, checked: bool = False) -> Timeline:
    """Times a schedule, each rank in its own order, each action as soon as its inputs are there.

    Args:
        schedule: of one step.
        costs: of its actions.
        checked: whether somebody knows already that it can be run.

    Raises:
        ScheduleError: when the schedule cannot be run (see `check`).

    >>> from meshwright.parallel.pipeline.orders import breadth_first
    >>> timeline(breadth_first([0, 1, 0, 1], 4)).bubble  # (P - 1) / (M V)
    0.125
    """
    if not checked:
        check(schedule)
    paper = _Paper(schedule, costs or Costs())
    walk(schedule, paper.visit)
    return paper.timeline()


def in_order(schedule: Schedule, costs: Costs | None = None) -> list[tuple[int, Action]]:
    """(rank, action) of all ranks in the order in which they end on paper; without gathers and reductions.

    They can also run in this order: it is that of every rank, and what an action needs stands before it.

    >>> from meshwright.parallel.pipeline.orders import breadth_first
    >>> [str(action) for _, action in in_order(breadth_first([0, 1], 1))]
    ['0F0', '1F0', '1B0', '0B0']
    """
    paper = _Paper(schedule, costs or Costs())
    walk(schedule, paper.visit)
    paper.ended.sort(key=lambda each: each[0])  # of what ends at once, what was walked first stays first
    return [(rank, action) for _, rank, action in paper.ended]


class _Paper:
    """Clocks of a schedule that is walked: one for each rank's processor, one for its link."""

    def __init__(self, schedule: Schedule, costs: Costs) -> None:
        self.costs = costs
        self.clocks = [0.0] * schedule.num_ranks
        self.links = [0.0] * schedule.num_ranks
        self.ended: list[tuple[float, int, Action]] = []
        self.spans: list[Span] = []
        self.communication: list[Span] = []
        self.waits: list[Wait] = []
        self._schedule = schedule
        self._ends: dict[Action, tuple[float, int]] = {}
        self._whole: dict[int, float] = {}

    def visit(self, rank: int, action: Action) -> None:
        """Times one action; all it needs was timed before."""
        if action.kind in (Kind.GATHER, Kind.REDUCE):
            self._collect(rank, action)
            return
        makers = [self._ends[need] for need in needs_in(self._schedule, action)]
        begun = max([self.clocks[rank], *(end for end, _ in makers)])
        start = max([begun, *(end + self.costs.hop(maker, rank) for end, maker in makers)])
        self._wait(Wait(rank, Cause.TRANSFER, begun, start))
        if action.kind in COMPUTE:
            begun, start = start, max(start, self._whole.get(action.stage, 0.0))
            self._wait(Wait(rank, Cause.PARAMETERS, begun, start))
        end = start + self.costs.of(action)
        self.ended.append((end, rank, action))
        for made in (action, *halves_of(action)):
            self._ends[made] = (end, rank)
        if action.kind in COMPUTE:
            self.spans.append(Span(rank, action, start, end))
        elif action.kind in SENDS:
            receiver = self._schedule.homes[other_end(action).stage]
            self.communication.append(Span(rank, action, start, start + self.costs.hop(rank, receiver)))
        elif action.kind is not Kind.FREE:
            self.communication.append(Span(rank, action, self.clocks[rank], end))
        self.clocks[rank] = end

    def timeline(self) -> Timeline:
        """What was timed; at the end all wait for the last reduction."""
        last, makespan = max(self.clocks), max(*self.clocks, *self.links)
        for rank in range(len(self.clocks)):
            self._wait(Wait(rank, Cause.END, last, makespan))
        busy = [0.0] * len(self.clocks)
        for span in self.spans:
            busy[span.rank] += span.end - span.start
        spans, communication, waits = tuple(self.spans), tuple(self.communication), tuple(self.waits)
        return Timeline(spans, makespan, tuple(busy), communication, waits, self.costs.unit_s)

    def _collect(self, rank: int, action: Action) -> None:
        """A gather or reduction, on the rank's link."""
        start = max(self.clocks[rank], self.links[rank])
        self.links[rank] = end = start + self.costs.of(action)
        self.communication.append(Span(rank, action, start, end))
        if action.kind is Kind.GATHER:
            self._whole[action.stage] = end

    def _wait(self, each: Wait) -> None:
        if each.end > each.start:
            self.waits.append(each)
