"""Sends and receives of one step, in the order of a schedule."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from meshwright.parallel.pipeline.actions import Action, Kind
from meshwright.parallel.pipeline.check import other_end
from meshwright.parallel.pipeline.passes import Pass
from meshwright.parallel.pipeline.route import Route, Shape
from meshwright.parallel.pipeline.wire import Tag, Wire

__all__ = ["Transfers"]

_RECEIVES = (Kind.RECEIVE_ACTIVATION, Kind.RECEIVE_GRADIENT)


class Transfers:
    """Carries what actions name.

    Args:
        actions: of this rank.
        homes: stage -> rank of the pipeline.
        routes: micro-batch -> its route.
        wire: to the other ranks.
        ahead: receives that are posted before they are needed, so that values travel while this rank computes.
    """

    def __init__(
        self, actions: Sequence[Action], homes: Sequence[int], routes: Sequence[Route], wire: Wire, *, ahead: int = 2
    ) -> None:
        self._homes = homes
        self._routes = routes
        self._wire = wire
        self._ahead = ahead
        self._coming = deque(action for action in actions if action.kind in _RECEIVES)
        self._posted: dict[Action, Callable[[], list[Tensor]]] = {}
        self._post()

    def do(self, action: Action, each: Pass) -> None:
        """One send or receive."""
        if action.kind in _RECEIVES:
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
        while self._coming and len(self._posted) < self._ahead:
            action = self._coming.popleft()
            sender = self._homes[other_end(action).stage]
            self._posted[action] = self._wire.receive(self._shapes(action), sender, _tag(action))

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
