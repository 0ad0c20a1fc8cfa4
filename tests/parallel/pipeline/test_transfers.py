"""Values between two ranks are received in the order in which they are sent, whatever the schedule."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest

from meshwright.parallel.pipeline.actions import COMPUTE, Kind, Schedule
from meshwright.parallel.pipeline.choose import ACROSS_RANKS, chosen
from meshwright.parallel.pipeline.lower import lowered
from meshwright.parallel.pipeline.route import Border, Route
from meshwright.parallel.pipeline.transfers import Timetable, Transfers

_TRAVELS = (Kind.SEND_ACTIVATION, Kind.SEND_GRADIENT, Kind.RECEIVE_ACTIVATION, Kind.RECEIVE_GRADIENT)


class _Wire:
    """Notes what is posted."""

    def __init__(self, rank: int, early: int) -> None:
        self.rank = rank
        self.early = early
        self.sent: dict[int, list[Any]] = defaultdict(list)
        self.received: dict[int, list[Any]] = defaultdict(list)
        self.line: list[tuple[frozenset[int], Any]] = []

    def send(self, values: Any, to: int, tag: Any) -> None:
        del values
        self.sent[to].append(tag)
        self.line.append((frozenset((self.rank, to)), tag))

    def receive(self, shapes: Any, source: int, tag: Any) -> Callable[[], list[Any]]:
        del shapes
        self.received[source].append(tag)
        self.line.append((frozenset((self.rank, source)), tag))
        return list

    def let_go(self, tag: Any) -> None:
        assert any(tag in sent for sent in self.sent.values())


class _Nothing:
    """A pass whose values nobody looks at."""

    def __getattr__(self, name: str) -> Callable[..., list[Any]]:
        return lambda *_: []


def _walk(schedule: Schedule, rank: int, early: int = 0) -> _Wire:
    wire: Any = _Wire(rank, early)
    borders = {stage: Border((), ()) for stage in range(1, schedule.num_stages)}
    routes = [Route([], borders)] * schedule.num_microbatches
    nothing: Any = _Nothing()
    transfers = Transfers(Timetable(schedule, rank), routes, wire)
    everybody = frozenset(range(schedule.num_ranks)), "all are forwarded"
    forwards = schedule.count(Kind.FORWARD, rank)
    for action in schedule.ranks[rank]:
        forwards -= action.kind is Kind.FORWARD
        if action.kind in _TRAVELS:
            transfers.do(action, nothing)
        elif action.kind is Kind.FORWARD and not forwards:
            transfers.forwarded(lambda: wire.line.append(everybody))
    assert everybody in wire.line
    return wire  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ACROSS_RANKS)
@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(2, 5), (4, 3), (4, 8)])
@pytest.mark.parametrize("early", [0, 4])
def test_each_pair_of_ranks_agrees_on_the_order(name: str, num_ranks: int, num_microbatches: int, early: int) -> None:
    _, schedule = chosen(name, 8, num_ranks, num_microbatches)
    wires = [_walk(schedule, rank, early) for rank in range(num_ranks)]
    for rank, wire in enumerate(wires):
        for to, sent in wire.sent.items():
            assert wires[to].received[rank] == sent
    assert sum(len(sent) for wire in wires for sent in wire.sent.values()) > 0


def _stuck_in_one_queue(lines: list[list[Any]]) -> dict[int, Any]:
    """Where ranks are when each call waits for the ranks it needs, and all calls of a rank behind it for the call."""
    places = [0] * len(lines)
    while True:
        heads = {
            rank: line[place] for rank, (line, place) in enumerate(zip(lines, places, strict=True)) if place < len(line)
        }
        ready = [each for each in heads.values() if all(heads.get(rank) == each for rank in each[0])]
        if not ready:
            return heads
        for rank in ready[0][0]:
            places[rank] += 1


@pytest.mark.parametrize("name", ACROSS_RANKS)
@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(2, 1), (2, 5), (3, 4), (4, 3), (4, 8), (4, 13)])
@pytest.mark.parametrize("recompute", [False, True])
def test_no_schedule_is_stuck_where_all_calls_of_a_rank_share_one_queue(
    name: str, num_ranks: int, num_microbatches: int, recompute: bool
) -> None:
    _, schedule = chosen(name, 12, num_ranks, num_microbatches)
    rows = lowered(schedule.only(*COMPUTE), zero_stage=3, recompute=recompute)
    assert not _stuck_in_one_queue([_walk(rows, rank).line for rank in range(num_ranks)])
