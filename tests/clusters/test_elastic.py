"""A node whose ranks hang starts them again or not, as the plan says, with nobody telling it to."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from meshwright.clusters.base import Limits, Program, StartRequest
from meshwright.clusters.local import LocalCluster, Machine, plan_local
from meshwright.clusters.pipes import PipeHandle
from meshwright.clusters.sweep import carriers
from tests.launch.own import own

pytestmark = pytest.mark.slow


def started(folder: Path, name: str, script: str, limits: Limits) -> PipeHandle:
    """The agent of a rank that runs a script."""
    for each in ("logs", "private", "ranks"):
        (folder / each).mkdir()
    program = Program((sys.executable, "-c", script), folder)
    request = StartRequest(name="j", run_id=own(name), run_dir=folder, program=program, limits=limits)
    return LocalCluster().start(plan_local(request, Machine("box", 1)), {})


def followed(folder: Path, name: str, code: int, limits: Limits) -> list[dict[str, Any]]:
    """What the agent of a rank that ends with a code says."""
    handle = started(folder, name, f"raise SystemExit({code})", limits)
    events = []
    try:
        while not handle.done:
            events += handle.poll(1.0)
    finally:
        handle.kill()
    return events


@pytest.mark.parametrize(("action", "starts"), [("dump_and_restart", 2), ("dump_and_stop", 1)])
def test_ranks_that_hang_are_started_again_only_if_asked(tmp_path: Path, action: str, starts: int) -> None:
    limits = Limits(max_restarts=1, hang_s=9.0, hang_action=action)
    events = followed(tmp_path, f"hang-{action}", 125, limits)
    assert [event["event"] for event in events].count("started") == starts


def test_a_run_that_may_grow_leaves_its_next_start_to_the_launcher(tmp_path: Path) -> None:
    events = followed(tmp_path, "regroup", 3, Limits(max_restarts=1, regroup=True))
    assert [event["event"] for event in events].count("started") == 1
    assert [event["again"] for event in events if event["event"] == "decided"] == [True]
    assert [event["state"] for event in events if event["event"] == "result"] == ["stopped"]


def test_an_agent_that_a_shutdown_ends_says_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    handle = started(tmp_path, "shutdown", "import time; time.sleep(600)", Limits(max_restarts=1))
    events: list[dict[str, Any]] = []
    try:
        while not any(event["event"] == "started" for event in events):
            events += handle.poll(1.0)
        (rank,) = events[-1]["pids"].values()
        agent = int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(agent, signal.SIGTERM)
        while not handle.done:
            events += handle.poll(1.0)
        assert list(carriers(own("shutdown"))) == []
    finally:
        handle.kill()
    assert [event for event in events if event["event"] in ("result", "decided")] == []
    assert (events[-1]["event"], events[-1]["code"]) == ("gone", 143), "it counts as lost"
