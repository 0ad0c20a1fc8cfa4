"""The program of one pod: its node's launcher, which starts the agent, prints what ranks write, and ends as they do.

It is told by variables: MESHWRIGHT_PLAN and MESHWRIGHT_FILES (JSON), MESHWRIGHT_KEY, the values of secrets, and
JOB_COMPLETION_INDEX, which Kubernetes gives to the pods of an indexed job; by MESHWRIGHT_RESTARTS, how often pods were
started again; by words, the signal that asks ranks to save and how long that may take. Pods meet at the first one,
whose name the plan has and whose port is fixed; a pod that comes before the name is known waits for it. Where the run
may do with fewer nodes, the first pod calls the others there, and those that came in time run their part of the plan.

SIGTERM means that the pod has to go: ranks that heed the signal may save and leave before they are ended.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from meshwright.clusters.deaths import exit_code_of
from meshwright.clusters.errors import RendezvousError
from meshwright.clusters.kubernetes_policy import AGAIN_CODE, AGAIN_CODES, wants
from meshwright.clusters.lost import LOST_CODE
from meshwright.clusters.masking import Concealer, Mask, conceal_while, logs_of
from meshwright.clusters.pod_given import Given, Way, way_of
from meshwright.clusters.pod_lines import Printer, left_of
from meshwright.clusters.pod_past import Journal
from meshwright.clusters.retry import policy_from, spent
from meshwright.clusters.sending import Sender, make_run_dir
from meshwright.clusters.spawn import end_agent, spawn_agent

__all__ = ["code_of", "goes_on", "main"]

_RETRY_S = 0.5
_KEPT = ("started", "exit", "decided", "health", "result")
_CODES = {"setup_failed": 70, "rendezvous_failed": 76, "error": 70, "stopped": 143, "abandoned": 143}
Event = Mapping[str, Any]


def code_of(events: Sequence[Event], status: int) -> int:
    """A pod's exit code from the events of its agent: that of the first rank that failed by itself, else the agent's.

    >>> exits = [{"event": "exit", "rank": 0, "code": -15, "ended_by_us": True, "time_unix_s": 1.0, "attempt": 0}]
    >>> exits += [{"event": "exit", "rank": 1, "code": 7, "ended_by_us": False, "time_unix_s": 2.0, "attempt": 0}]
    >>> code_of([*exits, {"event": "result", "state": "failed", "message": ""}], 0)
    7
    """
    results = [event for event in events if event["event"] == "result"]
    if not results:
        return exit_code_of(status) or 70
    if results[-1]["state"] == "succeeded":
        return 0
    exits = [each for each in events if each["event"] == "exit"]
    newest = max((each["attempt"] for each in exits), default=0)
    own = [each for each in exits if each["code"] and not each["ended_by_us"] and each["attempt"] == newest]
    if own:
        return exit_code_of(min(own, key=lambda each: float(each["time_unix_s"]))["code"])
    return _CODES.get(results[-1]["state"], 1)


def goes_on(events: Sequence[Event], limits: Mapping[str, Any], *, told: bool) -> bool:
    """Whether all pods are to be started again, since this one ended for another reason than that agents gave up.

    Args:
        events: of its agent.
        limits: of the plan.
        told: whether the pod was told to go.
    """
    kinds = {kind: [each for each in events if each["event"] == kind] for kind in ("started", "decided", "result")}
    attempt = max((each["attempt"] for each in kinds["started"]), default=len(limits["past"]))
    if attempt >= limits["max_restarts"]:
        return False
    policy = policy_from(limits["retry"])
    if not kinds["result"]:  # its agent was killed
        return wants(policy, "node")
    decided = [each for each in kinds["decided"] if each["attempt"] == attempt]
    if decided and not decided[0]["leaving"]:
        return bool(decided[0]["again"])  # and then other pods did not come
    succeeded = kinds["result"][0]["state"] == "succeeded"
    return (told or bool(decided)) and not succeeded and wants(policy, "preempt")


class _Line:
    """Our end of the line to the agent.

    Args:
        agent: that was just started.
        saves: name of the signal that asks ranks to save, without SIG.
        lead_s: how long they may take.
    """

    def __init__(self, agent: "subprocess.Popen[bytes]", saves: str, lead_s: float) -> None:
        self._agent, self._saves, self._lead_s = agent, f"SIG{saves}", lead_s
        self._lock, self._ended = threading.Lock(), threading.Event()
        self.told_to_go = False

    def say(self, message: Mapping[str, Any]) -> None:
        """Sends a message; a dead agent is found by its end of output."""
        assert self._agent.stdin is not None, "it was started with a pipe"
        left = memoryview(json.dumps(message).encode() + b"\n")
        with self._lock, suppress(OSError):
            while left:
                left = left[self._agent.stdin.write(left) or 0 :]

    def go(self, number: int, frame: FrameType | None) -> None:
        """Takes the signal by which Kubernetes says that this pod has to go."""
        del number, frame
        if not self.told_to_go:
            self.told_to_go = True
            threading.Thread(target=self._leave, daemon=True).start()

    def _leave(self) -> None:
        """Asks ranks to save and leave until they have, and those that do not in time to end."""
        end_s = time.monotonic() + self._lead_s
        while time.monotonic() < end_s and not self._ended.wait(_RETRY_S):
            self.say({"command": "leave", "signal": self._saves})
        self._stop()

    def _stop(self) -> None:
        if not self._ended.is_set():
            self._ended.set()
            self.say({"command": "stop"})

    def events(self) -> Iterator[dict[str, Any]]:
        """What the agent says, with the time, to its end; where no rank would save, they are ended at once."""
        assert self._agent.stdout is not None, "it was started with a pipe"
        for line in self._agent.stdout:
            event = json.loads(line)
            if event["event"] == "leaving" and not event["ranks"]:
                self._stop()
            yield {"told_unix_s": time.time(), **event}
        self._ended.set()


class _Pod:
    """One pod: its node of the plan, and what it and others had behind them."""

    def __init__(self, words: Sequence[str], given: Given, way: Way) -> None:
        self._words, self._given, self._way = words, given, way
        self.plan, self.key = given.plan, given.key
        self.node, self.run_dir = self.plan["nodes"][given.node], Path(self.plan["run_dir"])
        make_run_dir(self.run_dir, given.files)
        self.secrets = {name: os.environ[name] for name, _ in self.plan["secrets"]}
        self._mask = Mask(self.secrets.values())
        self.journal = Journal(self.run_dir, given.pod, given.times)
        self.past = self.journal.past()
        self.plan["limits"]["past"] = [each.as_saved() for each in self.past]
        printed = {f"logs/{path.name}" for path in self.run_dir.glob("logs/rank-*.log")} if given.times else set()
        self.printer = Printer(self.node["name"], self.node["ranks"], self._mask, printed=printed)

    def run(self) -> int:
        """Runs the node to its end; returns the exit code."""
        if self._given.pods and not self._given.pod:
            self.printer.tell_pods(self._given.pods)
        if self.past:
            self.printer.begin(self.journal.told(self.past), left_of(self.run_dir, self.node["ranks"]))
        if len(self.past) > self.plan["limits"]["max_restarts"]:
            return self._given_up(spent(self.plan["limits"]["max_restarts"]))
        agent = spawn_agent()
        line = _Line(agent, self._words[0], float(self._words[1]))
        signal.signal(signal.SIGTERM, line.go)
        told = {
            "plan": self.plan,
            "node": self._given.node,
            "secrets": self.secrets,
            "key": self.key,
            "lost_after_s": None,
        }
        line.say(told)
        sender = Sender(self.run_dir, self.printer)
        concealer = Concealer(self.run_dir, self.secrets.values(), logs=logs_of(self.node))  # of what stays on a volume
        conceal_while(concealer, threading.Event())
        self._meet(line)
        events = [event for event in line.events() if self._kept(event)]
        status = agent.wait()
        sender.finish()
        concealer.finish()
        end_agent(agent)
        code = code_of(events, status)
        if self._given.comes_again and goes_on(events, self.plan["limits"], told=line.told_to_go):
            self._again(events)
            return self._end(code, events, AGAIN_CODE)
        return self._end(code, events, 1 if code in AGAIN_CODES and self.plan["limits"]["max_restarts"] else code)

    def _given_up(self, why: str) -> int:
        """Ends before anything is started, since ranks and pods together were started too often."""
        self.past = (*self.past[:-1], replace(self.past[-1], again=False, reason=why))
        return self._end(LOST_CODE, [{"event": "result", "state": "stopped", "message": why}])

    def _meet(self, line: _Line) -> None:
        place = self._way.place()
        if place is not None:
            line.say({"command": "meet", "address": place[0], "port": place[1]})

    def _kept(self, event: Event) -> bool:
        self._way.heard(event)
        if event["event"] in _KEPT and event["event"] != "result":
            self.journal.keep(self._mask.inside(event))
        return event["event"] in _KEPT

    def _again(self, events: list[dict[str, Any]]) -> None:
        """Agents ended since a node is about to be taken away; that this is not the end is said in their place."""
        last = next((each for each in reversed(events) if each["event"] == "decided"), None)
        if last is not None and not last["again"]:
            last.update(again=True, reason="a node was about to be taken away; the JobSet starts all pods again")
            self.journal.keep(self._mask.inside(last))

    def _end(self, code: int, events: Sequence[Event], status: int | None = None) -> int:
        told = [*self.journal.told(self.past), *events]
        self.printer.finish(code, told)
        return code if status is None else status


def _uncalled(given: Given, why: str) -> int:
    """Ends the first pod of a run for which not enough others came."""
    printer = Printer(given.plan["nodes"][0]["name"], (), Mask(()))
    printer.tell_pods((given.pod,))
    result = {"told_unix_s": time.time(), "event": "result", "state": "rendezvous_failed", "message": why}
    journal = Journal(Path(given.plan["run_dir"]), given.pod, given.times)
    printer.finish(_CODES["rendezvous_failed"], [*journal.told(journal.past()), result])
    return _CODES["rendezvous_failed"]


def main(words: Sequence[str] = ()) -> int:
    """Runs this pod's node to its end; returns the exit code.

    Args:
        words: the signal by which ranks are asked to save, without SIG, and how long they may take, in seconds.
    """
    given = Given.taken()
    way = way_of(given)
    try:
        part = way.part()
    except RendezvousError as error:
        return _uncalled(given, str(error))
    if part is None:
        return 0
    code = _Pod(words, part, way).run()
    if not code:
        way.leave()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
