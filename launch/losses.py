"""Nodes that went without a word, and nodes that a run went on without."""

import json
import signal
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meshwright.clusters.retry import Decision
from meshwright.launch.exits import Exit
from meshwright.launch.rundir import EXCLUDED_FILE

__all__ = ["Losses"]


@dataclass
class Losses:
    """What is known of them.

    Args:
        codes: node -> exit status of an agent of this start that died without a last word.
        unplaced: those of them that may be all right: it is not known where the fault was.
        sick: node -> the first fault that was seen of its machine.
        causes: node of those -> exit code and words of a cluster that knows more.
        since_unix_s: when the first of them was missed.
        until_unix_s: from when on nothing of them can be there any more, even if only their connection is gone.
        excluded: nodes that the run went on without: who, why, after which attempt and step, when, and when it took
            them back, where it did.
    """

    codes: dict[str, int] = field(default_factory=dict)
    causes: dict[str, tuple[int, str]] = field(default_factory=dict)
    unplaced: set[str] = field(default_factory=set)
    sick: dict[str, str] = field(default_factory=dict)
    since_unix_s: float = 0.0
    until_unix_s: float = 0.0
    excluded: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, run_dir: Path) -> "Losses":
        """Nothing lost yet, and what the directory of a run tells of before."""
        try:
            return cls(excluded=json.loads((run_dir / EXCLUDED_FILE).read_text()))
        except (OSError, ValueError):
            return cls()

    def take(self, event: Mapping[str, Any], now_unix_s: float) -> None:
        """An agent is gone."""
        node = event["node"]
        self.since_unix_s = self.since_unix_s or now_unix_s
        self.until_unix_s = max(self.until_unix_s, now_unix_s + event.get("ends_within_s", 0.0))
        self.codes[node] = event["code"]
        if not event.get("lost", True):
            self.unplaced.add(node)
        if "message" in event:
            self.causes[node] = (event["exit_code"], event["message"])

    def cause_of(self, node: str) -> tuple[int, str]:
        """Exit code and words of one of them."""
        died = f"the agent of {node} died ({_status(self.codes[node])}); its ranks were ended"
        return self.causes.get(node, (int(Exit.UNAVAILABLE), died))

    @property
    def out(self) -> tuple[str, ...]:
        """Nodes that the run goes on without now."""
        return tuple(each["node"] for each in self.excluded if "back_unix_s" not in each)

    @property
    def may_return(self) -> tuple[str, ...]:
        """Those of them that were only lost, and only once: a machine at fault stays out."""
        often = [each["node"] for each in self.excluded]
        lost = {each["node"] for each in self.excluded if each["lost"]}
        return tuple(node for node in self.out if node in lost and often.count(node) == 1)

    def take_back(self, nodes: Collection[str], now_unix_s: float) -> None:
        """The run goes on with nodes that it went on without."""
        for each in self.excluded:
            if each["node"] in nodes and "back_unix_s" not in each:
                each["back_unix_s"] = now_unix_s

    def exclude(self, decision: Decision, now_unix_s: float) -> None:
        """The run goes on without the nodes of a decision."""
        for node in decision.excludes:
            seen = self.sick.get(node, decision.failure.evidence)
            why = self.cause_of(node)[1] if node in self.codes else seen
            told = {"node": node, "why": why, "attempt": decision.attempt, "step": decision.step}
            self.excluded.append({**told, "lost": node in self.codes, "time_unix_s": self.since_unix_s or now_unix_s})
        self.codes, self.causes, self.unplaced, self.since_unix_s = {}, {}, set(), 0.0


def _status(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit code {status}"
