"""How a run ended: the exit record, and the same for people, the first failing rank's traceback first. Pure."""

import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from meshwright.launch.exits import Blame, Exit, Verdict
from meshwright.launch.supervise import Restart, RunState

__all__ = ["Outcome", "outcome_of"]

_NODE_CODES = {"setup_failed": Exit.INTERNAL, "rendezvous_failed": Exit.RENDEZVOUS, "error": Exit.INTERNAL}
_NODE_WORDS = {
    "setup_failed": "setup failed on",
    "rendezvous_failed": "nodes did not meet; see the agent's log of",
    "error": "the agent failed on",
}


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
        restarts: of all ranks, in order.
    """

    run_id: str
    state: str
    exit_code: int
    verdict: Verdict
    reason: str
    attempts: int
    started_unix_s: float
    ended_unix_s: float
    restarts: tuple[Restart, ...] = ()

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
            "restarts": [asdict(each) for each in self.restarts],
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
    restarts = tuple(state.restarts)
    lost = bool(state.lost) and (verdict.first is None or verdict.only_lost)
    if interrupts:
        code, reason = 128 + interrupts[0], f"the launcher got {signal.Signals(interrupts[0]).name}"
        word = "interrupted"
        return Outcome(state.plan.run_id, word, code, verdict, reason, state.attempt + 1, *times_s, restarts)
    word, code, reason = _failure(state, verdict, nodes=nodes, lost=lost)
    if nodes or lost:
        verdict = Verdict(None)  # no rank is to blame for what its node could not do
    return Outcome(state.plan.run_id, word, code, verdict, reason, state.attempt + 1, *times_s, restarts)


def _failure(
    state: RunState, verdict: Verdict, *, nodes: Sequence[tuple[str, tuple[str, str]]], lost: bool
) -> tuple[str, int, str]:
    if nodes:
        node, (kind, message) = nodes[0]
        return "failed", int(_NODE_CODES[kind]), f"{_NODE_WORDS[kind]} {node}: {message}"
    if lost:
        return ("failed", *_lost(state))
    if verdict.first is not None:
        return "failed", verdict.first.exit_code, verdict.reason
    if len(state.results) == len(state.plan.nodes) and not state.over:
        return "succeeded", 0, ""
    return "failed", int(Exit.INTERNAL), "the agents ended without a word"


def _lost(state: RunState) -> tuple[int, str]:
    """The first node that went without a word, in the words of a cluster that knows why."""
    node, status = next(iter(state.lost.items()))
    died = f"the agent of {node} died ({_status(status)}); its ranks were ended"
    return state.causes.get(node, (int(Exit.UNAVAILABLE), died))


def _status(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit code {status}"
