"""Doctors of Slurm, MPI and Ray name the node whose disk is full by its real name; nothing of an examination stays."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meshwright.clusters.sweep import carriers
from tests.lab.hosts import Hosts
from tests.lab.launches import ROOT, Launch, finish, write_job
from tests.lab.slurm import Slurm
from tests.lab.test_ray import LIGHT, START
from tests.launch.waiting import eventually

QUICK = ("--check", "ssh", "--check", "ports", "--check", "disk")
JOB = {"nodes": 2, "nproc_per_node": 1}


def _far(folder: Path, name: str, cluster: dict[str, Any], env: dict[str, str]) -> Launch:
    return Launch(folder / name, {"far": cluster}, f"{name}-{os.getpid()}", env)


def _checked(far: Launch, *words: str, **keys: object) -> "tuple[int, dict[str, Any], str]":
    """Exit code, diagnosis and words of `meshwright doctor`."""
    job = write_job(far.folder, "pass", cluster="far", **JOB, **keys)
    command = far.words("doctor", str(job), "--json", *(words or QUICK))
    done = subprocess.run(
        command, cwd=far.folder, env=far.env, capture_output=True, text=True, timeout=400, check=False
    )
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


def _bad(told: dict[str, Any]) -> list[tuple[str, str]]:
    return [(each["check"], each["node"]) for each in told["verdicts"] if each["state"] == "bad"]


@pytest.fixture
def slurm_far(slurm: Slurm, source: dict[str, str], lab_folder: Path) -> Launch:
    """A place to launch from, with a secret among its variables."""
    slurm.idle()
    folder = Path(tempfile.mkdtemp(dir=lab_folder))
    return _far(folder, "doctor-slurm", {"type": "slurm", "nodes": 2}, {**source, **slurm.env, "MY_TOKEN": "s3cr3t-9"})


def test_slurm_examines_its_own_nodes_and_takes_them_back(slurm_far: Launch, slurm: Slurm, hosts: Hosts) -> None:
    hosts.hosts[1].fill(slurm_far.folder / "runs/j")
    code, told, said = _checked(slurm_far, *QUICK, "--check", "clock", "--check", "allreduce")
    assert (code, told.get("sick")) == (78, ["h2"]), said
    assert _bad(told) == [("disk", "h2")]
    assert told["healthy"] == ["h1"]
    reduced = next(each for each in told["verdicts"] if each["check"] == "allreduce")
    assert "2 ranks of 2 nodes" in reduced["found"]
    slurm.quiet()
    assert slurm.type("squeue", "-h") == ""


def test_a_node_is_left_out_by_slurm_itself(slurm_far: Launch) -> None:
    code, told, said = _checked(slurm_far, *QUICK, "--exclude", "h1", "--set", "nodes=1")
    assert code == 0, said
    assert [each["node"] for each in told["verdicts"] if each["check"] == "ssh"] == ["h2"]


def test_what_waits_in_the_queue_is_said_and_ctrl_c_or_a_kill_takes_it_out(slurm_far: Launch, slurm: Slurm) -> None:
    holder = subprocess.Popen(
        ["salloc", "--nodes=2", "--exclusive", "cat"],
        env={**os.environ, **slurm.env},
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    job = write_job(slurm_far.folder, "pass", cluster="far", **JOB)
    try:
        assert eventually(lambda: slurm.type("squeue", "-h", "-t", "R", "-o", "%j") != "", 60)
        for number in (signal.SIGINT, signal.SIGKILL):
            log = slurm_far.folder / f"log-{number}"
            with log.open("w") as file:
                words = [
                    "env",
                    "--default-signal=INT",
                    *slurm_far.words("doctor", str(job)),
                ]
                doctor = subprocess.Popen(words, cwd=slurm_far.folder, env=slurm_far.env, stderr=file)
            assert eventually(lambda: "waits for nodes: job" in log.read_text(), 60), log.read_text()  # noqa: B023
            assert "PENDING" in log.read_text()
            assert "j-doctor" in slurm.type("squeue", "-h", "-o", "%j")
            doctor.send_signal(number)
            doctor.wait(60)
            if number == signal.SIGINT:
                assert doctor.returncode == 130
                assert eventually(lambda: "j-doctor" not in slurm.type("squeue", "-h", "-o", "%j"), 30)
    finally:
        holder.communicate(timeout=60)
    assert eventually(lambda: slurm.type("squeue", "-h") == "", 60), "what was killed gives back what it is given"


def test_no_secret_of_the_job_is_in_what_reaches_the_nodes(slurm_far: Launch, slurm: Slurm, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    pretended = slurm_far.folder / "bin"
    pretended.mkdir()
    for name in ("salloc", "srun"):
        real = shutil.which(name)
        (pretended / name).write_text(f'#!/bin/sh\nenv >> {seen}; echo "$@" >> {seen}\nexec {real} "$@"\n')
        (pretended / name).chmod(0o755)
    slurm_far.env["PATH"] = f"{pretended}:{slurm_far.env['PATH']}"
    code, _, said = _checked(slurm_far, secrets={"TOKEN": {"from_env": "MY_TOKEN"}})
    assert code == 0, said
    assert "--jobid=" in seen.read_text()
    assert "s3cr3t-9" not in seen.read_text()
    slurm.quiet()


def test_a_run_on_slurm_has_its_nodes_examined_before_ranks_start(
    slurm_far: Launch, slurm: Slurm, hosts: Hosts
) -> None:
    health = {"preflight": ["disk", "ports"]}
    job = write_job(slurm_far.folder, "print('up')", cluster="far", health=health, **JOB)
    scratch = slurm_far.folder / "scratch"
    hosts.hosts[1].fill(scratch)
    output, code = _launched(slurm_far, job, *_saves(scratch))
    assert code == 78, output
    assert "h2 not fit" in output
    assert "| up" not in output
    assert slurm_far.record()["exit_code"] == 78
    slurm.quiet()
    again = Launch(slurm_far.folder, {"far": {"type": "slurm", "nodes": 2}}, f"{slurm_far.run_id}-2", slurm_far.env)
    done = again.run(job, *_saves(slurm_far.folder / "room"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "disk, ports checked; fit: 2 nodes" in done.stdout + done.stderr
    assert "h2:1 | up" in done.stdout
    assert not list(carriers(again.run_id))


def _saves(folder: Path) -> tuple[str, ...]:
    return ("--set", f"checkpoint.dir={folder}", "--set", "checkpoint.every_steps=5")


def _script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("kind", ["openmpi", "mpich"])
def test_mpi_examines_the_hosts_of_its_file(
    kind: str, hosts: Hosts, lab_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mpiexec = shutil.which(f"mpiexec.{kind}")
    if mpiexec is None:
        pytest.skip(f"no mpiexec.{kind}")
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        monkeypatch.setenv(name, "1")
    folder = Path(tempfile.mkdtemp(dir=lab_folder))
    known = f"-o UserKnownHostsFile={hosts.known_hosts} -o BatchMode=yes"
    ssh = _script(folder / "ssh", f'exec ssh -F {hosts.folder / "ssh_config"} -i {hosts.key} {known} "$@"')
    python = _script(folder / "python", f'PYTHONPATH={ROOT / "src"} exec {sys.executable} "$@"')
    (folder / "hosts").write_text("h1\nh2\nh9\n")
    extra = {
        "openmpi": ["--mca", "plm_rsh_agent", ssh],
        "mpich": ["-launcher", "ssh", "-launcher-exec", ssh, "-localhost", f"{hosts.net}.254"],
    }[kind]
    cluster = {"type": "mpi", "mpiexec": mpiexec, "hostfile": str(folder / "hosts"), "python": python, "extra": extra}
    far = _far(folder, f"doctor-{kind}", cluster, {})
    hosts.hosts[1].fill(far.folder / "runs/j")
    code, told, said = _checked(far)
    assert (code, told.get("sick")) == (78, ["h2"]), said
    assert _bad(told) == [("disk", "h2")]
    if kind == "mpich":  # which says nothing of a host that it does not reach, for the minute that each has to answer
        return
    code, told, said = _checked(far, "--check", "ssh", "--set", "nodes=3")
    assert (code, told["sick"], told["healthy"]) == (78, ["h9"], ["h1", "h2"]), said
    assert "Could not resolve" in told["verdicts"][-1]["found"]
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(folder).encode() in _bytes(path)]
    assert left == [], "no ssh of mpiexec stays"


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.fixture
def ray_address(hosts: Hosts) -> Iterator[str]:
    """Of a Ray cluster whose head is this machine, without CPUs, and whose nodes are the hosts."""
    pytest.importorskip("ray", reason="pip install 'meshwright[ray]'")
    folder = Path(tempfile.mkdtemp(prefix="mw-ray-"))  # Ray's sockets need a short path
    ray = [str(Path(sys.executable).with_name("ray")), *START]
    port = 27000 + os.getpid() % 900
    head = f"{hosts.net}.254:{port}"
    words = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={folder}"]
    log = folder / "head.log"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "RAY_AUTH_MODE": "disabled", **LIGHT}
    with log.open("wb") as file:
        own = subprocess.Popen([*ray, *words, f"--node-ip-address={hosts.net}.254"], stdout=file, stderr=file, env=env)
    joined = []
    try:
        assert eventually(lambda: "Ray runtime started" in log.read_text(), 120), log.read_text()
        for host in hosts.hosts:
            light = (f"{name}={value}" for name, value in LIGHT.items())
            each = ["env", f"PYTHONPATH={ROOT / 'src'}", *light, *ray, f"--address={head}", "--num-cpus=2"]
            joined.append(host.start([*each, f"--node-ip-address={host.address}"]))
            said = host.folder / "daemon.log"  # one after the other: they share a folder of sockets
            assert eventually(lambda: "Ray runtime started" in said.read_text(), 120), said.read_text()  # noqa: B023
        yield head
    finally:
        for child in joined:
            child.send_signal(signal.SIGKILL)
            child.wait()
        own.terminate()
        own.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def test_ray_examines_nodes_in_actors_and_before_ranks_start(ray_address: str, hosts: Hosts, lab_folder: Path) -> None:
    folder = Path(tempfile.mkdtemp(dir=lab_folder))
    cluster = {"type": "ray", "address": ray_address, "nodes": 2, "ready_timeout": "120s"}
    far = _far(folder, "doctor-ray", cluster, {"RAY_AUTH_MODE": "disabled"})
    end_s = time.monotonic() + 120
    while (found := _checked(far))[0] == 69 and "could never place" in found[2] and time.monotonic() < end_s:
        time.sleep(1.0)  # nodes join
    assert found[0] == 0, found
    scratch = far.folder / "scratch"
    hosts.hosts[1].fill(scratch)
    code, told, said = _checked(far, *QUICK, *_saves(scratch))
    (sick,) = told.get("sick", ["none"])
    assert (code, sick.rpartition("-")[0]) == (78, hosts.hosts[1].address), said
    assert _bad(told) == [("disk", sick)]
    job = write_job(far.folder, "print('up')", cluster="far", health={"preflight": ["disk", "ports"]}, **JOB)
    output, code = _launched(far, job, *_saves(scratch))
    assert code == 78, output
    assert f"{sick} not fit" in output
    assert "| up" not in output
    assert far.record()["exit_code"] == 78
    again = Launch(far.folder, {"far": cluster}, f"{far.run_id}-2", far.env)
    output, code = _launched(again, job, *_saves(far.folder / "room"))
    assert code == 0, output
    assert "disk, ports checked; fit: 2 nodes" in output
    assert output.count("| up") == 2


def _launched(far: Launch, job: Path, *words: str) -> tuple[str, int]:
    launcher = far.start(job, *words)  # Ray looks for its own processes on this machine
    try:
        output, _ = launcher.communicate(timeout=300)
    finally:
        finish(launcher)
    return output, launcher.returncode
