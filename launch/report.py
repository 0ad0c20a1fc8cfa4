"""How a run ended: the exit record, and the same for people, the first failing rank's traceback first. Pure."""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meshwright.clusters.blame import Blame, Verdict
from meshwright.launch.exits import Exit
from meshwright.launch.restarts import excluded_of, line_of, restarts_of, why_given_up
from meshwright.launch.supervise import RunState

__all__ = ["Outcome", "outcome_of"]

_NODE_CODES = {"setup_failed": Exit.INTERNAL, "rendezvous_failed": Exit.RENDEZVOUS, "error": Exit.INTERNAL}
_NODE_WORDS = {
    "setup_failed": "setup failed on",
    "rendezvous_failed": "nodes did not meet; see the agent's log of",
    "error": "the agent failed on",
}

_AGAIN = "launch again to go on from the newest checkpoint"


@dataclass(frozen=True)
class Outcome:
    """The end of a run.

    Args:
        run_id: of the run.
        state: succeeded, failed or interrupted.
        exit_code: of the launcher.
        verdict: which rank failed first.
        reason: one line.
        attempts: how often the ranks were started.
        started_unix_s: when the launch began.
        ended_unix_s: when nothing was left of it.
        restarts: what each was for, with its wait and what time it cost.
        given_up: why there was no further restart, where there could have been.
        excluded: nodes that the run went on without: who, why, when, and what time it cost.
        health: faults of machines that were seen while ranks ran: which node, what, when.
    """

    run_id: str
    state: str
    exit_code: int
    verdict: Verdict
    reason: str
    attempts: int
    started_unix_s: float
    ended_unix_s: float
    restarts: tuple[dict[str, Any], ...] = ()
    given_up: str | None = None
    excluded: tuple[dict[str, Any], ...] = ()
    health: tuple[dict[str, Any], ...] = ()

    @property
    def lost_s(self) -> float:
        """Time in which no rank ran, between failures and the starts after them."""
        return round(sum(float(each["down_s"]) for each in self.restarts), 3)

    def as_dict(self) -> dict[str, Any]:
        """The exit record."""
        first = self.verdict.first
        return {
            "run_id": self.run_id,
            "state": self.state,
            "exit_code": self.exit_code,
            "reason": self.reason,
            "first_failure": None if first is None else first.as_dict(),
            "victims": [victim.as_dict() for victim in self.verdict.victims],
            "attempts": self.attempts,
            "restarts": list(self.restarts),
            "lost_s": self.lost_s,
            "given_up": self.given_up,
            "excluded": list(self.excluded),
            "health": list(self.health),
            "started_unix_s": self.started_unix_s,
            "ended_unix_s": self.ended_unix_s,
        }

    def __str__(self) -> str:
        if self.state == "succeeded":
            return f"run {self.run_id} succeeded"
        lines = [f"run {self.run_id} {self.state}: {self.reason}"]
        first = self.verdict.first
        if first is not None and self.state == "failed":
            lines += [f"--- first failure: rank {first.rank} on {first.host}: {first.evidence}", first.traceback]
        lines += [f"--- {_victim(victim)}" for victim in self.verdict.victims]
        lines += [f"--- {line_of(each)}" for each in self.restarts]
        return "\n".join(line for line in [*lines, f"exit code {self.exit_code}"] if line)


def _victim(victim: Blame) -> str:
    last = victim.traceback.strip().splitlines()[-1:] if "Traceback" in victim.traceback else []
    return "; ".join([f"victim: rank {victim.rank} on {victim.host}: {victim.evidence}", *last])


def outcome_of(
    state: RunState, verdict: Verdict, interrupts: Sequence[int], *, times_s: tuple[float, float]
) -> Outcome:
    """Weighs what agents said: a signal to the launcher, then nodes, then ranks.

    Args:
        state: what the agents said.
        verdict: which rank failed first.
        interrupts: signals the launcher got.
        times_s: when the launch began and ended, in seconds since 1970.
    """
    nodes = [(node, told) for node, told in state.results.items() if told[0] in _NODE_CODES]
    lost = bool(state.losses.codes) and (verdict.first is None or verdict.only_lost)
    if interrupts:
        name = signal.Signals(interrupts[0]).name
        word, code, reason = "interrupted", 128 + interrupts[0], f"the launcher got {name}"
    else:
        word, code, reason = _failure(state, verdict, nodes=nodes, lost=lost)
        if nodes or lost:
            verdict = Verdict(None)  # no rank is to blame for what its node could not do
    history: dict[str, Any] = {"restarts": restarts_of(state), "given_up": why_given_up(state)}
    history["excluded"] = excluded_of(state)
    history["health"] = tuple(_fault(each) for each in state.health if each["fault"] is not None)
    return Outcome(state.plan.run_id, word, code, verdict, reason, state.attempt + 1, *times_s, **history)


def _given_up(state: RunState) -> str:
    why = why_given_up(state)
    return f"; not started again: {why}" if why else ""


def _fault(seen: Mapping[str, Any]) -> dict[str, Any]:
    return {key: seen[key] for key in ("node", "fault", "time_unix_s")}


def _failure(
    state: RunState, verdict: Verdict, *, nodes: Sequence[tuple[str, tuple[str, str]]], lost: bool
) -> tuple[str, int, str]:
    if nodes:
        node, (kind, message) = nodes[0]
        return "failed", int(_NODE_CODES[kind]), f"{_NODE_WORDS[kind]} {node}: {message}"
    if lost:
        code, words = state.losses.cause_of(next(iter(state.losses.codes)))
        advice = f"; {_AGAIN}" if code == Exit.UNAVAILABLE else ""  # a key that is refused stays refused
        return "failed", code, words + (_given_up(state) or advice)
    if verdict.first is not None:
        return "failed", verdict.first.exit_code, verdict.reason + _given_up(state)
    if len(state.results) == len(state.plan.nodes) and not state.over:
        return "succeeded", 0, ""
    told = state.decisions.get(max((state.attempt, *state.decisions)))
    if told is not None and not told["again"]:  # no rank failed: agents ended them for what they saw of a machine
        return "failed", told["exit_code"], f"{told['evidence']}; not started again: {told['reason']}"
    return "failed", int(Exit.INTERNAL), "the agents ended without a word"
