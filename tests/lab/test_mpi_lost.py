"""A host that mpiexec loses is left out for another of its file, or the run goes on with fewer, or says why not."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meshwright.clusters.mpi import MpiCluster, MpiOptions
from meshwright.clusters.sweep import carriers
from tests.lab.hosts import Hosts, missing_for_hosts, pretended
from tests.lab.launches import SHRINKING, SHRINKING_STEPS, Launch, finish, losses, write_training
from tests.lab.test_mpi import mpiexec
from tests.launch.own import own
from tests.launch.waiting import eventually

__all__ = ["mpiexec"]

PROGRAM = """
import os, pathlib, time
rank, attempt, host = (os.environ[name] for name in ("RANK", "MESHWRIGHT_ATTEMPT", "MESHWRIGHT_HOST"))
print("attempt", attempt, "on", host, os.uname().nodename, flush=True)
pathlib.Path(f"up-{attempt}-{rank}").touch()
time.sleep(600 if attempt == "0" else 0)
"""


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    lacking = missing_for_hosts()
    if lacking:
        pytest.skip(f"THE LAB IS NOT RUN: {lacking}")
    with pretended(tmp_path_factory.mktemp("mpi") / "lab", 3, token=os.getpid() + 7777) as found:
        yield found


def cluster(lab: Hosts, mpiexec: str, folder: Path, hosts: tuple[str, ...]) -> dict[str, Any]:
    """mpiexec that reaches pretended hosts by ssh."""
    folder.mkdir(parents=True, exist_ok=True)
    ssh = folder / "ssh"
    words = f"-F {lab.folder / 'ssh_config'} -i {lab.key} -o UserKnownHostsFile={lab.known_hosts}"
    ssh.write_text(f'#!/bin/sh\nexec ssh {words} -o BatchMode=yes "$@"\n')
    ssh.chmod(0o755)
    known = {host.name: host.address for host in lab.hosts}
    (folder / "hosts").write_text("".join(f"{known[name]}\n" for name in hosts))
    extra = ["-launcher-exec", str(ssh), "-iface", lab.bridge, "-genv", "UCX_TLS", "tcp,self"]
    if "openmpi" in mpiexec:
        net = f"{lab.net}.0/24"
        extra = ["--mca", "plm_rsh_agent", str(ssh), "--mca", "oob_tcp_if_include", net]
        extra += ["--mca", "btl_tcp_if_include", net, "-x", "PYTHONPATH", "-x", "OMP_NUM_THREADS"]
    return {
        "type": "mpi",
        "mpiexec": mpiexec,
        "hostfile": str(folder / "hosts"),
        "python": sys.executable,
        "extra": extra,
    }


def launched(lab: Hosts, mpiexec: str, folder: Path, hosts: tuple[str, ...]) -> tuple[int, str, dict[str, Any]]:
    """A run of two nodes of which h2 is lost while it goes on."""
    far = Launch(folder, {"far": cluster(lab, mpiexec, folder, hosts)}, own(f"mpi-lost-{len(hosts)}"))
    far.env["PYTHONPATH"] = os.environ["PYTHONPATH"]
    job = {"name": "j", "command": [sys.executable, "-c", PROGRAM], "nodes": 2, "nproc_per_node": 1, "cluster": "far"}
    job["rendezvous"] = {"join_timeout": "20s"}
    job["failure"] = {"max_restarts": 2, "backoff": {"initial": "100ms"}, "shutdown_grace": "2s"}
    (folder / "job.yaml").write_text(json.dumps(job))
    launcher = far.start(folder / "job.yaml", apart=True)
    try:
        up = eventually(lambda: len(list(folder.glob("up-0-*"))) == 2 or launcher.poll() is not None, 120)
        assert up
        next(host for host in lab.hosts if host.name == "h2").end()
        output, _ = launcher.communicate(timeout=120)
    finally:
        finish(launcher)
    assert eventually(lambda: not list(carriers(far.run_id)), 30)
    for host in lab.hosts:
        output = output.replace(host.address, host.name)
    return launcher.returncode, output, far.record()


def test_a_host_that_is_lost_is_left_out_for_another_of_the_file(three: Hosts, tmp_path: Path, mpiexec: str) -> None:
    _up(three)
    code, output, told = launched(three, mpiexec, tmp_path / "run", ("h2", "h1", "h3"))
    assert code == 0, output
    h2 = next(host.address for host in three.hosts if host.name == "h2")
    assert [(each["kind"], each["excludes"]) for each in told["restarts"]] == [("node", [h2])]
    assert [each["node"] for each in told["excluded"]] == [h2]
    assert "h3 in place of h2" in output
    assert {"h1:0 | attempt 1 on h1 h1", "h3:1 | attempt 1 on h3 h3"} <= set(output.splitlines())


@pytest.mark.parametrize("mpiexec", ["mpich"], indirect=True)  # what follows is the launcher's
def test_without_another_host_the_run_ends_and_says_so(three: Hosts, tmp_path: Path, mpiexec: str) -> None:
    _up(three)
    code, output, told = launched(three, mpiexec, tmp_path / "run", ("h1", "h2"))
    assert code == 69, output
    assert "h2 cannot be left out: the job wants 2 nodes, and 1 of the 2 hosts it names are left" in output
    assert "put more into cluster.hostfile" in told["given_up"]


@pytest.mark.parametrize("mpiexec", ["openmpi"], indirect=True)
def test_an_elastic_training_goes_on_with_fewer_hosts_and_one_that_is_there_again_is_found(
    three: Hosts, tmp_path: Path, mpiexec: str, calm: list[Any]
) -> None:
    _up(three)
    sets = (*SHRINKING, "parallel.dp=3")
    folder = tmp_path / "run"
    known = cluster(three, mpiexec, folder, ("h1", "h2", "h3"))
    far = Launch(folder, {"far": known}, own("mpi-fewer"))
    far.env["PYTHONPATH"] = os.environ["PYTHONPATH"]
    job, run_dir = write_training(folder, steps=SHRINKING_STEPS, every=5, pause_s=0.1), folder / "runs" / far.run_id
    more = ("cluster=far", "nodes={min: 2, max: 3}", "failure.max_restarts=3", "failure.backoff.initial=100ms")
    launcher = far.start(job, *(word for each in (*sets, *more) for word in ("--set", each)), apart=True)
    saved, h2 = folder / "checkpoints", next(host for host in three.hosts if host.name == "h2")
    try:
        assert eventually(lambda: any(saved.glob("step-*")) or launcher.poll() is not None, 120)
        h2.end()
        output, _ = launcher.communicate(timeout=120)
    finally:
        finish(launcher)
    assert launcher.returncode == 0, output
    assert eventually(lambda: not list(carriers(far.run_id)), 30)
    told, now = (json.loads((run_dir / name).read_text()) for name in ("exit.json", "job.json"))
    assert [(each["nodes"], each["excludes"]) for each in told["restarts"]] == [([3, 2], [h2.address])], output
    assert f"it shrinks from 3 nodes to 2, without {h2.address} (dp=2, num_microbatches=2)" in output
    assert (now["nodes"], now["parallel"]["dp"], now["parallel"]["num_microbatches"]) == (2, 2, 2)
    found = losses(run_dir)
    assert [each[:2] for each in found] == [each[:2] for each in calm], "every step once"
    assert all(abs(one[2] - other[2]) < 1e-6 for one, other in zip(found, calm, strict=True))
    mpi = MpiCluster(MpiOptions("openmpi", mpiexec, known["hostfile"], extra=tuple(known["extra"])))
    names = (three.hosts[0].address, h2.address)
    assert mpi.back(names) == names[:1]
    h2.boot()
    three.wait()
    assert mpi.back(names) == names, "a later restart takes it again"


def _up(lab: Hosts) -> None:
    for host in lab.hosts:
        if not host.children:
            host.boot()
    lab.wait()
