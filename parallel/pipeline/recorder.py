"""Notes when a rank does what in a real step: a `Watch`, and what ranks exchange to make one timeline of it.

An action costs three readings of a clock. On a CPU the clock is that of the process; on a GPU it is the stream's own:
an event for each reading, asked for its time after the step, so that nothing is stopped.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import nan
from typing import Any, Protocol

import torch
from torch import Tensor

from meshwright.parallel.collectives import Groups, Pending
from meshwright.parallel.pipeline.actions import Action, Kind, Schedule
from meshwright.parallel.pipeline.measured import Moments, RankMoments, measured
from meshwright.parallel.pipeline.runtime import Phase, Watch
from meshwright.parallel.pipeline.timeline import Timeline

__all__ = ["Recorder", "offsets", "recording"]

_ROUNDS = 4
_COLLECTIVES = (Kind.GATHER, Kind.REDUCE)
_COLUMN = {Phase.WAITS: 0, Phase.RUNS: 1, Phase.DONE: 2}


class Watched(Protocol):
    """What tells a watch of its actions."""

    watch: Watch


class _Clock:
    """Seconds of this process."""

    tells_at_once = True
    now: Callable[[], Any] = staticmethod(time.perf_counter)

    def read(self, moments: Sequence[Any]) -> list[float]:
        """Seconds of what `now` gave."""
        return list(moments)


class _StreamClock(_Clock):
    """Seconds of this process at which a GPU's stream came by."""

    tells_at_once = False

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self._first_s, self._first = time.perf_counter(), self._event()
        self.now = self._event

    def read(self, moments: Sequence[Any]) -> list[float]:
        """Seconds of what `now` gave; waits for the stream."""
        torch.cuda.synchronize()
        return [self._first_s + self._first.elapsed_time(each) / 1e3 for each in moments]

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Recorder:
    """Notes phases of actions, and collectives that gathers and reductions start.

    Args:
        clock: what moments are read from; the process's own by default.
    """

    def __init__(self, clock: _Clock | None = None) -> None:
        self._clock = clock or _Clock()
        self._now = self._clock.now
        self._marks: list[Any] = []  # action, phase, moment; action, ...: no objects that the garbage collector counts
        self._note = self._marks.extend
        self._arrivals: list[list[Any]] = []
        self._ends: list[Any] = []

    def __call__(self, action: Action, phase: Phase) -> None:
        """Notes one phase of one action."""
        self._note((action, phase, self._now()))

    def limit(self) -> None:
        """Notes the start, or the end, of the step."""
        self._ends.append(self._now())

    def started(self, pending: Pending) -> None:
        """Notes a collective, if an action started it that says so in the schedule."""
        if not self._marks or self._marks[-2] is Phase.DONE or self._marks[-3].kind not in _COLLECTIVES:
            return
        arrival = [len(self._marks) // 3 - 1]
        self._arrivals.append(arrival)
        future = _future(pending) if self._clock.tells_at_once else None
        if future is None:
            pending.told = lambda: arrival.append(self._now())
        else:
            future.add_done_callback(lambda _: arrival.append(self._now()))

    def moments(self) -> RankMoments:
        """What was noted."""
        times = self._clock.read([*self._ends, *self._marks[2::3]])
        (start, end), marks = times[:2], times[2:]
        arrived: dict[int, float] = {}
        for place, *moments in self._arrivals:
            at = self._clock.read(moments)[0] if moments else end
            arrived[place] = max(at, arrived.get(place, at))
        rows, row = [], [nan] * 4
        for place, (phase, moment) in enumerate(zip(self._marks[1::3], marks, strict=True)):
            row[_COLUMN[phase]] = moment
            row[3] = arrived.get(place, row[3])
            if phase is Phase.DONE:
                rows.append(Moments(*row))
                row = [nan] * 4
        return RankMoments(start, tuple(rows), end)


def _future(pending: Pending) -> Any | None:
    try:
        return None if pending.work is None else pending.work.get_future()
    except RuntimeError:  # gloo's reduce-scatter has none
        return None


@contextmanager
def recording(watched: Watched, groups: Groups, schedule: Schedule) -> Iterator[list[Timeline]]:
    """Records the step that runs inside; afterwards the list holds its timeline, of all ranks along `pp`.

    Ranks begin together, and their clocks are compared: in a few rounds of a collective no rank leaves before all have
    entered, which bounds how far clocks are apart (see `offsets`).
    """
    found: list[Timeline] = []
    apart_s = _offset(groups)
    recorder = Recorder(_StreamClock() if groups.device_type == "cuda" else None)
    before = watched.watch
    watched.watch, groups.notice = recorder, recorder.started
    recorder.limit()
    try:
        yield found
    finally:
        watched.watch, groups.notice = before, None
    recorder.limit()
    found.append(measured(schedule, _exchanged(recorder.moments(), apart_s=apart_s, groups=groups, schedule=schedule)))


def offsets(entered: Sequence[Sequence[float]], left: Sequence[Sequence[float]]) -> list[float]:
    """What to add to each rank's clock to have the first one's.

    Nobody left a round before everybody had entered it: that gives a smallest and a largest offset. Clocks that may be
    equal are: those of one machine. Otherwise the middle is taken, wrong by no more than the fastest round took.

    Args:
        entered: rank -> round -> its own time.
        left: the same.

    >>> offsets([[0.0, 5.0], [100.0, 105.2]], [[1.0, 6.0], [101.0, 106.0]])
    [0.0, -100.1]
    """
    found = []
    for mine_in, mine_out in zip(entered, left, strict=True):
        low = max(first - mine for first, mine in zip(entered[0], mine_out, strict=True))
        high = min(first - mine for first, mine in zip(left[0], mine_in, strict=True))
        found.append(0.0 if low <= 0.0 <= high else (low + high) / 2)
    return found


def _offset(groups: Groups) -> float:
    if groups.mesh.pp == 1:
        return 0.0
    times = torch.zeros(2, _ROUNDS, dtype=torch.float64)
    for number in range(_ROUNDS):
        times[0, number] = time.perf_counter()
        groups.all_gather(torch.zeros(1), "pp")
        times[1, number] = time.perf_counter()
    both = [each.tolist() for each in groups.all_gather(times, "pp")]
    return offsets([each[0] for each in both], [each[1] for each in both])[groups.mesh.coordinates(groups.rank)["pp"]]


def _exchanged(mine: RankMoments, *, apart_s: float, groups: Groups, schedule: Schedule) -> list[RankMoments]:
    """The moments of all ranks; the schedule says how many there are."""
    rows = [[each.waits, each.runs, each.done, each.arrived] for each in mine.actions]
    table = torch.full((max(map(len, schedule.ranks)) + 1, 4), nan, dtype=torch.float64)
    table[: len(rows)] = torch.tensor(rows, dtype=torch.float64)
    table[-1, :2] = torch.tensor([mine.start, mine.end], dtype=torch.float64)
    every = groups.all_gather(table + apart_s, "pp")
    return [_of_table(each, len(row)) for each, row in zip(every, schedule.ranks, strict=True)]


def _of_table(table: Tensor, number: int) -> RankMoments:
    start, end, *_ = table[-1].tolist()
    return RankMoments(start, tuple(Moments(*row) for row in table[:number].tolist()), end)
