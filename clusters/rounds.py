"""One node's part in what follows a failure: it hears of it, tells what it knows, and takes the decision that stands.

    a rank fails -> the node calls -> all nodes end their ranks and tell -> the first decision that is written stands

All goes through the store of the attempt's nodes, so it works without a launcher; what a node writes there has a mac
of the run's key (`keyed`), and what others write is as if it were not there. A node alone decides alone.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from meshwright.clusters.base import log_name
from meshwright.clusters.blame import RankEnd, judge
from meshwright.clusters.deaths import Death
from meshwright.clusters.failure import Failure, failure_of
from meshwright.clusters.records import error_records, hang_record, last_words, log_end, newest_step
from meshwright.clusters.retry import Decision, decide, decision_from, policy_from
from meshwright.parallel.keyed import Keyed

__all__ = ["Rounds", "seen"]

_LOOK_S = 0.05
_LATE_S = 5.0
_CALLED = "meshwright/failed"
_DECIDED = "meshwright/decided"
_TRIES = 10
_SICK = 78  # of a doctor who found a node unfit


class _Talk:
    """What nodes of one attempt write and read.

    Args:
        store: of them.
        keyed: of the attempt.
    """

    def __init__(self, store: Any, keyed: Keyed) -> None:
        self._store, self._keyed = store, keyed

    def write(self, name: str, text: str) -> None:
        """Replaces a text; a store that is gone went with its node, which ends the run."""
        with suppress(Exception):
            self._store.set(name, self._keyed.signed(name, text))

    def read(self, name: str) -> str | None:
        """What a node of this run wrote; None where none did."""
        with suppress(Exception):
            return self._keyed.opened(name, self._store.get(name)) if self._store.check([name]) else None
        return None

    def has(self, name: str) -> bool:
        """Whether a node of this run wrote something."""
        return self.read(name) is not None

    def settle(self, name: str, text: str) -> str:
        """The first text that a node of this run wrote there; what others wrote gives way to this one."""
        mine, stands = self._keyed.signed(name, text), b""
        for _ in range(_TRIES):
            stands = self._store.compare_set(name, stands, mine)
            found = self._keyed.opened(name, stands)
            if found is not None:
                return found
        return text


def seen(run_dir: Path, ends: Sequence[RankEnd], *, attempt: int, since_unix_s: float) -> Failure:
    """What is known of an attempt that failed from what some of its ranks left, but for the step they came to.

    Args:
        run_dir: where they wrote.
        ends: of these ranks; the node is that of the first that failed.
        attempt: from 0.
        since_unix_s: when it began.
    """
    records = error_records(run_dir, since_unix_s)
    tails = {end.rank: log_end(run_dir / log_name(end.rank, attempt)) for end in ends}
    hang, last = hang_record(run_dir, since_unix_s), last_words(run_dir, attempt)
    verdict = judge(ends, records, tails, hang=hang, last=last)
    first = verdict.first
    times_s = {end.rank: end.time_unix_s for end in ends} | {each.rank: each.time_unix_s for each in records.values()}
    return failure_of(
        "" if first is None else first.host, verdict, time_unix_s=0.0 if first is None else times_s[first.rank]
    )


class Rounds:
    """Attempts of a run, as one node sees them.

    Args:
        plan: of the run, as a dictionary.
        node: index of this node.
        stopped: whether the run is being ended, so that nothing is waited for.
        sick: what is wrong with this machine and since when, as far as it was seen while ranks ran.
        mask: replaces secrets in what other nodes are told.
        key: of the run.
    """

    def __init__(
        self,
        plan: Mapping[str, Any],
        node: int,
        stopped: Callable[[], bool] = lambda: False,
        *,
        sick: Callable[[], tuple[str, float] | None] = lambda: None,
        mask: Callable[[str], str] = str,
        key: bytes = b"",
    ) -> None:
        self._plan, self._node, self._stopped, self._sick = plan, node, stopped, sick
        self._mask, self._key = mask, key
        self._talk = _Talk(None, Keyed(key, ""))
        self._name: str = plan["nodes"][node]["name"]
        self._limits: Mapping[str, Any] = plan["limits"]
        self._began_s = self._attempt_s = time.time()
        self.history: list[Decision] = [decision_from(each) for each in self._limits["past"]]

    def begin(self, store: Any, attempt: int) -> None:
        """A new attempt starts.

        Args:
            store: of its nodes.
            attempt: from 0.
        """
        self._attempt_s = time.time()
        self._talk = _Talk(store, Keyed(self._key, f"{self._plan['run_id']}, attempt {attempt}"))
        while len(self.history) < attempt:  # this node started again without having heard why
            self.history.append(Decision(True, "", 0.0, len(self.history), Failure("")))

    @property
    def left(self) -> int:
        """Restarts that are left."""
        return int(self._limits["max_restarts"]) - len(self.history)

    @property
    def called(self) -> bool:
        """Whether a node has said that a rank of this attempt failed, after which ranks may start again."""
        return self._shared and self._talk.has(_CALLED)

    def call(self) -> None:
        """Says that a rank of this node failed."""
        if self._shared:
            self._talk.write(_CALLED, "1")

    def leave(self) -> None:
        """Says that all ranks of this node have succeeded."""
        if self._shared:
            self._tell(Failure(self._name, done=True))

    def decide(self, deaths: Sequence[Death], *, leaving: bool = False) -> Decision:
        """What follows, alike on all nodes; call it once the ranks of this node have ended.

        Args:
            deaths: of this node's ranks.
            leaving: whether the node is about to be taken away.
        """
        own = replace(_with_machine(self._look(deaths), self._sick()), leaving=leaving)
        own = replace(own, evidence=self._mask(own.evidence))
        decision = self._agreed(own) if self._shared else self._decide([own])
        self.history.append(decision)
        return decision

    @property
    def _shared(self) -> bool:
        return len(self._plan["nodes"]) > 1 and self.left > 0

    def _look(self, deaths: Sequence[Death]) -> Failure:
        """What this node knows of the attempt."""
        ends = [RankEnd(host=self._name, **asdict(each)) for each in deaths]
        found = seen(Path(self._plan["run_dir"]), ends, attempt=len(self.history), since_unix_s=self._attempt_s)
        return replace(found, node=self._name, step=newest_step(Path(self._plan["run_dir"]), self._began_s))

    def _decide(self, failures: Sequence[Failure]) -> Decision:
        return decide(
            policy_from(self._limits["retry"]),
            self.history,
            failures,
            run_id=self._plan["run_id"],
            max_restarts=self._limits["max_restarts"],
            hang_stops=self._limits["hang_s"] is not None and self._limits["hang_action"] == "dump_and_stop",
        )

    def _agreed(self, own: Failure) -> Decision:
        """The decision that stands: of whom was first to hear all nodes, or to be tired of waiting."""
        self._tell(own)
        end_s = time.monotonic() + self._limits["shutdown_grace_s"] + _LATE_S
        others = [node["index"] for node in self._plan["nodes"] if node["index"] != self._node]
        while not self._stopped() and time.monotonic() < end_s and not self._talk.has(_DECIDED):
            if all(self._talk.has(_key(other)) for other in others):
                break
            time.sleep(_LOOK_S)
        mine = self._decide([own, *(told for other in others if (told := self._heard(_key(other))) is not None)])
        with suppress(Exception):  # the node that keeps the store may be gone, having decided
            return decision_from(json.loads(self._talk.settle(_DECIDED, json.dumps(mine.as_saved()))))
        return mine

    def _tell(self, failure: Failure) -> None:
        self._talk.write(_key(self._node), json.dumps(asdict(failure)))

    def _heard(self, key: str) -> Failure | None:
        text = self._talk.read(key)
        with suppress(TypeError, ValueError):  # of another version
            return None if text is None else Failure(**json.loads(text))
        return None


def _key(node: int) -> str:
    return f"meshwright/failure/{node}"


def _with_machine(found: Failure, fault: tuple[str, float] | None) -> Failure:
    """With what was seen of a node's machine, which is a failure where none of its ranks had one."""
    if fault is None:
        return found
    words, time_unix_s = fault
    if found.kind:
        return replace(found, sick=words)
    return replace(found, sick=words, kind="node", exit_code=_SICK, evidence=words, time_unix_s=time_unix_s)
