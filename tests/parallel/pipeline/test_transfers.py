"""Values between two ranks are received in the order in which they are sent, whatever the schedule."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest

from meshwright.parallel.pipeline.actions import Kind, Schedule
from meshwright.parallel.pipeline.choose import ACROSS_RANKS, chosen
from meshwright.parallel.pipeline.route import Border, Route
from meshwright.parallel.pipeline.transfers import Timetable, Transfers

_TRAVELS = (Kind.SEND_ACTIVATION, Kind.SEND_GRADIENT, Kind.RECEIVE_ACTIVATION, Kind.RECEIVE_GRADIENT)


class _Wire:
    """Notes what is posted."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.sent: dict[int, list[Any]] = defaultdict(list)
        self.received: dict[int, list[Any]] = defaultdict(list)

    def send(self, values: Any, to: int, tag: Any) -> None:
        del values
        self.sent[to].append(tag)

    def receive(self, shapes: Any, source: int, tag: Any) -> Callable[[], list[Any]]:
        del shapes
        self.received[source].append(tag)
        return list

    def let_go(self, tag: Any) -> None:
        assert any(tag in sent for sent in self.sent.values())


class _Nothing:
    """A pass whose values nobody looks at."""

    def __getattr__(self, name: str) -> Callable[..., list[Any]]:
        return lambda *_: []


def _walk(schedule: Schedule, rank: int) -> _Wire:
    wire: Any = _Wire(rank)
    borders = {stage: Border((), ()) for stage in range(1, schedule.num_stages)}
    routes = [Route([], borders)] * schedule.num_microbatches
    nothing: Any = _Nothing()
    transfers = Transfers(Timetable(schedule, rank), routes, wire)
    for action in schedule.ranks[rank]:
        if action.kind in _TRAVELS:
            transfers.do(action, nothing)
    return wire  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ACROSS_RANKS)
@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(2, 5), (4, 3), (4, 8)])
def test_each_pair_of_ranks_agrees_on_the_order(name: str, num_ranks: int, num_microbatches: int) -> None:
    _, schedule = chosen(name, 8, num_ranks, num_microbatches)
    wires = [_walk(schedule, rank) for rank in range(num_ranks)]
    for rank, wire in enumerate(wires):
        for to, sent in wire.sent.items():
            assert wires[to].received[rank] == sent
    assert sum(len(sent) for wire in wires for sent in wire.sent.values()) > 0
