"""MPI, Ray and Kubernetes say which node was lost, and the run says so, with its name where that is known."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from meshwright.clusters.base import Program, StartPlan, StartRequest
from meshwright.clusters.blame import Verdict
from meshwright.clusters.kubernetes import KubernetesQueue
from meshwright.clusters.lost import lost_in_mpi, lost_in_ray, pods_ended, unheard_code
from meshwright.clusters.mpi import MpiHandle, MpiOptions, plan_mpi
from meshwright.clusters.ray import RayOptions, plan_ray
from meshwright.clusters.ray_line import RayLine
from meshwright.launch.report import Outcome, outcome_of
from meshwright.launch.supervise import RunState
from tests.clusters.test_kubernetes import OPTIONS, kubectl
from tests.launch.own import own

__all__ = ["kubectl"]

ORTE = """\
--------------------------------------------------------------------------
ORTE has lost communication with a remote daemon.

  HNP daemon   : [[16919,0],0] on node h1
  Remote daemon: [[16919,0],3] on node h7

This is usually due to either a failure of the TCP network
--------------------------------------------------------------------------
"""
HYDRA = """\
===================================================================================
=   BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES
=   PID 812 RUNNING AT h3
=   EXIT CODE: 9
===================================================================================
"""


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (ORTE, "host h7 was lost (mpiexec ended with code 1)"),
        (ORTE.replace("ORTE", "PRTE").replace("[[16919,0],3]", "[prterun-h1-34@0,1]"), "host h7 was lost"),
        (HYDRA, "a process on host h3 was killed"),
        ("ssh: connect to host h2 port 22: No route to host\n", "host h2 cannot be reached"),
        ("Something\nElse\n---\n", "names no host that it lost: Something / Else; see logs/mpiexec.log"),
        ("", "names no host that it lost; see"),
        (
            "mpirun has detected an attempt to run as root.\n\nDo not.\n",
            "mpirun of Open MPI refuses to run as root; set ",
        ),
    ],
)
def test_both_mpis_name_the_host_in_their_own_words(log: str, words: str) -> None:
    assert words in lost_in_mpi(1, log)
    assert (unheard_code(1, log) == 77) == ("as root" in log)


def ended(plan: StartPlan, *events: dict[str, Any]) -> Outcome:
    state = RunState(plan)
    for event in events:
        state.observe(event)
    return outcome_of(state, Verdict(None), [], times_s=(0, 1))


def request(folder: Path, name: str) -> StartRequest:
    program = Program((sys.executable, "-c", "pass"), folder)
    return StartRequest("j", own(name), folder, program, num_nodes=2)


@pytest.mark.parametrize("hosts", [("h6", "h7.cluster"), ("h1", "h2"), ()])
def test_the_end_of_mpiexec_names_the_host_and_says_that_the_run_is_over(tmp_path: Path, hosts: tuple[str]) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/mpiexec.log").write_text("Remote daemon: x on node h1\n")  # of the attempt before
    mpiexec = tmp_path / "mpiexec"
    mpiexec.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{ORTE}END\nexit 1\n")
    mpiexec.chmod(0o755)
    options = MpiOptions("openmpi", str(mpiexec), "/etc/hosts.mpi", hosts)
    plan = plan_mpi(request(tmp_path, "mpi"), options)
    handle, events = MpiHandle(plan, {}), list[dict[str, Any]]()
    while not handle.done:
        events += handle.poll(0.5)
    handle.kill()
    found = ended(plan, *events)
    assert found.exit_code == 69
    again = "launch again to go on from the newest checkpoint"
    assert found.reason == f"host h7 was lost (mpiexec ended with code 1); {again}"
    told = [(each["event"], each["node"], each.get("lost", True)) for each in events]
    if "h7.cluster" in hosts:
        assert told == [("gone", "h7.cluster", True), ("result", "h6", True)]
    else:
        assert told == [("gone", name, False) for name in hosts or ("node0", "node1")]


DIED = "The actor died because its node has died. Node Id: 6f1c, Ip: 10.0.0.2\nMore."


def test_an_actor_that_is_lost_is_told_with_the_address_of_its_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lost_in_ray("node1", "", DIED).startswith("node1 at 10.0.0.2 was lost: The actor died because its node")
    assert lost_in_ray("node1", "10.0.0.9", "") == "node1 at 10.0.0.9 was lost"

    class RayError(Exception):
        pass

    def get(found: Any) -> Any:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=get, exceptions=SimpleNamespace(RayError=RayError)))
    names = {"start": ("10.0.0.2", "6f1c"), "read": RayError(DIED), "write": None, "wait": 0}
    parts = {name: SimpleNamespace(remote=lambda *_, value=value: value) for name, value in names.items()}
    line = RayLine(SimpleNamespace(**parts), ["agent"])
    assert line.wait(10) == -9
    assert (line.host, line.why) == ("10.0.0.2", DIED)
    line.stdin.close()
    line.stdout.close()
    plan = plan_ray(request(tmp_path, "ray"), RayOptions())
    words = {"exit_code": 69, "message": lost_in_ray("node1", line.host, line.why)}
    found = ended(plan, {"event": "gone", "node": "node1", "code": -9, **words})
    assert found.exit_code == 69
    assert found.reason.startswith("node1 at 10.0.0.2 was lost: The actor died")
    assert found.reason.endswith("; launch again to go on from the newest checkpoint")


def pod(name: str, node: str, **status: Any) -> dict[str, Any]:
    return {"metadata": {"name": name}, "spec": {"nodeName": node}, "status": status}


def target(reason: str, status: str = "True") -> list[dict[str, str]]:
    return [{"type": "Ready", "status": "False"}, {"type": "DisruptionTarget", "status": status, "reason": reason}]


def test_pods_that_went_with_their_nodes_are_told_from_pods_that_failed() -> None:
    pods = [
        pod("a-0", "n1", phase="Failed", conditions=target("DeletionByTaintManager")),
        pod("a-1", "n2", phase="Failed", conditions=target("", "False")),
        pod("a-2", "n3", phase="Failed", reason="NodeLost"),
        {"metadata": {"name": "a-3"}},
    ]
    killed = {"state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}
    told = pods_ended([pod("a-4", "n4", containerStatuses=[killed, {"state": {"running": {}}}]), *pods])
    assert [(name, lost.exit_code, lost.disrupted, lost.why) for name, lost in told] == [
        ("a-0", 69, True, "pod a-0 on node n1: its node does not answer, or was taken out of use"),
        ("a-2", 69, True, "pod a-2 on node n3: NodeLost"),
        ("a-4", 137, False, "pod a-4 on node n4 ended with code 137 (OOMKilled)"),
    ]


def test_a_run_on_kubernetes_that_lost_a_node_says_which(kubectl: Path) -> None:
    failed = {"status": {"conditions": [{"type": "Failed", "status": "True", "message": "a job failed"}]}}
    lost = pod("x-node-0-1", "gpu7", conditions=target("DeletionByPodGC"))
    kubectl.with_name("kubectl.answer").write_text(json.dumps({**failed, "items": [lost]}))
    found = KubernetesQueue(OPTIONS).status("train/jobset/x")
    assert (found.state, found.exit_code) == ("gone", 69)
    assert found.detail == "Failed: a job failed; pod x-node-0-1 on node gpu7: its node is gone"
    kubectl.with_name("kubectl.answer").write_text(json.dumps(failed))
    assert KubernetesQueue(OPTIONS).status("train/jobset/x").exit_code == 1
