"""One failure policy for every cluster: whether ranks that failed start again, and after what wait. Pure.

    ends of ranks -> Verdict -> failure_of -> Failure (one per node) -> decide -> Decision

Agents collect the evidence, agree on one decision and execute it (see `rounds`).
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from meshwright.clusters.failure import Failure

__all__ = [
    "Decision",
    "RetryPolicy",
    "decide",
    "decision_from",
    "policy_from",
    "spent",
    "told_decision",
    "unwanted",
    "wait_of",
]


@dataclass(frozen=True)
class RetryPolicy:
    """When ranks are started again, and after what wait.

    Args:
        initial_s: wait before the first restart.
        factor: from one restart to the next.
        max_s: longest wait.
        jitter: share of a wait that is left to chance, 0 to 1.
        retry_on: kinds of failure, or exit:N, after which ranks start again.
        no_retry_on: those after which they never do.
        stop_after_no_progress: restarts in a row without a newer step after which the run is given up.
        exclude_after: faults of one machine after which the run goes on without it; None is never.
    """

    initial_s: float = 1.0
    factor: float = 2.0
    max_s: float = 300.0
    jitter: float = 0.2
    retry_on: tuple[str, ...] = ("node", "signal", "hang", "preempt", "exit")
    no_retry_on: tuple[str, ...] = ("config", "import_error")
    stop_after_no_progress: int | None = None
    exclude_after: int | None = None

    def __str__(self) -> str:
        never = f"; never on {', '.join(self.no_retry_on)}" if self.no_retry_on else ""
        wait = f"wait {self.initial_s:g} s x {self.factor:g} each, at most {self.max_s:g} s"
        stop = self.stop_after_no_progress
        stopped = "" if stop is None else f"; stop after {stop} without a newer step"
        excluded = (
            "" if self.exclude_after is None else f"; a node is left out after {self.exclude_after} of its faults"
        )
        return f"on {', '.join(self.retry_on) or 'nothing'}{never}; {wait}{stopped}{excluded}"


def policy_from(saved: Mapping[str, Any]) -> RetryPolicy:
    """The policy of a plan's JSON form."""
    lists = {name: tuple(saved[name]) for name in ("retry_on", "no_retry_on")}
    return RetryPolicy(**{**saved, **lists})


@dataclass(frozen=True)
class Decision:
    """What follows from a failure.

    Args:
        again: whether ranks start again.
        reason: why, or why not.
        wait_s: before they do.
        attempt: that failed, from 0.
        failure: the first one.
        step: newest step that any node saw.
        excludes: nodes that the run goes on without; agents end, and the launcher starts others.
        nodes: how many there were and are from now on, where that changes.
        leaving: whether a node is about to be taken away, after which nobody that is there starts ranks again.
    """

    again: bool
    reason: str
    wait_s: float
    attempt: int
    failure: Failure
    step: int | None = None
    excludes: tuple[str, ...] = ()
    nodes: tuple[int, int] | None = None
    leaving: bool = False

    def as_dict(self) -> dict[str, Any]:
        """JSON-able values, flat."""
        first = self.failure
        return {
            "attempt": self.attempt,
            "kind": first.kind,
            "rank": first.rank,
            "host": first.node,
            "exit_code": first.exit_code,
            "evidence": first.evidence,
            "step": self.step,
            "again": self.again,
            "reason": self.reason,
            "wait_s": self.wait_s,
            "only_lost": first.only_lost,
            "excludes": list(self.excludes),
            "nodes": None if self.nodes is None else list(self.nodes),
            "leaving": self.leaving,
        }

    def as_saved(self) -> dict[str, Any]:
        """JSON-able values from which `decision_from` makes the same decision."""
        return asdict(self)


def decision_from(saved: Mapping[str, Any]) -> Decision:
    """The decision that `as_saved` was taken of."""
    lists = {"excludes": tuple(saved["excludes"]), "nodes": _pair(saved["nodes"])}
    return Decision(**{**saved, **lists, "failure": Failure(**saved["failure"])})


def told_decision(told: Mapping[str, Any]) -> Decision:
    """The decision that `as_dict` was taken of, as far as later ones look back at it."""
    names = ("kind", "exit_code", "rank", "evidence", "only_lost")
    first = Failure(told["host"], **{name: told[name] for name in names})
    head = (told["again"], told["reason"], told["wait_s"], told["attempt"])
    return Decision(*head, first, told["step"], tuple(told["excludes"]), _pair(told.get("nodes")))


def _pair(found: Sequence[int] | None) -> tuple[int, int] | None:
    return None if found is None else (found[0], found[1])


def wait_of(policy: RetryPolicy, run_id: str, restarts: int) -> float:
    """Seconds before a restart: initial x factor^restarts, at most max, less a random part of `jitter`.

    Chance comes from the run and the number, so that all nodes of a run wait alike and different runs do not.

    >>> wait_of(RetryPolicy(jitter=0.0), "r1", 0), wait_of(RetryPolicy(jitter=0.0), "r1", 3)
    (1.0, 8.0)
    """
    if min(policy.initial_s, policy.max_s) <= 0:
        return 0.0
    grown = math.log(policy.initial_s) + restarts * math.log(policy.factor)  # as logarithms: nothing overflows
    wait_s = policy.max_s if grown >= math.log(policy.max_s) else math.exp(grown)
    digest = hashlib.sha256(f"{run_id}/{restarts}".encode()).digest()
    chance = int.from_bytes(digest[:4], "big") / 2**32
    return round(wait_s * (1 - policy.jitter * chance), 3)


def decide(
    policy: RetryPolicy,
    history: Sequence[Decision],
    failures: Iterable[Failure],
    *,
    run_id: str,
    max_restarts: int,
    hang_stops: bool = False,
) -> Decision:
    """Whether ranks start again after an attempt that failed.

    Args:
        policy: of the run.
        history: decisions before, oldest first, all to start again.
        failures: of this attempt, one per node that told; at least one.
        run_id: of the run.
        max_restarts: of all ranks together.
        hang_stops: whether a hang ends the run, whatever the lists say.
    """
    known, done = list(failures), len(history)
    first = min(known, key=lambda each: (not each.kind, each.only_lost, each.time_unix_s, each.node))
    step = max((each.step for each in known if each.step is not None), default=None)
    why = _impossible(known) or (spent(max_restarts) if done >= max_restarts else None)
    if why is None and hang_stops and first.kind == "hang":
        why = "failure.hang.action is dump_and_stop"
    why = why or unwanted(policy, first) or _stuck(policy, history, step)
    if why is not None:
        return Decision(False, why, 0.0, done, first, step, leaving=any(each.leaving for each in known))
    words = f"{_named(first)} is worth a restart; {max_restarts - done - 1} left after it"
    excludes = dict.fromkeys((*_lost(known), *_worn_out(policy, history, first), *_sick(policy, known)))
    return Decision(True, words, wait_of(policy, run_id, done), done, first, step, tuple(excludes))


def _impossible(known: Sequence[Failure]) -> str | None:
    """Why ranks cannot start again, whatever it was that failed."""
    if any(each.leaving for each in known):
        return "a node is about to be taken away"
    if any(each.done for each in known):
        return "the ranks of another node have ended already"
    return None


def _lost(known: Sequence[Failure]) -> list[str]:
    return [each.node for each in known if each.lost]


def _sick(policy: RetryPolicy, known: Sequence[Failure]) -> list[str]:
    """Nodes whose machine was seen to be at fault; one is enough where nodes may be left out at all."""
    return [each.node for each in known if each.sick and policy.exclude_after is not None]


def _worn_out(policy: RetryPolicy, history: Sequence[Decision], first: Failure) -> tuple[str, ...]:
    """The node of a failure, where its machine was at fault often enough; one that only lost a peer was not."""
    if policy.exclude_after is None or first.lost or not _faulty(first):
        return ()
    faults = 1 + sum(each.failure.node == first.node and _faulty(each.failure) for each in history)
    return (first.node,) if faults >= policy.exclude_after else ()


def _faulty(failure: Failure) -> bool:
    return failure.kind == "node" and not failure.only_lost


def _stuck(policy: RetryPolicy, history: Sequence[Decision], step: int | None) -> str | None:
    """Why a further restart would be as useless as the last ones."""
    count = _without_progress(history, step)
    if policy.stop_after_no_progress is None or count < policy.stop_after_no_progress:
        return None
    best = max((each.step for each in history if each.step is not None), default=None)
    seen = "no step was seen to be done" if best is None else f"none came further than step {best}"
    return f"{count} {'restart' if count == 1 else 'restarts'} in a row made no progress: {seen}"


def spent(max_restarts: int) -> str:
    """Why there is no further restart.

    >>> spent(1), spent(3)
    ('the only restart is used', 'all 3 restarts are used')
    """
    return "the only restart is used" if max_restarts == 1 else f"all {max_restarts} restarts are used"


def unwanted(policy: RetryPolicy, first: Failure) -> str | None:
    """Why a failure is not worth a restart; a number outweighs a kind, and what is in both lists is not retried."""
    number = f"exit:{first.exit_code}"
    for name in (number, first.kind or "exit"):
        if name in policy.no_retry_on:
            return f"{name} is in failure.no_retry_on{_proof(first)}"
        if name in policy.retry_on:
            return None
    return f"{_named(first)} is not in failure.retry_on{_proof(first)}"


def _proof(first: Failure) -> str:
    return f" ({first.evidence})" if first.evidence else ""


def _named(first: Failure) -> str:
    return f"exit:{first.exit_code}" if first.kind in ("exit", "") else first.kind


def _without_progress(history: Sequence[Decision], step: int | None) -> int:
    """How many of the newest restarts came no further than all attempts before them."""
    steps = [-1 if each is None else each for each in (*(each.step for each in history), step)]
    count = 0
    while count < len(history) and steps[-1 - count] <= max(steps[: len(history) - count]):
        count += 1
    return count
