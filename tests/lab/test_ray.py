"""Runs on a real Ray cluster of two nodes, which this test starts and ends by their processes."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from meshwright.clusters.network import bind_free, interfaces
from meshwright.clusters.sweep import carriers
from tests.lab.launches import QUICKSTART, Launch, finish, losses, write_job
from tests.launch.aside import SLEEP, check_left_alone
from tests.launch.own import own
from tests.launch.waiting import eventually

ONE_FAILS = """
import os, pathlib, sys, time
rank = os.environ["RANK"]
print("rank", rank, "of", os.environ["WORLD_SIZE"], "on node", os.environ["GROUP_RANK"], flush=True)
pathlib.Path(f"up-{rank}").touch()
while rank == "3" and len(list(pathlib.Path(".").glob("up-*"))) < 4:
    time.sleep(0.1)
sys.exit(7) if rank == "3" else time.sleep(120)
"""


HOLDS_AND_ENDS = """
import sys
from collections import Counter
from pathlib import Path
from meshwright.clusters.base import Program, StartRequest
from meshwright.clusters.ray import RayCluster, RayOptions
from ray.util import placement_group_table
folder, run_id = Path.cwd(), sys.argv[2]
for name in ("job.json", "job.yaml"):
    (folder / name).write_text("{}")
for name in ("logs", "errors", "ranks", "private"):
    (folder / name).mkdir()
program = Program(("sleep", "600"), folder, inherit=("*",))
cluster = RayCluster(RayOptions(sys.argv[1]))
plan = cluster.plan(StartRequest("j", run_id, folder, program, 2, 1))
cluster.check(plan)
handle = cluster.start(plan, {})
held = Counter(each["state"] for each in placement_group_table().values())
handle.poll(5.0)
handle.kill()
left = Counter(each["state"] for each in placement_group_table().values())
print(held["CREATED"], left["CREATED"], held["REMOVED"] - left["REMOVED"])
"""


LEAVES_OUT = """
import json, sys
from pathlib import Path
from meshwright.clusters.base import Program, StartRequest
from meshwright.clusters.ray import RayCluster, RayOptions
from meshwright.clusters.reaching import Visit
def names(count, *exclude):
    request = StartRequest("j", "r", Path.cwd(), Program(("true",), Path.cwd()), count, 1)
    with RayCluster(RayOptions(sys.argv[1], exclude=exclude)).reached(request, Visit()) as found:
        return [each.name for each in found.reaches]
both = names(2)
print(json.dumps([both, *(names(1, each) for each in both for _ in range(3))]))
"""


LIGHT = {
    **{f"RAY_health_check_{key}": value for key, value in (("initial_delay_ms", "500"), ("period_ms", "500"))},
    "RAY_prestart_worker_first_driver": "0",
    "OMP_NUM_THREADS": "1",
}
"""Variables of Ray's nodes: a lost one is missed within seconds, and no worker is started before it is wanted."""
START = ("start", "--block", "--disable-usage-stats", "--include-log-monitor=false")
"""Words of Ray's command; nobody reads what a log monitor would send."""


def join(folders: pytest.TempPathFactory, address: str, *words: str) -> "subprocess.Popen[bytes]":
    """A node of two CPUs that is up.

    Args:
        folders: for its log.
        address: of this machine.
        words: for `ray start`.
    """
    ray = [str(Path(sys.executable).with_name("ray")), *START, "--num-cpus=2"]
    log, env = folders.mktemp("ray") / "log", {**os.environ, **LIGHT}
    ray.append(f"--node-ip-address={address}")
    with log.open("wb") as file:
        node = subprocess.Popen([*ray, *words], stdout=file, stderr=file, start_new_session=True, env=env)
    if not eventually(lambda: "Ray runtime started" in log.read_text(), 120):
        end(node)
        raise AssertionError(f"Ray does not start: {log.read_text()[-500:]}")
    return node


def end(node: "subprocess.Popen[bytes]") -> None:
    node.terminate()
    node.wait(60)


@contextmanager
def started(
    folders: pytest.TempPathFactory, number: int, processes: "list[subprocess.Popen[bytes]] | None" = None
) -> Iterator[str]:
    """The address of so many nodes of two CPUs; `--block` keeps their processes below ours, so they end with us.

    Args:
        folders: for their logs.
        number: of nodes.
        processes: takes one of each.
    """
    pytest.importorskip("ray", reason="pip install 'meshwright[ray]'")
    addresses = [each for each in interfaces().values() if not each.startswith("127.")]
    if not addresses:
        pytest.skip("this machine has no address besides loopback")
    with bind_free(addresses[0], None, (26379, 26479)) as free:
        port = free.getsockname()[1]
    folder = Path(tempfile.gettempdir()) / f"mw-ray-{os.getpid()}-{number}"  # Ray's sockets need a short path
    head = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}"]
    nodes: list[subprocess.Popen[bytes]] = [] if processes is None else processes
    try:
        for words in (head, *[[f"--address={addresses[0]}:{port}"]] * (number - 1)):
            nodes.append(join(folders, addresses[0], *words))
        yield f"{addresses[0]}:{port}"
    finally:
        for node in reversed(nodes):
            end(node)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of two nodes."""
    with started(tmp_path_factory, 2) as found:
        yield found


def _launch(folder: Path, address: str, *words: str) -> Any:
    command = json.dumps([sys.executable, "-c", ONE_FAILS])
    cluster = f'{{type: ray, address: "{address}", nodes: 2}}'
    keys = f"nproc_per_node: 2\nfailure: {{shutdown_grace: 2s}}\ncluster: {cluster}\n"
    (folder / "job.yaml").write_text(f"name: j\ncommand: {command}\n{keys}")
    argv = [sys.executable, "-m", "meshwright.launch.cli", "launch", "job.yaml", "--run-id", own("ray"), *words]
    return subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def test_the_quickstart_trains_on_ray_as_it_does_here(tmp_path: Path, address: str, here: list[Any]) -> None:
    far = Launch(tmp_path, {"far": {"type": "ray", "address": address, "nodes": 2}}, own("ray-quickstart"))
    launcher = far.start(*QUICKSTART, "--set", "cluster=far")  # Ray looks for its own processes on this machine
    try:
        output, _ = launcher.communicate(timeout=400)
    finally:
        finish(launcher)
    assert launcher.returncode == 0, output
    assert losses(far.folder / "runs/quickstart" / far.run_id) == here
    assert "asks for no token" in output, "an open cluster is warned about"


def test_a_failing_rank_ends_all_nodes_with_its_code(tmp_path: Path, address: str) -> None:
    done = _launch(tmp_path, address)
    assert done.returncode == 7, done.stderr
    said = dict(re.findall(r"^(\S+):\d \| rank (\d of 4 on node \d)$", done.stdout, re.MULTILINE))
    for rank in range(4):
        assert re.search(rf"^[0-9.]+-[0-9a-f]{{8}}:{rank} \| rank {rank} of 4 on node {rank // 2}$", done.stdout, re.M)
    assert len(said) == 2, "two nodes have two names"
    assert re.search(r"first failure: rank 3 on [0-9.]+-[0-9a-f]{8}:", done.stderr)
    assert list(carriers(own("ray"))) == []


def test_a_run_on_ray_is_left_alone_and_found_again(tmp_path: Path, address: str) -> None:
    far = Launch(tmp_path, {"far": {"type": "ray", "address": address, "nodes": 2}}, own("ray-alone"))
    job = write_job(far.folder, SLEEP, cluster="far", nproc_per_node=1, failure={"shutdown_grace": "2s"})
    check_left_alone(far.run_dir, far.env, str(job), ranks=2)


def test_what_a_run_held_is_given_back_before_its_launcher_ends(tmp_path: Path, address: str) -> None:
    words = [sys.executable, "-c", HOLDS_AND_ENDS, address, own("ray-held")]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.split() == ["1", "0", "-1"], done.stderr


def test_a_node_that_is_left_out_is_not_used_though_it_is_there(tmp_path: Path, address: str) -> None:
    words = [sys.executable, "-c", LEAVES_OUT, address]
    found = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert found.returncode == 0, found.stderr
    both, *others = json.loads(found.stdout)
    assert len(set(both)) == 2
    assert others == [[both[1]]] * 3 + [[both[0]]] * 3, "neither by chance nor by turns"
    cluster = {"type": "ray", "address": address, "nodes": 1, "exclude": [both[0]]}
    far = Launch(tmp_path / "run", {"far": cluster}, own("ray-without"))
    done = far.start(write_job(far.folder, "pass", cluster="far", nproc_per_node=1))
    output, _ = done.communicate(timeout=200)
    assert done.returncode == 0, output
    assert [path.name[6:-4] for path in (far.run_dir / "logs").glob("agent-*.log")] == [both[1]], "as a run calls it"


def test_what_the_cluster_can_never_give_is_refused_with_the_reason_and_who_could_come_in_is_asked_of_itself(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # the launcher's variables say nothing of the cluster
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t" * 40)
    done = _launch(tmp_path, address, "--set", "cluster.cpus_per_node=64")
    assert done.returncode == 69
    assert "asked for 2 nodes with {CPU: 64}; of 2 nodes 0 has that much: {CPU: 2}, {CPU: 2}" in done.stderr
    assert "asks for no token" in done.stderr


def test_a_cluster_that_asks_for_a_token_is_not_warned_about_and_says_so_to_who_has_none(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t" * 40)
    with started(tmp_path_factory, 1) as guarded:
        done = _launch(tmp_path, guarded, "--set", "cluster.cpus_per_node=64")
        assert "asked for 2 nodes with {CPU: 64}" in done.stderr
        assert "token" not in done.stderr
        monkeypatch.setenv("RAY_AUTH_TOKEN", "u" * 40)
        done = _launch(tmp_path, guarded)
    assert done.returncode == 69
    assert f"the Ray cluster at '{guarded}' asks for a token; set RAY_AUTH_MODE=token" in done.stderr


def test_no_cluster_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="pip install 'meshwright[ray]'")
    done = _launch(tmp_path, "127.0.0.1:1")
    assert done.returncode == 69
    assert "no Ray cluster at '127.0.0.1:1'" in done.stderr
