"""Examines nodes: starts a probe on each, asks them all, and gathers what they say. The one place that does.

Every question goes to all nodes at once, and a node that does not answer in time is left out of the next ones: a sick
driver that blocks whoever asks it costs one timeout, not one per question.
"""

import secrets
import selectors
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from types import TracebackType
from typing import Any

from meshwright.clusters.descriptors import need_room
from meshwright.clusters.evidence import Clock, Dial, Endpoint, Evidence, Reduced, Wishes
from meshwright.clusters.health_network import expected_bandwidth
from meshwright.clusters.inventory import NodeFacts, facts_from
from meshwright.clusters.reaching import Line, Reached
from meshwright.clusters.reduction import Reduction, planned_reduction

__all__ = ["examine"]

_CLOCK_SAMPLES = 5
_DIAL_TIMEOUT_S = 5.0
_MANY_PAIRS = 16


class _Lines:
    """All probes; ends them when it is left."""

    def __init__(self, reached: Reached) -> None:
        self.reaches = reached.reaches
        need_room(3 * len(self.reaches), f"{len(self.reaches)} nodes")
        self._lines: dict[str, Line] = {}
        self.silent: dict[str, str] = {}
        for reach in self.reaches:
            try:
                self._lines[reach.name] = reached.open_line(reach)
            except OSError as error:
                self.silent[reach.name] = f"{reach.argv[0]}: {error.strerror}"

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for line in self._lines.values():
            line.close()
        for line in self._lines.values():
            line.end()

    @property
    def talking(self) -> list[str]:
        """Nodes that have answered everything so far."""
        return [name for name in self._lines if name not in self.silent]

    def ask(self, questions: Mapping[str, Mapping[str, Any]], timeout_s: float) -> dict[str, dict[str, Any]]:
        """Asks nodes and waits for their answers; who does not answer is silent from now on."""
        waiting = {node for node in questions if node not in self.silent}
        for node in waiting:
            self._lines[node].ask(questions[node])
        answers: dict[str, dict[str, Any]] = {}
        deadline_s = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            for node in waiting:
                selector.register(self._lines[node], selectors.EVENT_READ, node)
            while waiting and (left_s := deadline_s - time.monotonic()) > 0:
                for key, _ in selector.select(left_s):
                    if self._take(key.data, answers):
                        selector.unregister(key.fileobj)
                        self._done(key.data, waiting, answers)
        for node in waiting:
            said = self._lines[node].complaint()
            why = f"no answer to {questions[node]['ask']!r} within {timeout_s:g} s"
            self.silent[node] = f"{why} ({said})" if said else why
        return answers

    def _done(self, node: str, waiting: set[str], answers: Mapping[str, Mapping[str, Any]]) -> None:
        """What one node could not do, the others need not wait for."""
        waiting.discard(node)
        if node in self.silent or answers[node].get("errors"):
            for other in waiting:
                self._lines[other].ask({"ask": "stop"})

    def _take(self, node: str, answers: dict[str, dict[str, Any]]) -> bool:
        """Reads what a node says; tells whether that is the end of its answer."""
        told = self._lines[node].read()
        if told is None:
            self.silent[node] = self._lines[node].why_gone()
            return True
        for each in told:
            if each.get("event") == "error":
                self.silent[node] = f"{each['ask']}: {each['message']}"
            else:
                answers[node] = each
        return bool(told)


def examine(reached: Reached, wishes: Wishes) -> Evidence:
    """Asks all nodes what a job's wishes make worth knowing.

    Raises:
        UnavailableError: when they are too many for this process.
    """
    reaches = reached.reaches
    with _Lines(reached) as lines:
        clocks = _clocks(lines, wishes)
        facts = _facts(lines, wishes)
        found: dict[str, Any] = {"facts": facts, "clocks": clocks}
        if {"ports", "allreduce"} & set(wishes.checks):
            found |= _meetings(lines, wishes)
        evidence = Evidence(reaches, dict(lines.silent), **found)
        if "allreduce" in wishes.checks and len(facts) == len(reaches):
            evidence = _reduced(lines, wishes, evidence)
        return evidence


def _clocks(lines: _Lines, wishes: Wishes) -> dict[str, Clock]:
    """One node after the other, since an exchange is the more exact the less else there is to do."""
    lines.ask({node: {"ask": "clock"} for node in lines.talking}, wishes.timeout_s)  # the first waits for the start
    found = {}
    for node in lines.talking:
        samples = []
        for _ in range(_CLOCK_SAMPLES):
            before_s = time.time()
            answer = lines.ask({node: {"ask": "clock"}}, wishes.timeout_s).get(node)
            after_s = time.time()
            if answer is None:
                break
            samples.append(Clock(answer["time_unix_s"] - (before_s + after_s) / 2, (after_s - before_s) / 2))
        if samples:
            found[node] = min(samples, key=lambda sample: sample.unsure_s)
    return found


def _facts(lines: _Lines, wishes: Wishes) -> dict[str, NodeFacts]:
    question = {"ask": "facts", "directories": wishes.directories, "write_bytes": wishes.write_bytes}
    found = {}
    for node, answer in lines.ask(dict.fromkeys(lines.talking, question), wishes.timeout_s).items():
        try:
            found[node] = facts_from(answer["facts"])
        except ValueError as error:
            lines.silent[node] = f"its answer is not that of this version of meshwright: {error}"
    return {node: found[node] for node in lines.talking if node in found}


def _meetings(lines: _Lines, wishes: Wishes) -> dict[str, Any]:
    """Every node listens, then every node dials all others (itself, where it is alone)."""
    tokens = {node: secrets.token_hex(16) for node in lines.talking}
    single = wishes.ports is not None and wishes.ports[0] == wishes.ports[1]  # that of rank 0, so of the first node
    question = {"ask": "listen", "interface": wishes.interface}
    heard = lines.ask(
        {
            node: {**question, "token": token, "ports": None if single and index else wishes.ports}
            for index, (node, token) in enumerate(tokens.items())
        },
        wishes.timeout_s,
    )
    here = all(line.by == "here" for line in lines.reaches)
    listening = {node: _endpoints(heard[node]["listening"], loopback_first=here) for node in tokens if node in heard}
    questions = {}
    for node in listening:
        others = [other for other in listening if other != node] or [node]
        targets = [_target(other, each, tokens[other]) for other in others for each in listening[other]]
        questions[node] = {"ask": "dial", "timeout_s": _DIAL_TIMEOUT_S, "targets": targets}
    answers = lines.ask(questions, wishes.timeout_s)
    dials = [_dial(node, each) for node, answer in answers.items() for each in answer["dialled"]]
    deaf = {node: tuple(answer["errors"]) for node, answer in heard.items()}
    return {"listening": listening, "deaf": deaf, "dials": tuple(dials)}


def _endpoints(told: Sequence[Mapping[str, Any]], *, loopback_first: bool) -> tuple[Endpoint, ...]:
    """In the order in which they are tried; ranks of one machine meet on loopback."""
    found = [Endpoint(each["interface"], each["address"], each["port"]) for each in told]
    return (
        tuple(sorted(found, key=lambda each: not each.address.startswith("127."))) if loopback_first else tuple(found)
    )


def _target(node: str, endpoint: Endpoint, token: str) -> dict[str, Any]:
    words = {"interface": endpoint.interface, "address": endpoint.address, "port": endpoint.port}
    return {"node": node, "token": token, **words}


def _dial(source: str, told: Mapping[str, Any]) -> Dial:
    endpoint = Endpoint(told["interface"], told["address"], told["port"])
    return Dial(source, told["node"], endpoint, told.get("seconds"), told.get("error"))


def _reduced(lines: _Lines, wishes: Wishes, evidence: Evidence) -> Evidence:
    """The all-reduce of all nodes; where it is slow or fails, that of each two, to find out whose fault it is."""
    plan = planned_reduction(evidence, wishes, evidence.nodes)
    if plan is None:
        return evidence
    reduced = _run(lines, wishes, plan)
    expected = expected_bandwidth(evidence, wishes, reduced)
    speed = reduced.bus_bytes_per_s
    evidence = replace(evidence, reduced=reduced, silent=dict(lines.silent))
    if speed is not None and (expected is None or speed >= expected.bytes_per_s):
        return evidence
    pairs = []
    for pair in list(combinations(evidence.nodes, 2))[:_MANY_PAIRS] if len(evidence.nodes) > 2 else ():
        plan = planned_reduction(evidence, wishes, pair)
        if plan is not None:
            pairs.append(_run(lines, wishes, plan))
    return replace(evidence, pairs=tuple(pairs), silent=dict(lines.silent))


def _run(lines: _Lines, wishes: Wishes, plan: Reduction) -> Reduced:
    questions = plan.questions(wishes.timeout_s)
    answers = lines.ask(questions, wishes.timeout_s + 10.0)
    errors = [f"{node}: {each}" for node, answer in answers.items() for each in answer["errors"]]
    errors += [f"{node}: {lines.silent[node]}" for node in questions if node not in answers]
    result = next((answer["result"] for answer in answers.values() if answer["result"]), None)
    speed = result["bus_bytes_per_s"] if result and not errors else None
    why = None if speed is not None else "; ".join(list(dict.fromkeys(errors))[:3]) or "it printed no result"
    return Reduced(plan.nodes, plan.backend, plan.num_ranks, plan.num_bytes, speed, why)
