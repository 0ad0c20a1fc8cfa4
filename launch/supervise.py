"""Watches a started run to its end: events of agents, output of ranks, signals to the launcher.

started -> exit* -> result, per node; one node that failed for good ends the others.
"""

import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from meshwright.clusters.base import StartPlan
from meshwright.clusters.blame import RankEnd
from meshwright.clusters.contract import Handle
from meshwright.clusters.retry import Decision
from meshwright.launch.exits import Exit
from meshwright.launch.losses import Losses

__all__ = ["Interrupts", "RunState", "now_unix_s", "supervise"]

_TICK_S = 0.1
_CLOCKS_S = 5.0
_IMPATIENT = 2
_ENVELOPE = ("event", "node")
_FREE = ("evidence", "reason", "message", "fault", "found", "why")


class Interrupts:
    """Collects the signals that ask the launcher to end, while it is entered."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        for number in self._SIGNALS:
            self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.numbers.append(number)


@dataclass
class RunState:
    """What is known of a run from its agents' events.

    Args:
        plan: what was started.
        attempt: the newest attempt, from 0.
        ends: of the newest attempt, rank -> how it ended.
        results: node -> (state, message) of its agent's last word.
        losses: nodes whose agents died without one.
        apart: nodes that do not share the run directory.
        decisions: attempt that failed -> what its agents agreed on.
        again: attempt that failed -> when ranks had started again, and after how many seconds.
        health: what agents saw of their machines, and we of their clocks.
        begun_unix_s: when agents were first started; whatever they say, they say later.
    """

    plan: StartPlan
    attempt: int = 0
    attempt_unix_s: float = 0.0
    ends: dict[int, RankEnd] = field(default_factory=dict)
    results: dict[str, tuple[str, str]] = field(default_factory=dict)
    losses: Losses = field(default_factory=Losses)
    apart: list[str] = field(default_factory=list)
    decisions: dict[int, dict[str, Any]] = field(default_factory=dict)
    again: dict[int, tuple[float, float]] = field(default_factory=dict)
    health: list[dict[str, Any]] = field(default_factory=list)
    begun_unix_s: float = 0.0
    _down_unix_s: float | None = None

    @classmethod
    def of(cls, plan: StartPlan) -> "RunState":
        """Before anything is started; of a run that agents of another start were part of, what is known of those."""
        past = plan.limits.past
        excluded = Losses.read(Path(plan.run_dir))
        since_s = excluded.excluded[-1]["time_unix_s"] if past and excluded.excluded else None
        told = {each.attempt: each.as_dict() for each in past}
        return cls(plan, len(past), losses=excluded, decisions=told, _down_unix_s=since_s)

    def begin(self) -> None:
        """Agents are being started; what they say from now on was not said before."""
        self.begun_unix_s = self.begun_unix_s or now_unix_s()

    def observe(self, event: dict[str, Any]) -> None:
        """Takes one event in."""
        kind, node = event["event"], event["node"]
        if kind == "started":
            self._compare_clocks(node, event["time_unix_s"])
            self._begin(event["attempt"], event["time_unix_s"])
        elif kind == "exit":
            self._end(event)
        elif kind == "result":
            self.results[node] = self._last_word(event)
        elif kind == "gone" and node not in self.results:
            self.losses.take(event, now_unix_s())
        elif kind in ("decided", "health", "left_out", "placed"):
            self._note(event)
        elif kind == "joined" and not event["shared"] and node not in self.apart:
            self.apart.append(node)

    def _place(self, planned: str, name: str) -> None:
        """A node of the plan is called by what its cluster chose."""
        nodes = tuple(replace(each, name=name) if each.name == planned else each for each in self.plan.nodes)
        self.plan = replace(self.plan, nodes=nodes)

    def _last_word(self, event: Mapping[str, Any]) -> tuple[str, str]:
        """How an agent ended; one that only misses those that were told to end before it is a victim."""
        victim = self.over and event["state"] in ("rendezvous_failed", "error")
        return "stopped" if victim else event["state"], event.get("message", "")

    def _compare_clocks(self, node: str, told_unix_s: float) -> None:
        """Notes a clock that shows what cannot be, whatever time a message takes: it was sent since we began."""
        now_s = now_unix_s()
        for off_s, word in ((told_unix_s - now_s, "ahead of"), (self.begun_unix_s - told_unix_s, "behind")):
            if off_s > _CLOCKS_S:
                found = f"its clock is {off_s:.0f} s {word} this machine's, or more; set it by NTP"
                self.health.append({"node": node, "fault": None, "found": found, "time_unix_s": now_s})

    def _note(self, event: dict[str, Any]) -> None:
        """What agents agreed on, or one saw of its machine (a fault, or that there is nothing to look at), or is on."""
        if event["event"] == "decided":
            self._agree(event)
            return
        if event["event"] == "placed":
            self._place(event["node"], event["name"])
            return
        if event["event"] == "left_out":
            self.losses.excluded.append({key: value for key, value in event.items() if key != "event"})
            return
        self.health.append({key: value for key, value in event.items() if key != "event"})
        if event["fault"] is not None:
            self.losses.sick.setdefault(event["node"], event["fault"])

    def _agree(self, event: dict[str, Any]) -> None:
        told = {key: value for key, value in event.items() if key not in _ENVELOPE}
        self.decisions.setdefault(event["attempt"], told)

    def _end(self, event: dict[str, Any]) -> None:
        if event["attempt"] < self.attempt:
            return
        self._begin(event["attempt"], event["time_unix_s"])
        told = {name: event[name] for name in ("rank", "code", "time_unix_s", "ended_by_us")}
        self.ends[event["rank"]] = RankEnd(host=event["node"], **told, kernel=event.get("kernel", ""))

    def _begin(self, attempt: int, time_unix_s: float) -> None:
        if attempt > self.attempt:
            self._fail()
            self.attempt, self.ends, self.attempt_unix_s = attempt, {}, 0.0
        if not self.attempt_unix_s:
            self.attempt_unix_s = time_unix_s
            if attempt:
                since_s = time_unix_s if self._down_unix_s is None else self._down_unix_s
                self.again[attempt - 1] = time_unix_s, max(0.0, time_unix_s - since_s)
                self._down_unix_s = None

    def _fail(self) -> None:
        """No rank runs any more, since the first of them failed or a node was lost, if not since before."""
        failed_s = [end.time_unix_s for end in self.ends.values() if end.code and not end.ended_by_us]
        failed_s = failed_s or [end.time_unix_s for end in self.ends.values()]  # ended for what was seen of a machine
        failed_s += [self.losses.since_unix_s] if self.losses.codes else []
        known_s = [] if self._down_unix_s is None else [self._down_unix_s]
        self._down_unix_s = min([*failed_s, *known_s], default=None)

    def go_on(self, plan: StartPlan, decision: Decision) -> None:
        """The run is started again by another plan, as was decided.

        Args:
            plan: what is started.
            decision: after which.
        """
        self._fail()
        self.losses.exclude(decision, now_unix_s())
        self.plan, self.attempt, self.attempt_unix_s = plan, decision.attempt + 1, 0.0
        self.ends, self.results = {}, {}

    @property
    def over(self) -> bool:
        """Whether the run cannot succeed any more, so that every node should end."""
        failed = any(end.code and not end.ended_by_us for end in self.ends.values())
        bad = any(state != "succeeded" for state, _ in self.results.values())
        last = self.attempt >= self.plan.limits.max_restarts or self._stuck
        return bad or bool(self.losses.codes) or (failed and last)

    @property
    def _stuck(self) -> bool:
        """Whether ranks hang that are not to be started again."""
        limits = self.plan.limits
        hung = any(end.code == Exit.HANG and not end.ended_by_us for end in self.ends.values())
        return hung and limits.hang_s is not None and limits.hang_action == "dump_and_stop"


_Watchers = Iterable[Callable[[RunState], None]]
_Words = Callable[[str], str]


def supervise(
    handle: Handle, state: RunState, interrupts: Interrupts, *, watchers: _Watchers = (), mask: _Words = str
) -> None:
    """Follows a run until nothing of it is left; `state` tells how it went.

    A first signal ends ranks with grace, a second one at once. Whatever happens here, no rank stays.

    Args:
        handle: the started run.
        state: is kept up to date.
        interrupts: signals to the launcher.
        watchers: called with the state several times a second.
        mask: replaces secrets in what agents say in words, before anything is made of it.
    """
    stopping, hooks = False, list(watchers)
    state.begin()
    try:
        while not handle.done and len(interrupts.numbers) < _IMPATIENT:
            for event in handle.poll(_TICK_S):
                state.observe(_masked(event, mask))
            for hook in hooks:
                hook(state)
            if not stopping and (interrupts.numbers or state.over):
                handle.stop()
                stopping = True
    finally:
        handle.kill()
    for event in handle.poll(0.0):
        state.observe(_masked(event, mask))
    for hook in hooks:
        hook(state)


def _masked(event: Mapping[str, Any], mask: _Words) -> dict[str, Any]:
    return {name: mask(value) if name in _FREE and value else value for name, value in event.items()}


def now_unix_s() -> float:
    """Seconds since 1970, to the millisecond."""
    return round(time.time(), 3)
