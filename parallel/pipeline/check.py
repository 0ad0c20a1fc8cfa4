"""Whether a schedule can be run, found by walking it; a bad one is reported with the action each rank is stuck at."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from meshwright.parallel.errors import ScheduleError
from meshwright.parallel.pipeline.actions import Action, Kind, Schedule

__all__ = [
    "RECEIVES",
    "SENDS",
    "Facts",
    "Transport",
    "check",
    "halves_of",
    "needs_in",
    "needs_of",
    "other_end",
    "stuck_at",
    "walk",
]

Transport = Literal["posted", "blocking"]
"""How a send ends: "posted" at once (the receiver finds it by its name), "blocking" when the receiver takes it."""

SENDS = (Kind.SEND_ACTIVATION, Kind.SEND_GRADIENT)
RECEIVES = (Kind.RECEIVE_ACTIVATION, Kind.RECEIVE_GRADIENT)
_OTHER_ENDS = {
    Kind.SEND_ACTIVATION: (1, Kind.RECEIVE_ACTIVATION),
    Kind.RECEIVE_ACTIVATION: (-1, Kind.SEND_ACTIVATION),
    Kind.SEND_GRADIENT: (-1, Kind.RECEIVE_GRADIENT),
    Kind.RECEIVE_GRADIENT: (1, Kind.SEND_GRADIENT),
}


_WITH_PARAMETERS = (Kind.FORWARD, Kind.RECOMPUTE, Kind.BACKWARD, Kind.INPUT_GRADIENT)
_MADE_BY = {
    Kind.SEND_ACTIVATION: Kind.FORWARD,
    Kind.SEND_GRADIENT: Kind.INPUT_GRADIENT,
    Kind.WEIGHT_GRADIENT: Kind.INPUT_GRADIENT,
    Kind.RECOMPUTE: Kind.FORWARD,
}


@dataclass(frozen=True)
class Facts:
    """What a schedule needs, by rank.

    Attributes:
        peak_activations: most (stage, micro-batch) pairs whose forward is kept for a backward to come.
        peak_gathered: most stages whose parameters are whole at once; 0 where nothing is gathered.
        gathers: of parameters.
        reductions: of gradients.
        sends: of activations and gradients.
    """

    peak_activations: tuple[int, ...]
    peak_gathered: tuple[int, ...]
    gathers: tuple[int, ...]
    reductions: tuple[int, ...]
    sends: tuple[int, ...]


def check(schedule: Schedule, transport: Transport = "posted") -> Facts:
    """Proves that a schedule runs to its end and computes every gradient once.

    Raises:
        ScheduleError: naming what is missing, done twice or out of order; or the action each rank is stuck at.
    """
    _check_complete(schedule)
    for actions in schedule.ranks:
        _check_gathered(actions)
        _check_reduced(actions)
    stuck = stuck_at(schedule, transport)
    if stuck:
        shown = "; ".join(f"rank {rank} at {action}" for rank, action in stuck.items())
        raise ScheduleError(f"schedule {schedule.name} is stuck with {transport} sends: {shown}")
    rows = schedule.ranks
    return Facts(
        peak_activations=tuple(_peak(row, _keeps) for row in rows),
        peak_gathered=tuple(_peak(row, _gathers) for row in rows),
        gathers=tuple(schedule.count(Kind.GATHER, rank) for rank in range(len(rows))),
        reductions=tuple(schedule.count(Kind.REDUCE, rank) for rank in range(len(rows))),
        sends=tuple(sum(each.kind in SENDS for each in row) for row in rows),
    )


def stuck_at(schedule: Schedule, transport: Transport = "posted") -> dict[int, Action]:
    """The action that each rank that does not come to its end waits at."""
    return walk(schedule, lambda rank, action: None, transport)


def walk(
    schedule: Schedule, visit: Callable[[int, Action], None], transport: Transport = "posted"
) -> dict[int, Action]:
    """Visits (rank, action) in an order in which they can run, as far as that goes; returns where ranks are stuck."""
    done: set[Action] = set()
    rows = [iter(row) for row in schedule.ranks]
    current = [next(row, None) for row in rows]

    def run(rank: int, action: Action) -> None:
        visit(rank, action)
        done.update((action, *halves_of(action)))
        current[rank] = next(rows[rank], None)

    moved = True
    while moved:
        moved = False
        for rank in range(schedule.num_ranks):
            while (action := current[rank]) is not None and done.issuperset(needs_in(schedule, action)):
                taker = _taker(action) if transport == "blocking" else None
                if taker is not None and current[schedule.homes[taker.stage]] != taker:
                    break
                run(rank, action)
                if taker is not None:
                    run(schedule.homes[taker.stage], taker)
                moved = True
    return {rank: action for rank, action in enumerate(current) if action is not None}


def needs_of(homes: Sequence[int], action: Action, *, travels: bool = False) -> Iterable[Action]:
    """What must have been done before an action, on whatever rank; the order of its own rank comes besides.

    Args:
        homes: stage -> rank.
        action: of any kind.
        travels: whether values reach another rank by sends and receives of the schedule, or at once.
    """

    def arrived(made: Action, received: Kind) -> Action:
        if travels and homes[made.stage] != homes[action.stage]:
            return Action(action.stage, received, action.microbatch)
        return made

    if action.kind in RECEIVES:
        yield other_end(action)
    if action.kind in _MADE_BY:
        yield Action(action.stage, _MADE_BY[action.kind], action.microbatch)
    if action.kind is Kind.FORWARD and action.stage > 0:
        yield arrived(Action(action.stage - 1, Kind.FORWARD, action.microbatch), Kind.RECEIVE_ACTIVATION)
    if action.kind in (Kind.BACKWARD, Kind.INPUT_GRADIENT):
        yield Action(action.stage, Kind.FORWARD, action.microbatch)
        if action.stage < len(homes) - 1:
            yield arrived(Action(action.stage + 1, Kind.INPUT_GRADIENT, action.microbatch), Kind.RECEIVE_GRADIENT)


def other_end(action: Action) -> Action:
    """The receive of a send, the send of a receive."""
    distance, kind = _OTHER_ENDS[action.kind]
    return Action(action.stage + distance, kind, action.microbatch)


def halves_of(action: Action) -> tuple[Action, ...]:
    """What a whole backward consists of; nothing for any other action."""
    if action.kind is not Kind.BACKWARD:
        return ()
    halves = (Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT)
    return tuple(Action(action.stage, kind, action.microbatch) for kind in halves)


def needs_in(schedule: Schedule, action: Action) -> Iterable[Action]:
    """What must have been done before an action of a schedule."""
    return needs_of(schedule.homes, action, travels=_is_lowered(schedule))


def _is_lowered(schedule: Schedule) -> bool:
    return schedule.has(Kind.SEND_ACTIVATION) or schedule.has(Kind.RECEIVE_ACTIVATION)


def _taker(action: Action) -> Action | None:
    """The receive that a send waits for."""
    return other_end(action) if action.kind in SENDS else None


def _check_complete(schedule: Schedule) -> None:
    counted = _counted(schedule)
    for stage, microbatch in product(range(schedule.num_stages), range(schedule.num_microbatches)):
        missing = [str(each) for each in _wanted(schedule, stage, microbatch) if each not in counted]
        if missing:
            raise ScheduleError(f"schedule {schedule.name} lacks {', '.join(missing)}")
    for action in counted:
        other = other_end(action) if action.kind in _OTHER_ENDS else action
        if other not in counted:
            raise ScheduleError(f"schedule {schedule.name}: {action} has no {other}")


def _counted(schedule: Schedule) -> Counter[Action]:
    """How often everything is done that is done for a micro-batch; nothing but recomputing may be done twice."""
    given = [action for row in schedule.ranks for action in row if action.microbatch is not None]
    counted = Counter(each for action in given for each in (halves_of(action) or (action,)))
    twice = [str(action) for action, number in counted.items() if number > 1 and action.kind is not Kind.RECOMPUTE]
    if twice:
        raise ScheduleError(f"schedule {schedule.name} does {', '.join(twice[:4])} more than once")
    return counted


def _wanted(schedule: Schedule, stage: int, microbatch: int) -> Iterable[Action]:
    for kind in (Kind.FORWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT):
        yield Action(stage, kind, microbatch)
    if not _is_lowered(schedule):
        return
    if stage > 0 and schedule.homes[stage - 1] != schedule.homes[stage]:
        yield Action(stage, Kind.RECEIVE_ACTIVATION, microbatch)
        yield Action(stage - 1, Kind.RECEIVE_GRADIENT, microbatch)


def _check_gathered(actions: tuple[Action, ...]) -> None:
    """Where a rank gathers at all, every stage must be whole when it computes."""
    if not any(action.kind is Kind.GATHER for action in actions):
        return
    whole: set[int] = set()
    for action in actions:
        if action.kind is Kind.GATHER:
            whole.add(action.stage)
        elif action.kind is Kind.FREE:
            whole.discard(action.stage)
        elif action.kind in _WITH_PARAMETERS and action.stage not in whole:
            raise ScheduleError(f"{action} finds the parameters of stage {action.stage} not gathered")


def _check_reduced(actions: tuple[Action, ...]) -> None:
    """Where a rank reduces at all, nothing may be added to gradients after their last reduction."""
    if not any(action.kind is Kind.REDUCE for action in actions):
        return
    added: set[int] = set()
    for action in actions:
        if action.kind in (Kind.BACKWARD, Kind.WEIGHT_GRADIENT):
            added.add(action.stage)
        elif action.kind is Kind.REDUCE:
            added.discard(action.stage)
    if added:
        raise ScheduleError(f"gradients of stages {sorted(added)} are not reduced after the last backward")


def _keeps(action: Action) -> int:
    if action.kind is Kind.FORWARD:
        return 1
    return -1 if action.kind in (Kind.BACKWARD, Kind.WEIGHT_GRADIENT) else 0


def _gathers(action: Action) -> int:
    return {Kind.GATHER: 1, Kind.FREE: -1}.get(action.kind, 0)


def _peak(actions: tuple[Action, ...], change: Callable[[Action], int]) -> int:
    now = peak = 0
    for action in actions:
        now += change(action)
        peak = max(peak, now)
    return peak
