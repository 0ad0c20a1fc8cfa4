"""Sends and receives of one step, in the order of a schedule."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from torch import Tensor

from meshwright.parallel.pipeline.actions import Action, Kind, Schedule
from meshwright.parallel.pipeline.check import other_end
from meshwright.parallel.pipeline.passes import Pass
from meshwright.parallel.pipeline.route import Route, Shape
from meshwright.parallel.pipeline.wire import Tag, Wire

__all__ = ["Transfers"]

_SENDS = (Kind.SEND_ACTIVATION, Kind.SEND_GRADIENT)
_RECEIVES = (Kind.RECEIVE_ACTIVATION, Kind.RECEIVE_GRADIENT)


class Transfers:
    """Carries what actions name.

    From each rank values are received in the order in which it sends them, since a transport may know no other.

    Args:
        schedule: of all ranks.
        routes: micro-batch -> its route.
        wire: to the other ranks.
        ahead: receives that are posted before they are needed, so that values travel while this rank computes.
    """

    def __init__(self, schedule: Schedule, routes: Sequence[Route], wire: Wire, *, ahead: int = 2) -> None:
        self._homes = schedule.homes
        self._routes = routes
        self._wire = wire
        self._ahead = ahead
        self._coming = deque(action for action in schedule.ranks[wire.rank] if action.kind in _RECEIVES)
        self._sent = [deque(self._sent_here(actions)) for actions in schedule.ranks]
        self._posted: dict[Action, Callable[[], list[Tensor]]] = {}
        self._post()

    def do(self, action: Action, each: Pass) -> None:
        """One send or receive."""
        if action.kind in _RECEIVES:
            self._coming.popleft()
            values = self._posted.pop(action)()
            self._post()
            if action.kind is Kind.RECEIVE_ACTIVATION:
                each.take(self._route(action).borders[action.stage], action.stage, values)
            else:
                each.give(action.stage, values)
                if values:  # whoever sends gradients back has received
                    self._wire.let_go(_tag(replace(action, kind=Kind.SEND_ACTIVATION)))
            return
        to = self._homes[other_end(action).stage]
        values = each.outgoing(action.stage) if action.kind is Kind.SEND_ACTIVATION else each.returned(action.stage)
        self._wire.send(values, to, _tag(action))

    def _post(self) -> None:
        for action in islice(self._coming, self._ahead):
            sender = self._homes[other_end(action).stage]
            while action not in self._posted:
                sent = self._sent[sender].popleft()
                self._posted[sent] = self._wire.receive(self._shapes(sent), sender, _tag(sent))

    def _sent_here(self, actions: Iterable[Action]) -> Iterator[Action]:
        """Receives of this rank in the order in which another rank's actions send."""
        for action in actions:
            if action.kind in _SENDS and self._homes[other_end(action).stage] == self._wire.rank:
                yield other_end(action)

    def _shapes(self, action: Action) -> Sequence[Shape]:
        borders = self._route(action).borders
        if action.kind is Kind.RECEIVE_ACTIVATION:
            return borders[action.stage].shapes
        return borders[action.stage + 1].returned

    def _route(self, action: Action) -> Route:
        assert action.microbatch is not None, action
        return self._routes[action.microbatch]


def _tag(action: Action) -> Tag:
    """The stage behind the border that a value or its gradient crosses, the micro-batch, and which way."""
    assert action.microbatch is not None, action
    behind = {Kind.RECEIVE_ACTIVATION: 0, Kind.SEND_ACTIVATION: 1, Kind.RECEIVE_GRADIENT: 1, Kind.SEND_GRADIENT: 0}
    way = "forward" if action.kind in (Kind.RECEIVE_ACTIVATION, Kind.SEND_ACTIVATION) else "backward"
    return action.stage + behind[action.kind], action.microbatch, way
