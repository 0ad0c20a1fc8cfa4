"""From an order of computing to everything a rank does: sends and receives, gathers, reductions, recomputing.

Each pass takes a schedule and gives one; `lowered` applies them in order.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from meshwright.parallel.errors import ScheduleError
from meshwright.parallel.pipeline.actions import COMPUTE, Action, Kind, Schedule
from meshwright.parallel.pipeline.check import Transport, other_end, walk

__all__ = [
    "lowered",
    "only_forward",
    "with_gathers",
    "with_offload",
    "with_recompute",
    "with_reductions",
    "with_transfers",
]

_BACKWARDS = (Kind.BACKWARD, Kind.INPUT_GRADIENT)
_AGAIN = (*_BACKWARDS, Kind.RECOMPUTE)
_LAST = (Kind.BACKWARD, Kind.WEIGHT_GRADIENT)


def lowered(
    schedule: Schedule,
    *,
    zero_stage: int = 0,
    num_buffers: int = 2,
    recompute: bool = False,
    offload: bool = False,
    transport: Transport = "posted",
) -> Schedule:
    """All that ranks do, from the order in which they compute.

    Args:
        schedule: of computing actions only.
        zero_stage: what data-parallel ranks share: 0 or 1 no parameters and no gradients, 2 gradients, 3 both.
        num_buffers: stages whose parameters a rank holds whole, where they are shared.
        recompute: run forward again before backward, from the kept input.
        offload: keep that input in host memory meanwhile.
        transport: how sends end (see `check`).
    """
    with_all = with_reductions(schedule, sharded=zero_stage >= 2)
    if zero_stage == 3:
        with_all = with_gathers(with_all, num_buffers=num_buffers)
    if recompute:
        with_all = with_recompute(with_all)
    if offload:
        with_all = with_offload(with_all)
    return with_transfers(with_all, transport)


def only_forward(schedule: Schedule) -> Schedule:
    """The order in which one micro-batch goes forward, as evaluation does it.

    >>> print(only_forward(Schedule.read("0F0,0F1,0B0,0B1")).write(), end="")
    0F0
    """
    first = schedule.only(Kind.FORWARD)
    rows = tuple(tuple(action for action in row if action.microbatch == 0) for row in first.ranks)
    return replace(first, num_microbatches=1, ranks=rows)


def with_recompute(schedule: Schedule) -> Schedule:
    """Adds a forward from the kept input before each backward."""

    def expanded(action: Action) -> tuple[Action, ...]:
        return (replace(action, kind=Kind.RECOMPUTE), action) if action.kind in _BACKWARDS else (action,)

    return _mapped(schedule, expanded)


def with_offload(schedule: Schedule) -> Schedule:
    """Adds moves of kept inputs to host memory and back, one computing action before they are needed.

    What is needed again within two computing actions stays.
    """
    return replace(schedule, ranks=tuple(tuple(_offloaded(actions)) for actions in schedule.ranks))


def with_reductions(schedule: Schedule, *, sharded: bool) -> Schedule:
    """Adds the reduction of each stage's gradients right after the last backward that adds to them.

    Args:
        schedule: without reductions.
        sharded: a rank keeps whole gradients of one stage only, so it reduces when it leaves a stage; if not, once.
    """
    rows = []
    for actions in schedule.ranks:
        row: list[Action] = []
        last = {action.stage: place for place, action in enumerate(actions) if action.kind in _LAST}
        adding = [place for place, action in enumerate(actions) if action.kind in _LAST]
        leaving = {
            place
            for place, after in zip(adding, [*adding[1:], None][: len(adding)], strict=True)
            if after is None or actions[after].stage != actions[place].stage
        }
        ends = leaving if sharded else set(last.values())
        for place, action in enumerate(actions):
            row.append(action)
            if place in ends:
                row.append(Action(action.stage, Kind.REDUCE))
        rows.append(tuple(row))
    return replace(schedule, ranks=tuple(rows))


def with_gathers(schedule: Schedule, *, num_buffers: int) -> Schedule:
    """Adds gathers of parameters and their frees, so that at most `num_buffers` stages of a rank are whole at once.

    The next stage is gathered before the present one computes, if there are two buffers or more; what is needed again
    last is freed first, so stages that are whole where forward turns into backward are not gathered again: 2 V - B
    gathers in a layered step of V stages with B buffers.

    Raises:
        ScheduleError: for no buffer.
    """
    if num_buffers < 1:
        raise ScheduleError(f"num_buffers={num_buffers}: a stage computes with whole parameters; use at least 1")
    return replace(schedule, ranks=tuple(tuple(_gathered(actions, num_buffers)) for actions in schedule.ranks))


def with_transfers(schedule: Schedule, transport: Transport = "posted") -> Schedule:
    """Adds sends and receives where neighbouring stages lie on different ranks.

    With posted sends a value is received right before it is used, so that nobody waits for what is not needed yet. With
    blocking ones it is received when its sender is that far, in the order of one run on paper, so that none is stuck.
    """
    if transport == "posted":
        return _mapped(schedule, lambda action: (*_received(schedule, action), action, *_sent(schedule, action)))
    rows: list[list[Action]] = [[] for _ in schedule.ranks]

    def visit(rank: int, action: Action) -> None:
        rows[rank].append(action)
        for sent in _sent(schedule, action):
            taker = other_end(sent)
            rows[rank].append(sent)
            rows[schedule.homes[taker.stage]].append(taker)

    walk(schedule, visit)
    return replace(schedule, ranks=tuple(map(tuple, rows)))


def _received(schedule: Schedule, action: Action) -> Iterator[Action]:
    homes, stage = schedule.homes, action.stage
    if action.kind is Kind.FORWARD and stage > 0 and homes[stage - 1] != homes[stage]:
        yield replace(action, kind=Kind.RECEIVE_ACTIVATION)
    if action.kind in _BACKWARDS and stage < len(homes) - 1 and homes[stage + 1] != homes[stage]:
        yield replace(action, kind=Kind.RECEIVE_GRADIENT)


def _sent(schedule: Schedule, action: Action) -> Iterator[Action]:
    homes, stage = schedule.homes, action.stage
    if action.kind is Kind.FORWARD and stage < len(homes) - 1 and homes[stage + 1] != homes[stage]:
        yield replace(action, kind=Kind.SEND_ACTIVATION)
    if action.kind in _BACKWARDS and stage > 0 and homes[stage - 1] != homes[stage]:
        yield replace(action, kind=Kind.SEND_GRADIENT)


def _gathered(actions: Sequence[Action], num_buffers: int) -> Iterator[Action]:
    runs = [(stage, list(run)) for stage, run in groupby(actions, key=lambda action: action.stage)]
    used = [stage for stage, _ in runs]
    whole: list[int] = []
    for place, (_, run) in enumerate(runs):
        ahead = used[place : place + min(2, num_buffers)]  # this stage, and the next one beside it
        for wanted in ahead:
            if wanted in whole:
                continue
            if len(whole) == num_buffers:
                unused = [each for each in whole if each not in ahead]
                freed = max(unused, key=lambda each: _next_use(used, place, each))
                whole.remove(freed)
                yield Action(freed, Kind.FREE)
            whole.append(wanted)
            yield Action(wanted, Kind.GATHER)
        yield from run
    yield from (Action(stage, Kind.FREE) for stage in whole)


def _offloaded(actions: Sequence[Action]) -> Iterator[Action]:
    computing = [action for action in actions if action.kind in COMPUTE]
    places = {action: place for place, action in enumerate(computing)}
    back = {(each.stage, each.microbatch): places[each] for each in reversed(computing) if each.kind in _AGAIN}
    moved = {
        (each.stage, each.microbatch)
        for each, place in places.items()
        if each.kind is Kind.FORWARD and back[each.stage, each.microbatch] - place > 2
    }
    fetches = {computing[back[key] - 1]: key for key in moved}
    for action in actions:
        if action in fetches:
            yield Action(fetches[action][0], Kind.FETCH, fetches[action][1])
        yield action
        if action.kind is Kind.FORWARD and (action.stage, action.microbatch) in moved:
            yield replace(action, kind=Kind.OFFLOAD)


def _next_use(used: Sequence[int], place: int, stage: int) -> int:
    return next((later for later in range(place, len(used)) if used[later] == stage), len(used))


def _mapped(schedule: Schedule, expanded: Callable[[Action], Iterable[Action]]) -> Schedule:
    rows = (tuple(each for action in row for each in expanded(action)) for row in schedule.ranks)
    return replace(schedule, ranks=tuple(rows))
