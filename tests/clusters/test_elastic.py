"""A node whose ranks hang starts them again or not, as the plan says, with nobody telling it to."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from meshwright.clusters.base import Limits, Meeting, Program, StartRequest
from meshwright.clusters.deaths import Deaths
from meshwright.clusters.elastic import NodeAgent
from meshwright.clusters.imports import IMPORTS
from meshwright.clusters.local import LocalCluster, Machine, plan_local
from meshwright.clusters.pipes import PipeHandle
from meshwright.clusters.retry import RetryPolicy
from meshwright.clusters.sweep import carriers
from meshwright.clusters.watching import Watch
from tests.launch.own import own

pytestmark = pytest.mark.slow


def started(folder: Path, name: str, script: str, limits: Limits, *, program: Any = None, **more: Any) -> PipeHandle:
    """The agent of a rank that runs a script, or what else a program is given."""
    for each in ("logs", "private", "ranks"):
        (folder / each).mkdir()
    program = replace(Program((sys.executable, "-c", script), folder), **(program or {}))
    request = StartRequest(name="j", run_id=own(name), run_dir=folder, program=program, limits=limits, **more)
    return LocalCluster().start(plan_local(request, Machine("box", 1)), {})


def followed(folder: Path, name: str, code: int, limits: Limits) -> list[dict[str, Any]]:
    """What the agent of a rank that ends with a code says."""
    return heard(started(folder, name, f"raise SystemExit({code})", limits))


def heard(handle: PipeHandle) -> list[dict[str, Any]]:
    """All that is said until the end."""
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


LISTENERS = """
import os
from pathlib import Path
import torch.distributed as dist
dist.init_process_group("gloo")
tables = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
listening = {words[9]: words[1] for words in tables if words[3] == "0A"}
for pid in (os.getppid(), os.getpid()):
    for each in os.listdir(f"/proc/{pid}/fd"):
        try:
            held = os.readlink(f"/proc/{pid}/fd/{each}")
        except OSError:
            continue
        if held[8:-1] in listening:
            print("listens", listening[held[8:-1]], flush=True)
dist.barrier()
dist.destroy_process_group()
raise SystemExit(7 if os.environ["MESHWRIGHT_ATTEMPT"] == "0" else 0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells it elsewhere")
@pytest.mark.parametrize("fixed", [False, True], ids=["any port", "a port of the job"])
def test_agents_and_ranks_of_one_machine_listen_on_loopback_only_also_when_they_start_again(
    tmp_path: Path, fixed: bool
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1] if fixed else None
    limits = Limits(max_restarts=1, retry=RetryPolicy(initial_s=0.1))
    more: dict[str, Any] = {"ranks_per_node": 2, "meeting": Meeting(port=port)}
    events = heard(started(tmp_path, f"loopback-{fixed}", LISTENERS, limits, **more))
    assert [event["state"] for event in events if event["event"] == "result"] == ["succeeded"]
    for name in ("rank-0.log", "rank-1.log", "rank-0.attempt-1.log", "rank-1.attempt-1.log"):
        words = [line.split()[1] for line in (tmp_path / "logs" / name).read_text().splitlines() if "listens" in line]
        assert {word.partition(":")[0] for word in words} == {"0100007F"}, words
        assert port is None or f"0100007F:{port:04X}" in words


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
    handle = started(tmp_path, "driver", "", Limits(max_restarts=1, watch=Watch(interval_s=0.1)), program=more)
    try:
        events = ended(handle)
    finally:
        handle.kill()
    assert [event["event"] for event in events] == ["joined", "started", "exit", "result", "gone"]
    assert events[3]["state"] == "succeeded"
    (log,) = tmp_path.glob("logs/agent-*.log")
    assert "ranks are executed, not forked: NVML has not answered for 5 s" in log.read_text()


def test_what_a_setup_that_failed_had_started_is_ended_on_its_node(tmp_path: Path) -> None:
    handle = started(tmp_path, "setup", "", Limits(), program={"setup": "sleep 600 & disown; exit 3"})
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


def test_every_node_counts_while_its_ranks_run_and_a_restart_goes_on_with_its_file(tmp_path: Path) -> None:
    wait = (
        "import json, os, time\n"
        "from pathlib import Path\n"
        f"wanted, nodes = 1 + int(os.environ['MESHWRIGHT_ATTEMPT']), Path({str(tmp_path)!r}, 'nodes')\n"
        "while [len(each.read_text().splitlines()) >= wanted for each in nodes.glob('*.jsonl')] != [True, True]:\n"
        "    time.sleep(0.1)\n"
        "raise SystemExit(wanted == 1)\n"
    )
    limits = Limits(max_restarts=1, retry=RetryPolicy(initial_s=0.1))
    events = heard(started(tmp_path, "counted", wait, limits, num_nodes=2))
    assert [event["state"] for event in events if event["event"] == "result"] == ["succeeded", "succeeded"]
    files = sorted((tmp_path / "nodes").iterdir())
    assert len(files) == 2
    for path in files:
        assert {json.loads(line)["node"] for line in path.read_text().splitlines()} == {path.stem}
