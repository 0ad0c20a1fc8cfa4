"""Restarts are told as they come, once, without secrets."""

import json
from pathlib import Path

import pytest

from meshwright.launch.restarts import RestartLines, restarts_of, why_given_up
from meshwright.launch.supervise import RunState
from tests.launch.test_supervise import end, plan
from tests.launch.worker.runs import finish, run_dir, write_job

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


DEADLY = """

import os

_plain, _calls = Tiny.forward, []


def _forward(self, *args, **kwargs):
    _calls.append(1)
    if len(_calls) == 9 and os.environ["RANK"] == "1" and os.environ["MESHWRIGHT_ATTEMPT"] == "0":
        os.kill(os.getpid(), 9)
    return _plain(self, *args, **kwargs)


Tiny.forward = _forward
"""


@pytest.mark.slow
def test_a_training_whose_rank_was_killed_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    job = write_job(tmp_path, steps=12, every=3)
    model = tmp_path / "tiny.py"
    model.write_text(model.read_text() + DEADLY)
    sets = ("failure.max_restarts=5", "failure.stop_after_no_progress=1", "failure.backoff.initial=100ms")
    code, output = finish(job, "r1", *sets)
    assert code == 0, output
    told = json.loads((run_dir(job, "r1") / "exit.json").read_text())
    assert [(each["kind"], each["rank"], each["step"] >= 3) for each in told["restarts"]] == [("signal", 1, True)]
    assert told["lost_s"] > 0.05
    assert "resumed from " in (run_dir(job, "r1") / "logs/rank-0.attempt-1.log").read_text()
