"""`meshwright doctor`: from a job or hosts to verdicts, a table, JSON and an exit code."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from meshwright.clusters.evidence import CHECKS
from meshwright.launch.cli import main
from meshwright.launch.doctor import (
    DoctorError,
    DoctorOptions,
    left_in,
    reach_by_ssh,
    reached_for,
    wishes_of,
)
from meshwright.launch.load import LoadedJob, load_job
from tests.lab.nvml import with_gpus

JOB = "name: j\ncommand: [python, -c, pass]\n"
QUICK = ["--check", "clock", "--check", "gpu", "--check", "disk"]


def _job(folder: Path, text: str = "") -> LoadedJob:
    (folder / "job.yaml").write_text(JOB + text)
    return load_job(folder / "job.yaml")


def test_a_fit_machine_ends_with_0_and_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *QUICK]) == 0
    told = capsys.readouterr().out
    assert told.splitlines()[0].split() == ["check", "node", "verdict", "found"]
    assert told.endswith("fit: 1 node\n")


def test_what_the_job_wants_and_the_machine_lacks_is_78_with_the_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in with_gpus("gpus=2 1.uncorrected=3").items():
        monkeypatch.setenv(name, value)
    _job(tmp_path, "resources: {gpus_per_node: 4}\n")
    assert main(["doctor", str(tmp_path / "job.yaml"), "--check", "gpu", "--json"]) == 78
    told = capsys.readouterr()
    assert told.err == ""
    found = json.loads(told.out)
    assert (found["fit"], found["sick"], found["healthy"]) == (False, ["node0"], [])
    bad = [each for each in found["verdicts"] if each["state"] == "bad"]
    facts = [each["found"] for each in bad]
    assert facts[0] == "2 GPUs, the job wants 4"
    assert facts[1].startswith("GPU 1 (0000:3b:00): 3 uncorrected memory errors")
    assert all(each["remedy"] for each in bad)


def test_a_sick_node_can_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = str(tmp_path / "job.yaml")
    _job(tmp_path, "cluster: {simulate_nodes: 3}\n")
    assert main(["doctor", job, "--exclude", "node1", *QUICK]) == 0
    assert "fit: 2 nodes; left out: node1" in capsys.readouterr().out
    assert main(["doctor", job, "--exclude", "node7", *QUICK]) == 64
    assert "--exclude node7: there is no such node; did you mean 'node" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--check", "gpus"], "there is no such check; did you mean 'gpu'?"),
        (["--host", "-oProxyCommand=x"], "is no name of a host"),
        (["--exclude", "node0"], "every node is excluded"),
    ],
)
def test_what_makes_no_sense_is_64_and_starts_nothing(
    words: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *words]) == 64
    assert error in capsys.readouterr().err


def test_a_job_says_what_is_looked_at(tmp_path: Path) -> None:
    text = (
        "rendezvous: {interface: eth7, port_range: [30000, 30100]}\ncheckpoint: {every_steps: 5, dir: 'ckpt/{name}'}\n"
        "resources: {gpus_per_node: 2, gpu_type: H100}\ncluster: {simulate_nodes: 2}\n"
        "health: {preflight: [disk, allreduce], allreduce: {min_busbw_gbps: 3, size: 1MiB}}\n"
    )
    wishes = wishes_of(DoctorOptions(), _job(tmp_path, text), tmp_path)
    assert (wishes.interface, wishes.ports, wishes.gpu_type) == ("eth7", (30000, 30100), "H100")
    assert wishes.directories == (f"{tmp_path}/runs/j", f"{tmp_path}/ckpt/j")
    assert wishes.gpus_per_node == 4  # pretended nodes share a machine
    assert (wishes.checks, wishes.allreduce_bytes, wishes.min_bus_bytes_per_s) == (("disk", "allreduce"), 1 << 20, 3e9)
    asked = wishes_of(DoctorOptions(checks=("gpu", "clock"), hosts=("a",)), _job(tmp_path, text), tmp_path)
    assert (asked.checks, asked.gpus_per_node) == (("clock", "gpu"), 2)


def test_a_job_that_says_nothing_of_health_gets_every_check_and_any_port(tmp_path: Path) -> None:
    wishes = wishes_of(DoctorOptions(), _job(tmp_path, "rendezvous: {port: 31000}\n"), tmp_path)
    assert (wishes.checks, wishes.ports, wishes.gpus_per_node) == (CHECKS, (31000, 31000), None)
    assert wishes.allreduce_bytes is None
    assert wishes_of(DoctorOptions(), None, tmp_path).directories == (str(tmp_path),)


def test_a_host_is_asked_without_questions_and_never_with_an_unknown_key() -> None:
    reach = reach_by_ssh("gpu01", {"MESHWRIGHT_SSH_CONFIG": "my config", "MESHWRIGHT_PYTHON": "env A='b c' python"})
    assert reach.argv[reach.argv.index("-F") + 1] == "my config"
    assert {"BatchMode=yes", "StrictHostKeyChecking=yes"} < set(reach.argv)
    assert reach.argv[-1] == "exec env 'A=b c' python -u -m meshwright.clusters.probe"
    with pytest.raises(DoctorError, match="no name of a host"):
        reach_by_ssh("")
    with reached_for(DoctorOptions(hosts=("a", "b")), None, Path()) as found:
        assert [each.name for each in left_in(found, ("a",)).reaches] == ["b"]


def test_the_hosts_of_a_job_are_the_nodes_that_are_examined(tmp_path: Path) -> None:
    text = "cluster: {type: ssh, user: train, python: /opt/py, hosts: [{name: a}, {name: b, python: /b/py}]}\n"
    with reached_for(DoctorOptions(), _job(tmp_path, text), tmp_path) as found:
        reaches = found.reaches
    assert [(each.name, each.by) for each in reaches] == [("a", "ssh"), ("b", "ssh")]
    assert reaches[1].argv[-2:] == ("b", "exec /b/py -u -m meshwright.clusters.probe")
    assert reaches[0].argv[reaches[0].argv.index("-l") + 1] == "train"


@pytest.fixture
def ssh_config(tmp_path: Path) -> Iterator[Path]:
    """An ssh server of our own on loopback, and the configuration to reach it as `here` and `elsewhere`."""
    sshd = shutil.which("sshd") or "/usr/sbin/sshd"
    if not os.access(sshd, os.X_OK) or shutil.which("ssh") is None:
        pytest.skip("no OpenSSH here: apt install openssh-server openssh-client")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    shutil.copy(tmp_path / "user.pub", tmp_path / "authorized")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    key = (tmp_path / "host.pub").read_text()
    (tmp_path / "known").write_text(f"[127.0.0.1]:{port} {key}")
    (tmp_path / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/authorized\n"
        f"PidFile {tmp_path}/pid\nStrictModes no\nPasswordAuthentication no\nUsePAM no\n"
    )
    common = f"HostName 127.0.0.1\nPort {port}\nIdentityFile {tmp_path}/user\nIdentitiesOnly yes\n"
    (tmp_path / "ssh_config").write_text(
        f"Host here\nUserKnownHostsFile {tmp_path}/known\n{common}"
        f"Host elsewhere\nUserKnownHostsFile {tmp_path}/nobody\n{common}"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    server = subprocess.Popen([sshd, "-D", "-f", str(tmp_path / "sshd_config")], stderr=subprocess.DEVNULL)
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    yield tmp_path / "ssh_config"
    server.terminate()
    server.wait()


@pytest.mark.slow
def test_hosts_are_examined_by_ssh_and_an_unknown_host_key_is_refused(
    ssh_config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESHWRIGHT_SSH_CONFIG", str(ssh_config))
    monkeypatch.setenv("MESHWRIGHT_PYTHON", f"env PYTHONPATH={os.pathsep.join(sys.path)} {sys.executable}")
    words = [
        "doctor",
        "--host",
        "here",
        "--host",
        "elsewhere",
        "--check",
        "ssh",
        "--check",
        "clock",
        "--check",
        "ports",
    ]
    assert main([*words, "--json"]) == 78
    found = json.loads(capsys.readouterr().out)
    assert (found["sick"], found["healthy"]) == (["elsewhere"], ["here"])
    refused = next(each for each in found["verdicts"] if each["state"] == "bad")
    assert "Host key verification failed" in refused["found"]
    assert "known_hosts" in refused["remedy"]
    assert main([*words, "--exclude", "elsewhere"]) == 0
    assert "answers (ssh)" in capsys.readouterr().out


@pytest.mark.slow
def test_a_whole_examination_of_two_nodes_times_an_all_reduce(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _job(tmp_path, "cluster: {simulate_nodes: 2}\nhealth: {allreduce: {size: 4MiB, min_busbw_gbps: 0.001}}\n")
    assert main(["doctor", str(tmp_path / "job.yaml")]) == 0
    assert "gloo, 4 MiB over 2 ranks of 2 nodes: " in capsys.readouterr().out
    slow = ["--set", "health.allreduce.min_busbw_gbps=1000", "--check", "allreduce"]
    assert main(["doctor", str(tmp_path / "job.yaml"), *slow]) == 78
    assert "expected at least 1000.00 (health.allreduce.min_busbw_gbps of the job)" in capsys.readouterr().out


def test_a_calibration_is_written_told_and_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = {"products": 3.0, "memory": 20.0}
    gpu = {"name": "host", "flops_per_s": {"fp32": 6e10}}
    told_of = {"cores": 2, "torch": "2.13", "seconds": 9.0, "busy": 0.02}
    found = {"calibrated": told_of, "mean_error_percent": {1: errors}, "gpu": gpu}

    def calibrated(tell: Callable[[str], None]) -> dict[str, Any]:
        tell("products")
        return {**found, "by_ranks": {}}

    monkeypatch.setattr("meshwright.clusters.calibrate.calibrated", calibrated)
    path = tmp_path / "machine.yaml"
    for _ in range(2):
        assert main(["doctor", "--calibrate", str(path)]) == 0
        told = capsys.readouterr()
        assert told.err == "products\n"
        assert told.out.splitlines()[1:] == [
            "  fp32  products 60 GFLOP/s",
            "  1 rank, mean error: products 3%, memory 20%",
        ]
    told_of["busy"] = 0.31
    assert main(["doctor", "--calibrate", str(path)]) == 0
    assert "OTHER PROGRAMS took 31% of the processors" in capsys.readouterr().out
    assert main(["doctor", str(path), "--calibrate", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gpu"] == gpu
    assert "by_ranks" in path.read_text()


def test_a_calibration_overwrites_no_job_and_takes_no_hosts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _job(tmp_path)
    assert main(["doctor", "--calibrate", str(tmp_path / "job.yaml")]) == 64
    assert "is no calibration and would be overwritten" in capsys.readouterr().err
    assert main(["doctor", "--calibrate", str(tmp_path / "no" / "m.yaml")]) == 64
    assert "there is no directory" in capsys.readouterr().err
    assert main(["doctor", "--calibrate", "--host", "gpu01"]) == 64
    assert "takes no 'gpu01'" in capsys.readouterr().err
