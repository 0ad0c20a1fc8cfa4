"""Restarts are told as they come, once, without secrets."""

from meshwright.launch.restarts import RestartLines, restarts_of, why_given_up
from meshwright.launch.supervise import RunState
from tests.launch.test_supervise import end, plan

TOLD = {"kind": "signal", "rank": 1, "host": "node1", "exit_code": 137, "evidence": "killed by hunter22", "step": 3}
AGAIN = {**TOLD, "event": "decided", "node": "node1", "attempt": 0, "again": True, "reason": "1 left", "wait_s": 1.25}


def test_a_restart_is_said_once_while_it_is_waited_for() -> None:
    said: list[str] = []
    show, state = RestartLines(lambda text: text.replace("hunter22", "***"), said.append), RunState(plan(2))
    show(state)
    state.observe(end("node1", 1, -9))
    state.observe(AGAIN)
    show(state)
    show(state)
    assert said == [
        "meshwright: attempt 0: signal at step 3: rank 1 on node1: killed by ***; starting again in 1.25 s: 1 left"
    ]


def test_a_restart_that_never_came_is_none() -> None:
    state = RunState(plan(2))
    state.observe(end("node1", 1, -9))
    state.observe(AGAIN)
    assert restarts_of(state) == ()
    assert why_given_up(state) is None


def test_a_run_that_may_not_restart_or_did_not_fail_was_not_given_up() -> None:
    bare = RunState(plan(0))
    bare.observe(end("node1", 1, -9))
    well = RunState(plan(1))
    well.observe(end("node1", 1, 0, attempt=1))
    assert why_given_up(bare) is why_given_up(well) is None
