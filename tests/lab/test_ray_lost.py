"""Nodes of a real Ray cluster are lost, and a run goes on with others, or an elastic one with fewer.

First comes the test that loses none, so that few nodes have to be started anew.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meshwright.clusters.sweep import carriers
from tests.lab.launches import SHRINKING, SHRINKING_STEPS, Launch, finish, losses, write_training
from tests.lab.test_ray import join, started
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
FAILS_ONCE = """
import os, pathlib, sys, time
rank, attempt, host = (os.environ[name] for name in ("RANK", "MESHWRIGHT_ATTEMPT", "MESHWRIGHT_HOST"))
print("attempt", attempt, "on", host, flush=True)
pathlib.Path(f"up-{attempt}-{rank}").touch()
while attempt == "0" and len(list(pathlib.Path(".").glob("up-0-*"))) < 2:
    time.sleep(0.1)
sys.exit(7 if attempt == "0" and rank == "1" else 0) if attempt == "1" or rank == "1" else time.sleep(600)
"""
HOLDS_ONE = """
import pathlib, sys, time
import ray
from ray.util.placement_group import placement_group
ray.init(address=sys.argv[1], log_to_driver=False)
assert placement_group([{"CPU": 2}]).wait(60)
pathlib.Path(sys.argv[2]).touch()
time.sleep(600)
"""
LOST_S = 150  # Ray finds a node lost after some seconds, and ranks that may still be there have half a minute


class Cluster:
    """A Ray cluster whose nodes can be killed.

    Args:
        address: of its head.
        processes: of the head and the others.
        folders: for logs of more.
    """

    def __init__(
        self, address: str, processes: "list[subprocess.Popen[bytes]]", folders: pytest.TempPathFactory
    ) -> None:
        self.address, self.processes, self._folders = address, processes, folders

    def grow(self, number: int) -> None:
        """Starts nodes until there are so many."""
        while sum(node.poll() is None for node in self.processes) < number:
            host = self.address.partition(":")[0]
            self.processes.append(join(self._folders, host, f"--address={self.address}"))

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


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    processes: list[subprocess.Popen[bytes]] = []
    with started(tmp_path_factory, 1, processes) as address:
        yield Cluster(address, processes, tmp_path_factory)


def test_a_run_that_starts_again_keeps_its_nodes_while_it_asks_for_one_that_another_has(
    tmp_path: Path, ray: Cluster
) -> None:
    ray.grow(3)
    cluster = {"type": "ray", "address": ray.address, "cpus_per_node": 2, "ready_timeout": "20s"}
    far = Launch(tmp_path / "run", {"far": cluster}, own("ray-more"))
    job = {"name": "j", "command": [sys.executable, "-c", FAILS_ONCE], "nproc_per_node": 1, "cluster": "far"}
    job |= {"nodes": {"min": 1, "max": 3}, "failure": {"max_restarts": 1, "backoff": {"initial": "100ms"}}}
    (far.folder / "job.yaml").write_text(json.dumps(job))
    other = subprocess.Popen([sys.executable, "-c", HOLDS_ONE, ray.address, str(tmp_path / "held")])
    try:
        assert eventually((tmp_path / "held").exists, 120)
        launcher = far.start(far.folder / "job.yaml")
        try:
            output, _ = launcher.communicate(timeout=300)
        finally:
            finish(launcher)
    finally:
        other.kill()
        other.wait()
    assert launcher.returncode == 0, output
    assert "Ray did not place 3 nodes with {CPU: 2} within 20 s" in output
    assert output.count("Ray did not place 1 nodes with {CPU: 2} besides the 2 it has within 10 s") == 1, output
    assert output.count("| attempt 1 on ") == 2
    assert not list(carriers(far.run_id))


def test_a_node_that_is_lost_is_left_out_and_the_run_goes_on_with_another(tmp_path: Path, ray: Cluster) -> None:
    ray.grow(3)
    cluster = {"type": "ray", "address": ray.address, "ready_timeout": "30s"}
    far = Launch(tmp_path / "run", {"far": cluster}, own("ray-lost"))
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
    assert launcher.returncode == 0, output
    assert [(each["kind"], each["excludes"]) for each in told["restarts"]] == [("node", [lost])], output
    assert [each["node"] for each in told["excluded"]] == [lost]
    assert [f"attempt 1 on {lost}" in output, output.count("| attempt 1 on ")] == [False, 2]


def test_an_elastic_training_takes_the_nodes_there_are_and_goes_on_without_one_that_is_lost(
    tmp_path: Path, ray: Cluster, calm: list[Any]
) -> None:
    sets = (*SHRINKING, "parallel.dp=3")
    ray.grow(2)  # the node that another test lost is known to be, and those it leaves are used
    far = Launch(tmp_path / "run", {"far": {"type": "ray", "address": ray.address}}, own("ray-fewer"))
    job = write_training(far.folder, steps=SHRINKING_STEPS, every=5, pause_s=0.1)
    run_dir = far.folder / "runs" / far.run_id
    more = ("cluster=far", "nodes={min: 1, max: 3}", "failure.max_restarts=2", "failure.backoff.initial=100ms")
    launcher = far.start(job, *(word for each in (*sets, *more) for word in ("--set", each)))
    try:
        saved = far.folder / "checkpoints"
        assert eventually(lambda: any(saved.glob("step-*")) or launcher.poll() is not None, 150)
        names = [node["name"] for node in json.loads((run_dir / "plan.json").read_text())["nodes"]]
        lost = next(names[rank] for rank, pid in enumerate(ranks(far.run_id)) if ray.kill_node_of(pid))
        output, _ = launcher.communicate(timeout=LOST_S + 60)
    finally:
        finish(launcher)
    assert launcher.returncode == 0, output
    assert not list(carriers(far.run_id))
    assert "ranks start on 2 of at most 3 nodes, as many as ray has for them (dp=2, num_microbatches=2)" in output
    assert f"it shrinks from 2 nodes to 1, without {lost} (one rank, num_microbatches=3)" in output
    told, now = (json.loads((run_dir / name).read_text()) for name in ("exit.json", "job.json"))
    assert [(each["nodes"], each["excludes"]) for each in told["restarts"]] == [([2, 1], [lost])]
    assert (now["nodes"], now["parallel"]["dp"], now["parallel"]["num_microbatches"]) == (1, 1, 3)
    assert "resumed from " in (run_dir / "logs/rank-0.attempt-1.log").read_text()
    found = losses(run_dir)
    assert [each[:2] for each in found] == [each[:2] for each in calm], "every step once"
    assert all(abs(one[2] - other[2]) < 1e-6 for one, other in zip(found, calm, strict=True))


def ranks(run_id: str) -> list[int]:
    """Process ids of the ranks of a run, by rank."""
    found = {}
    for pid in carriers(run_id):
        variables = dict(word.partition(b"=")[::2] for word in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
        if b"RANK" in variables:
            found[int(variables[b"RANK"])] = pid
    return [pid for _, pid in sorted(found.items())]
