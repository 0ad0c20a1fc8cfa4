"""Runs on a real Ray cluster of two nodes, which this test starts and ends by their processes."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meshwright.clusters.network import bind_free, interfaces
from meshwright.clusters.sweep import carriers
from tests.lab.launches import QUICKSTART, Launch, finish, losses
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


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two nodes of two CPUs each; `--block` keeps a node's processes below ours, so that they end with it."""
    pytest.importorskip("ray", reason="pip install 'meshwright[ray]'")
    addresses = [each for each in interfaces().values() if not each.startswith("127.")]
    if not addresses:
        pytest.skip("this machine has no address besides loopback")
    with bind_free(addresses[0], None, (26379, 26479)) as free:
        port = free.getsockname()[1]
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=2", "--disable-usage-stats"]
    ray.append(f"--node-ip-address={addresses[0]}")
    folder = Path(tempfile.gettempdir()) / f"mw-ray-{os.getpid()}"  # Ray's sockets need a short path
    head = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}"]
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        for words in (head, [f"--address={addresses[0]}:{port}"]):
            log = tmp_path_factory.mktemp("ray") / "log"
            with log.open("wb") as file:
                nodes.append(subprocess.Popen([*ray, *words], stdout=file, stderr=file, start_new_session=True))
            if not eventually(lambda: "Ray runtime started" in log.read_text(), 120):  # noqa: B023
                pytest.skip(f"THE LAB IS NOT RUN: Ray does not start: {log.read_text()[-500:]}")
        yield f"{addresses[0]}:{port}"
    finally:
        for node in reversed(nodes):
            node.terminate()
            node.wait(60)


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
    for rank in range(4):
        assert f"node{rank // 2}:{rank} | rank {rank} of 4 on node {rank // 2}" in done.stdout
    assert "first failure: rank 3 on node1" in done.stderr
    assert list(carriers(own("ray"))) == []


def test_what_the_cluster_can_never_give_is_refused_with_the_reason(tmp_path: Path, address: str) -> None:
    done = _launch(tmp_path, address, "--set", "cluster.cpus_per_node=64")
    assert done.returncode == 69
    assert "asked for 2 nodes with {CPU: 64}; of 2 nodes 0 has that much: {CPU: 2}, {CPU: 2}" in done.stderr


def test_no_cluster_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="pip install 'meshwright[ray]'")
    done = _launch(tmp_path, "127.0.0.1:1")
    assert done.returncode == 69
    assert "no Ray cluster at '127.0.0.1:1'" in done.stderr
