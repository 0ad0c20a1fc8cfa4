"""A node whose ranks hang starts them again or not, as the plan says, with nobody telling it to."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from meshwright.clusters.base import Limits, Program, StartRequest
from meshwright.clusters.deaths import Deaths
from meshwright.clusters.elastic import NodeAgent
from meshwright.clusters.imports import IMPORTS
from meshwright.clusters.local import LocalCluster, Machine, plan_local
from meshwright.clusters.pipes import PipeHandle
from meshwright.clusters.sweep import carriers
from meshwright.clusters.watching import Watch
from tests.launch.own import own

pytestmark = pytest.mark.slow


def started(folder: Path, name: str, script: str, limits: Limits, **more: Any) -> PipeHandle:
    """The agent of a rank that runs a script, or what else a program is given."""
    for each in ("logs", "private", "ranks"):
        (folder / each).mkdir()
    program = replace(Program((sys.executable, "-c", script), folder), **more)
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


def ended(handle: PipeHandle) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    end_s = time.monotonic() + 120
    while not handle.done and time.monotonic() < end_s:
        events += handle.poll(1.0)
    return events


def test_a_driver_that_hangs_keeps_no_rank_from_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "library").mkdir()
    (tmp_path / "library/pynvml.py").write_text("import time\ndef nvmlInit():\n    time.sleep(600)\n")
    (tmp_path / "rank.py").write_text("print('a rank')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "library"), *sys.path]))
    argv, env = (sys.executable, "-u", "-m", "rank"), ((IMPORTS, "json"),)
    more = {"argv": argv, "env": env, "inherit": ("*",)}
    handle = started(tmp_path, "driver", "", Limits(max_restarts=1, watch=Watch(interval_s=0.1)), **more)
    try:
        events = ended(handle)
    finally:
        handle.kill()
    assert [event["event"] for event in events] == ["joined", "started", "exit", "result", "gone"]
    assert events[3]["state"] == "succeeded"
    (log,) = tmp_path.glob("logs/agent-*.log")
    assert "ranks are executed, not forked: NVML has not answered for 5 s" in log.read_text()


def test_what_a_setup_that_failed_had_started_is_ended_on_its_node(tmp_path: Path) -> None:
    handle = started(tmp_path, "setup", "", Limits(), setup="sleep 600 & disown; exit 3")
    try:
        events = ended(handle)
        assert [event["state"] for event in events if event["event"] == "result"] == ["setup_failed"]
        assert list(carriers(own("setup"))) == []
    finally:
        handle.kill()


def test_ranks_that_were_reaped_are_not_signalled_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = subprocess.Popen(["sleep", "600"], start_new_session=True)
    agent = NodeAgent.__new__(NodeAgent)  # as between two attempts, while it waits for other nodes
    agent.deaths = Deaths({0: rank.pid}, lambda death: None)
    agent._limits, agent._sweep = {"shutdown_grace_s": 5.0}, lambda: 0
    monkeypatch.setattr(LocalElasticAgent, "_shutdown", lambda *_: rank.wait())
    agent._shutdown()
    hit: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda pid, number: hit.append(pid))
    agent.end_ranks()
    agent.kill_ranks()
    assert (rank.returncode, hit) == (-signal.SIGTERM, [])
