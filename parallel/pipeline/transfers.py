"""Sends and receives of one step, in the order of a schedule."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from meshwright.parallel.pipeline.actions import Action, Kind, Schedule
from meshwright.parallel.pipeline.check import other_end
from meshwright.parallel.pipeline.passes import Pass
from meshwright.parallel.pipeline.route import Route, Shape
from meshwright.parallel.pipeline.wire import Tag, Wire

__all__ = ["Timetable", "Transfers"]

_SENDS = (Kind.SEND_ACTIVATION, Kind.SEND_GRADIENT)
_RECEIVES = (Kind.RECEIVE_ACTIVATION, Kind.RECEIVE_GRADIENT)
_FORWARD = (Kind.SEND_ACTIVATION, Kind.RECEIVE_ACTIVATION)


@dataclass(frozen=True)
class _Message:
    """What an action sends or receives.

    Attributes:
        peer: rank at the other end.
        border: the stage behind the border that the value, or its gradient, crosses.
        arrival: number of a receive among those of this rank; -1 for a send.
    """

    action: Action
    peer: int
    border: int
    microbatch: int
    forward: bool
    arrival: int

    @property
    def tag(self) -> Tag:
        return self.border, self.microbatch, "forward" if self.forward else "backward"


class Timetable:
    """The messages of one rank, as they are in every step.

    Args:
        schedule: of all ranks.
        rank: this one.

    Attributes:
        messages: in the order of its actions.
        arrivals: receives in that order.
        posts: for each of these, those to be posted before it is: from each rank values are received in the order in
            which it sends them, since a transport may know no other.
    """

    def __init__(self, schedule: Schedule, rank: int) -> None:
        self._homes = schedule.homes
        self.messages: list[_Message] = []
        self.arrivals: list[_Message] = []
        for action in schedule.ranks[rank]:
            if action.kind in _SENDS:
                self.messages.append(self._message(action))
            elif action.kind in _RECEIVES:
                self.messages.append(self._message(action, len(self.arrivals)))
                self.arrivals.append(self.messages[-1])
        numbers = {each.action: each.arrival for each in self.arrivals}
        sent = [iter([numbers[each] for each in _sent_to(rank, schedule, actions)]) for actions in schedule.ranks]
        posted: set[int] = set()
        self.posts: list[list[_Message]] = []
        for each in self.arrivals:
            self.posts.append([])
            while each.arrival not in posted:
                number = next(sent[each.peer])
                posted.add(number)
                self.posts[-1].append(self.arrivals[number])

    def _message(self, action: Action, arrival: int = -1) -> _Message:
        assert action.microbatch is not None, action
        behind = 1 if action.kind in (Kind.SEND_ACTIVATION, Kind.RECEIVE_GRADIENT) else 0
        peer = self._homes[other_end(action).stage]
        forward = action.kind in _FORWARD
        return _Message(action, peer, action.stage + behind, action.microbatch, forward, arrival)


class Transfers:
    """Carries what actions name, in one step.

    Args:
        timetable: of this rank.
        routes: micro-batch -> its route.
        wire: to the other ranks.
        ahead: receives that are posted before they are needed, so that values travel while this rank computes.
    """

    def __init__(self, timetable: Timetable, routes: Sequence[Route], wire: Wire, *, ahead: int = 2) -> None:
        self._messages = iter(timetable.messages)
        self._posts = iter(timetable.posts)
        self._routes = routes
        self._wire = wire
        self._posted: dict[int, Callable[[], list[Tensor]]] = {}
        for _ in range(ahead):
            self._post()

    def do(self, action: Action, each: Pass) -> None:
        """One send or receive; they come in the order of the timetable."""
        message = next(self._messages)
        assert message.action is action, (message.action, action)
        if message.arrival < 0:
            values = each.outgoing(action.stage) if message.forward else each.returned(action.stage)
            self._wire.send(values, message.peer, message.tag)
            return
        values = self._posted.pop(message.arrival)()
        self._post()
        if message.forward:
            each.take(self._routes[message.microbatch].borders[action.stage], action.stage, values)
        else:
            each.give(action.stage, values)
            if values:  # whoever sends gradients back has received
                self._wire.let_go((message.border, message.microbatch, "forward"))

    def _post(self) -> None:
        for message in next(self._posts, ()):
            wait = self._wire.receive(self._shapes(message), message.peer, message.tag)
            self._posted[message.arrival] = wait

    def _shapes(self, message: _Message) -> Sequence[Shape]:
        border = self._routes[message.microbatch].borders[message.border]
        return border.shapes if message.forward else border.returned


def _sent_to(rank: int, schedule: Schedule, actions: Sequence[Action]) -> Iterator[Action]:
    """Receives of a rank in the order in which another rank's actions send."""
    for action in actions:
        if action.kind in _SENDS and schedule.homes[other_end(action).stage] == rank:
            yield other_end(action)
