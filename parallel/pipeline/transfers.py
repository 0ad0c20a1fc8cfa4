"""Sends and receives of one step, in the order of a schedule."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from meshwright.parallel.pipeline.actions import Action, Kind, Schedule
from meshwright.parallel.pipeline.check import RECEIVES, SENDS, other_end
from meshwright.parallel.pipeline.passes import Pass
from meshwright.parallel.pipeline.posting import Posting, receives_due
from meshwright.parallel.pipeline.route import Route, Shape
from meshwright.parallel.pipeline.wire import Tag, Wire

__all__ = ["Timetable", "Transfers"]

_FORWARD = (Kind.SEND_ACTIVATION, Kind.RECEIVE_ACTIVATION)


@dataclass(frozen=True, eq=False, slots=True)
class _Message:
    """What an action sends or receives.

    Attributes:
        peer: rank at the other end.
        border: the stage behind the border that the value, or its gradient, crosses.
        sends: whether this rank is the one that sends.
        tag: of it.
        value_tag: of the value that crossed there before; of a gradient.
    """

    action: Action
    peer: int
    border: int
    microbatch: int
    forward: bool
    sends: bool
    tag: Tag
    value_tag: Tag


class Timetable:
    """The messages of one rank, as they are in every step, and when each is received.

    Args:
        schedule: of all ranks.
        rank: this one.

    Attributes:
        messages: in the order of its actions.
        due: see `receives_due`.
    """

    def __init__(self, schedule: Schedule, rank: int) -> None:
        self._homes = schedule.homes
        self._num_microbatches = schedule.num_microbatches
        mine = [action for action in schedule.ranks[rank] if action.kind in (*SENDS, *RECEIVES)]
        self.messages = [self._message(action) for action in mine]
        due = receives_due(schedule)[rank]
        self.due = [[None if each is None else self._message(each) for each in row] for row in due]

    def _message(self, action: Action) -> _Message:
        assert action.microbatch is not None, action
        behind = 1 if action.kind in (Kind.SEND_ACTIVATION, Kind.RECEIVE_GRADIENT) else 0
        border, forward = action.stage + behind, action.kind in _FORWARD
        value_tag = 2 * (border * self._num_microbatches + action.microbatch)
        return _Message(
            action,
            self._homes[other_end(action).stage],
            border,
            action.microbatch,
            forward,
            action.kind in SENDS,
            value_tag + (not forward),
            value_tag,
        )


class Transfers:
    """Carries what actions name, in one step.

    Args:
        timetable: of this rank.
        routes: micro-batch -> its route.
        wire: to the other ranks.
    """

    def __init__(self, timetable: Timetable, routes: Sequence[Route], wire: Wire) -> None:
        self._messages = iter(timetable.messages)
        self._posting = Posting(timetable.due, early=wire.early, size_bytes=partial(_size_bytes, routes))
        self._routes = routes
        self._wire = wire
        self._posted: dict[Tag, Callable[[], list[Tensor]]] = {}
        self._tell: Callable[[], None] | None = None
        wire.begun = True  # on all ranks alike, whoever sends first
        self._post(self._posting.begun())

    def forwarded(self, tell: Callable[[], None]) -> None:
        """This rank has done its last forward; `tell` is called when all have, or would have on paper."""
        self._tell = tell
        self._post(self._posting.forwarded())

    def do(self, action: Action, each: Pass) -> None:
        """One send or receive; they come in the order of the timetable."""
        message = next(self._messages)
        assert message.action is action, (message.action, action)
        if message.sends:
            values = each.outgoing(action.stage) if message.forward else each.returned(action.stage)
            self._wire.send(values, message.peer, message.tag)
            self._post(self._posting.done())
        else:
            self._post(self._posting.waits())
            self._take(message, each, self._posted.pop(message.tag)())
            self._post(self._posting.done(message))

    def _take(self, message: _Message, each: Pass, values: list[Tensor]) -> None:
        stage = message.action.stage
        if message.forward:
            each.take(self._routes[message.microbatch].borders[stage], stage, values)
            return
        each.give(stage, values)
        if values:  # whoever sends gradients back has received
            self._wire.let_go(message.value_tag)

    def _post(self, due: Iterable[_Message | None]) -> None:
        for message in due:
            if message is not None:
                self._posted[message.tag] = self._wire.receive(
                    _shapes(self._routes, message), message.peer, message.tag
                )
            elif self._tell is not None:
                self._tell()


def _shapes(routes: Sequence[Route], message: _Message) -> Sequence[Shape]:
    border = routes[message.microbatch].borders[message.border]
    return border.shapes if message.forward else border.returned


def _size_bytes(routes: Sequence[Route], message: _Message) -> int:
    border = routes[message.microbatch].borders[message.border]
    return border.num_bytes if message.forward else border.num_bytes_returned
