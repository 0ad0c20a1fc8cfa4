"""A run is followed to its end; what cannot succeed any more is ended everywhere."""

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from meshwright.clusters.base import Limits, Program, StartPlan, StartRequest
from meshwright.clusters.blame import Blame, Verdict, judge
from meshwright.clusters.local import Machine, plan_local
from meshwright.launch.report import outcome_of
from meshwright.launch.supervise import Interrupts, RunState, supervise


class FakeHandle:
    """Agents that say what a test wants, then are gone."""

    def __init__(self, *events: dict[str, Any]) -> None:
        self._events = list(events)
        self.calls: list[str] = []

    @property
    def done(self) -> bool:
        return not self._events

    def poll(self, timeout_s: float) -> list[dict[str, Any]]:
        return [self._events.pop(0)] if self._events else []

    def stop(self) -> None:
        self.calls.append("stop")

    def kill(self) -> None:
        self.calls.append("kill")


def plan(max_restarts: int = 0) -> StartPlan:
    program = Program(("true",), Path("/"))
    request = StartRequest("j", "r1", Path("/r1"), program, num_nodes=2, limits=Limits(max_restarts))
    return plan_local(request, Machine("box", 2))


def end(node: str, rank: int, code: int, *, attempt: int = 0, asked: bool = False) -> dict[str, Any]:
    at = {"attempt": attempt, "time_unix_s": 10.0 + attempt, "ended_by_us": asked}
    return {"event": "exit", "node": node, "rank": rank, "code": code, **at}


def result(node: str, state: str, message: str = "") -> dict[str, Any]:
    return {"event": "result", "node": node, "state": state, "message": message}


def gone(node: str, code: int = 0) -> dict[str, Any]:
    return {"event": "gone", "node": node, "code": code}


def follow(*events: dict[str, Any], max_restarts: int = 0) -> tuple[RunState, FakeHandle]:
    state, handle = RunState(plan(max_restarts)), FakeHandle(*events)
    supervise(handle, state, Interrupts())
    return state, handle


def test_a_success_is_not_stopped_but_swept() -> None:
    events = [end(f"node{rank}", rank, 0) for rank in (0, 1)]
    state, handle = follow(*events, result("node0", "succeeded"), result("node1", "succeeded"), gone("node0"))
    assert handle.calls == ["kill"]
    assert outcome_of(state, Verdict(None), [], times_s=(0, 1)).exit_code == 0


def test_a_failure_ends_the_other_nodes_once() -> None:
    _, handle = follow(end("node0", 0, 7), result("node0", "failed"), result("node1", "stopped"))
    assert handle.calls == ["stop", "kill"]


def test_a_failure_with_restarts_left_ends_nothing() -> None:
    state, handle = follow(end("node0", 0, 7), end("node0", 0, 0, attempt=1), max_restarts=1)
    assert handle.calls == ["kill"]
    assert [state.ends[0].code, state.attempt] == [0, 1]


def test_late_news_of_an_earlier_attempt_are_ignored() -> None:
    state, _ = follow(end("node0", 0, 0, attempt=1), end("node1", 1, 7, attempt=0), max_restarts=1)
    assert set(state.ends) == {0}


@pytest.mark.parametrize(
    ("event", "code", "words"),
    [
        (result("node1", "setup_failed", "exit code 3"), 70, "setup failed on node1: exit code 3"),
        (result("node1", "rendezvous_failed", "timeout"), 76, "did not meet"),
        (result("node1", "error", "KeyError"), 70, "KeyError"),
        (gone("node1", -9), 69, "the agent of node1 died (SIGKILL)"),
    ],
)
def test_a_node_that_fails_without_a_rank_has_its_own_code(event: dict[str, Any], code: int, words: str) -> None:
    state, handle = follow(event, gone("node0"))
    found = outcome_of(state, Verdict(None), [], times_s=(0, 1))
    assert (found.exit_code, found.state) == (code, "failed")
    assert words in str(found)
    assert handle.calls[0] == "stop"


@pytest.mark.parametrize("state", ["rendezvous_failed", "error"])
def test_an_agent_that_misses_those_who_went_before_it_is_a_victim(state: str) -> None:
    found, _ = follow(gone("node1", -9), result("node0", state, "the store is gone"))
    assert outcome_of(found, Verdict(None), [], times_s=(0, 1)).exit_code == 69
    found, _ = follow(result("node0", state, "first"), result("node1", state, "then"))
    assert "node0: first" in outcome_of(found, Verdict(None), [], times_s=(0, 1)).reason


@pytest.mark.parametrize("code", [1, -15])
def test_a_lost_node_outweighs_ranks_that_it_took_along(code: int) -> None:
    last = "RuntimeError: Connection closed by peer" if code > 0 else ""
    told = {**gone("node1", 255), "exit_code": 77, "message": "host node1: its key is unknown"}
    state, _ = follow(end("node0", 0, code), told)
    traceback = f"Traceback (most recent call last):\n{last}" if last else ""
    verdict = judge(state.ends.values(), tails={0: traceback})
    found = outcome_of(state, verdict, [], times_s=(0, 1))
    assert (found.exit_code, found.reason) == (77, "host node1: its key is unknown")
    own = judge(state.ends.values(), tails={0: "Traceback (most recent call last):\nKeyError: 'a'"})
    if code > 0:
        assert outcome_of(state, own, [], times_s=(0, 1)).exit_code == 1


def test_a_run_that_its_agents_gave_up_says_why_and_what_its_restarts_cost() -> None:
    told = {"kind": "exit", "rank": 0, "host": "node0", "exit_code": 7, "evidence": "exited with code 7", "step": None}
    again = {**told, "event": "decided", "attempt": 0, "again": True, "reason": "2 left", "wait_s": 2.0}
    given_up = {**told, "event": "decided", "attempt": 1, "again": False, "reason": "no progress", "wait_s": 0.0}
    started = {"event": "started", "node": "node0", "attempt": 1, "pids": {}, "time_unix_s": 13.5}
    events = [end("node0", 0, 7), {**again, "node": "node0"}, {**again, "node": "node1"}, started]
    events += [end("node0", 0, 7, attempt=1), {**given_up, "node": "node0"}, result("node0", "failed")]
    state, _ = follow(*events, max_restarts=3)
    found = outcome_of(state, judge(state.ends.values()), [], times_s=(0, 20))
    assert found.reason == "rank 0 on node0 failed first; not started again: no progress"
    record = found.as_dict()
    assert (record["lost_s"], record["given_up"], len(record["restarts"])) == (3.5, "no progress", 1)
    assert record["restarts"][0] == {key: again[key] for key in again if key != "event"} | {
        "cause": "rank 0 on node0: exited with code 7",
        "down_s": 3.5,
        "next_attempt": 1,
        "time_unix_s": 13.5,
    }
    assert "--- attempt 0: exit: rank 0 on node0: exited with code 7; started again after a wait of 2 s" in str(found)


def test_a_run_without_a_restart_left_says_so() -> None:
    state, _ = follow(end("node0", 0, 7), end("node0", 0, 7, attempt=1), result("node0", "failed"), max_restarts=1)
    found = outcome_of(state, judge(state.ends.values()), [], times_s=(0, 1))
    assert found.reason.endswith("not started again: the only restart is used")
    bare, _ = follow(end("node0", 0, 7), result("node0", "failed"))
    assert outcome_of(bare, judge(bare.ends.values()), [], times_s=(0, 1)).given_up is None


def test_nodes_that_do_not_share_the_run_directory_are_noted() -> None:
    joined = [{"event": "joined", "node": f"node{index}", "shared": index == 0} for index in (0, 1)]
    state, _ = follow(*joined)
    assert state.apart == ["node1"]


def test_a_signal_to_the_launcher_outweighs_what_it_caused() -> None:
    state = RunState(plan())
    blame = Blame(0, "node0", 7, None, "exited with code 7", "")
    found = outcome_of(state, Verdict(blame), [signal.SIGINT], times_s=(0, 1))
    assert (found.exit_code, found.state) == (130, "interrupted")


def test_the_first_signal_stops_and_the_second_kills() -> None:
    interrupts, handle = Interrupts(), FakeHandle(*(gone("node0") for _ in range(10)))
    interrupts.numbers.append(signal.SIGTERM)

    def again(state: RunState) -> None:
        if handle.calls == ["stop"]:
            interrupts.numbers.append(signal.SIGTERM)

    supervise(handle, RunState(plan()), interrupts, watchers=[again])
    assert handle.calls == ["stop", "kill"]
    assert not handle.done, "nobody waited for the rest"


def test_whatever_happens_no_rank_stays() -> None:
    def broken(state: RunState) -> None:
        raise RuntimeError("disk full")

    handle = FakeHandle(gone("node0"))
    with pytest.raises(RuntimeError, match="disk full"):
        supervise(handle, RunState(plan()), Interrupts(), watchers=[broken])
    assert handle.calls == ["kill"]


@pytest.mark.parametrize(("off_s", "word"), [(120.0, "ahead of"), (-3600.0, "behind"), (2.0, ""), (-2.0, "")])
def test_a_clock_that_shows_what_cannot_be_is_named(off_s: float, word: str) -> None:
    told = {"event": "started", "node": "node1", "attempt": 0, "pids": {}, "time_unix_s": time.time() + off_s}
    state = RunState(plan())
    supervise(FakeHandle(told, result("node0", "succeeded"), result("node1", "succeeded")), state, Interrupts())
    found = [(each["node"], each["found"], each["fault"]) for each in state.health]
    words = f"its clock is {abs(off_s):.0f} s {word} this machine's, or more; set it by NTP"
    assert found == ([("node1", words, None)] if word else [])
    assert state.losses.sick == {}, "no reason to go on without it"


def test_nodes_are_called_by_what_their_cluster_chose() -> None:
    placed = {"event": "placed", "node": "node1", "name": "10.0.0.2-6f1c"}
    state, _ = follow(placed, end("10.0.0.2-6f1c", 0, 0), gone("10.0.0.2-6f1c"), max_restarts=1)
    assert [node.name for node in state.plan.nodes] == ["node0", "10.0.0.2-6f1c"]
    assert list(state.losses.codes) == ["10.0.0.2-6f1c"]


def test_a_node_that_its_cluster_gave_another_for_is_kept_with_why() -> None:
    told = {"node": "gpu9", "why": "disk: full", "attempt": -1, "step": None, "lost": False, "time_unix_s": 1.0}
    state, _ = follow({"event": "left_out", **told})
    assert state.losses.excluded == [told]
    assert state.losses.out == ("gpu9",)
