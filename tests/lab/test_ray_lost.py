"""Nodes of a real Ray cluster are lost, and a run goes on with others, or says why there are none."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshwright.clusters.sweep import carriers
from tests.lab.launches import Launch, finish
from tests.lab.test_ray import started
from tests.launch.own import own
from tests.launch.waiting import eventually

PROGRAM = """
import os, pathlib, time
rank, attempt, host = (os.environ[name] for name in ("RANK", "MESHWRIGHT_ATTEMPT", "MESHWRIGHT_HOST"))
print("attempt", attempt, "on", host, flush=True)
part = pathlib.Path(f".up-{attempt}-{rank}")
part.write_text(f"{os.getpid()} {host}")
part.rename(f"up-{attempt}-{rank}")
time.sleep(600 if attempt == "0" else 0)
"""
LOST_S = 150  # Ray finds a node lost after 15 s or so, and ranks that may still be there have half a minute


class Cluster:
    """A Ray cluster whose nodes can be killed.

    Args:
        address: of its head.
        processes: of the head and the others.
    """

    def __init__(self, address: str, processes: "list[subprocess.Popen[bytes]]") -> None:
        self.address, self.processes = address, processes

    def kill_node_of(self, pid: int) -> bool:
        """Kills the node that a process runs on; the head is left alone. Tells whether it did."""
        known = {each.pid: each for each in self.processes[1:]}
        while pid > 1 and pid not in known:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        if pid in known:
            for each in _below(pid):
                os.kill(each, signal.SIGKILL)
        return pid in known


def _below(pid: int) -> list[int]:
    """A process and all that it started, but for what took a session of its own, such as agents."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    words = Path(f"/proc/{pid}/cmdline").read_bytes()
    return [] if b"clusters.agent" in words else [pid, *(each for child in children for each in _below(int(child)))]


@pytest.fixture(params=[3, 2])
def ray(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Of three nodes, or two."""
    processes: list[subprocess.Popen[bytes]] = []
    with started(tmp_path_factory, request.param, processes) as address:
        yield Cluster(address, processes)


def test_a_node_that_is_lost_is_left_out_and_the_run_goes_on_or_says_why_not(tmp_path: Path, ray: Cluster) -> None:
    spare = len(ray.processes) > 2
    cluster = {"type": "ray", "address": ray.address, "ready_timeout": "30s"}
    far = Launch(tmp_path / "run", {"far": cluster}, own(f"ray-lost-{len(ray.processes)}"))
    job = {"name": "j", "command": [sys.executable, "-c", PROGRAM], "nodes": 2, "nproc_per_node": 1, "cluster": "far"}
    job["failure"] = {"max_restarts": 2, "backoff": {"initial": "100ms"}, "shutdown_grace": "2s"}
    (far.folder / "job.yaml").write_text(json.dumps(job))
    launcher = far.start(far.folder / "job.yaml")
    try:
        assert eventually(lambda: len(list(far.folder.glob("up-0-*"))) == 2 or launcher.poll() is not None, 150)
        pids = {}
        for rank in range(2):
            pid, _, name = (far.folder / f"up-0-{rank}").read_text().partition(" ")
            pids[name] = int(pid)
        lost = next(name for name, pid in pids.items() if ray.kill_node_of(pid))
        output, _ = launcher.communicate(timeout=LOST_S + 60)
    finally:
        finish(launcher)
    told = far.record()
    assert f"on other nodes than {lost}" in output
    assert not list(carriers(far.run_id))
    if spare:
        assert launcher.returncode == 0, output
        assert [(each["kind"], each["excludes"]) for each in told["restarts"]] == [("node", [lost])], output
        assert [each["node"] for each in told["excluded"]] == [lost]
        assert [f"attempt 1 on {lost}" in output, output.count("| attempt 1 on ")] == [False, 2]
    else:
        assert launcher.returncode == 69, output
        assert [told["restarts"], told["excluded"]] == [[], []], output
        assert f"{lost} at " in told["reason"]
        assert "; not started again: Ray did not place 2 nodes with {CPU: 1} within 30 s" in told["reason"]
        assert f"left out: {lost}" in told["reason"]
