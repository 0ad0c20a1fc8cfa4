"""Nodes of Kubernetes, as a doctor reaches them: pods like those of the run that only wait, and a probe in each.

They are a Job of their own with the image, resources and volumes of the run, without its secrets, and go when the
examination is over, or by themselves at its deadline.
"""

import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.kubectl import Kubectl
from meshwright.clusters.probe import PROBE_ARGV
from meshwright.clusters.reaching import Reached, Visit, reached_by, unique_names

__all__ = ["NodeChoice", "machine_of", "placed", "probe_job", "reached_in_pods"]

_MOST_S = 600
_LOOK_S = 1.0
_GRACE_S = 5
_GOING_S = 60
_WAIT = "import os, signal, time; signal.signal(15, lambda *_: os._exit(143)); time.sleep({most_s})"
"""What a pod does: the first process of a container does not end on SIGTERM unless it says so."""

_DELETE = ("delete", "--ignore-not-found")
_MARK = "/"
"""Between the names of a node and of one of its pods; neither has one."""


def machine_of(name: str) -> str:
    """The node of Kubernetes that a name in an examination stands for.

    >>> machine_of("gpu7/x2k9p"), machine_of("gpu7")
    ('gpu7', 'gpu7')
    """
    return name.partition(_MARK)[0]


@dataclass(frozen=True, kw_only=True)
class NodeChoice:
    """Which nodes pods come to, at every start of them.

    Args:
        node_selector: labels that nodes must have.
        exclude: nodes that pods never come to.
        prefer: nodes that pods come to where these are free.
    """

    node_selector: Mapping[str, str] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    prefer: tuple[str, ...] = ()

    def choice(self) -> dict[str, Any]:
        """Keys of a pod's spec; none where any node will do.

        Nodes are meant by their own names, as pods tell them, not by a label, which may have another value and which
        who has only a namespace may not read. A requirement of a name takes one.

        >>> NodeChoice().choice()
        {}
        """
        out = [_named("NotIn", name) for name in self.exclude]
        drawn = [{"weight": 100, "preference": {"matchFields": [_named("In", name)]}} for name in self.prefer]
        required = {"nodeSelectorTerms": [{"matchFields": out}]}
        found = {
            **({"requiredDuringSchedulingIgnoredDuringExecution": required} if out else {}),
            **({"preferredDuringSchedulingIgnoredDuringExecution": drawn} if drawn else {}),
        }
        return {
            **({"nodeSelector": dict(self.node_selector)} if self.node_selector else {}),
            **({"affinity": {"nodeAffinity": found}} if found else {}),
        }


def _named(operator: str, name: str) -> dict[str, Any]:
    return {"key": "metadata.name", "operator": operator, "values": [name]}


def probe_job(jobset: Mapping[str, Any], *, python: str, most_s: float) -> dict[str, Any]:
    """The Job whose pods wait to be examined; pure.

    Args:
        jobset: that the run would be.
        python: interpreter in the image.
        most_s: how long its pods may be waited for.
    """
    job = json.loads(json.dumps(jobset["spec"]["replicatedJobs"][0]["template"]["spec"]))
    deadline_s = int(most_s) + _MOST_S
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    kept = {key: value for key, value in container.items() if key not in ("env", "ports", "command")}
    wait = _WAIT.format(most_s=deadline_s)
    pod["containers"] = [{**kept, "command": [python, "-c", wait]}]
    pod["terminationGracePeriodSeconds"] = _GRACE_S
    meta = {key: jobset["metadata"][key] for key in ("name", "namespace", "labels")}
    spec = {**job, "activeDeadlineSeconds": deadline_s, "ttlSecondsAfterFinished": 60}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta, "spec": spec}


@contextmanager
def reached_in_pods(job: Mapping[str, Any], kubectl: Kubectl, visit: Visit) -> Iterator[Reached]:
    """Nodes with a waiting pod each, until this is left; `gpu7/x2k9p` is one of several pods of one node.

    Args:
        job: of the pods.
        kubectl: of the cluster.
        visit: the examination.

    Raises:
        UnavailableError: when there are none in time.
        SystemExit: on SIGTERM and SIGHUP, so that the pods go; with 128 and the signal's number.
    """
    (container,) = job["spec"]["template"]["spec"]["containers"]
    with _ending_by_signals(), _created(job, kubectl, visit):
        found = _up(job, kubectl, visit)
        names = unique_names([(node, pod.rpartition("-")[2]) for pod, node in found.items()], _MARK)
        probe = ("-c", container["name"], "--", container["command"][0], *PROBE_ARGV[1:])
        words = {node: (*kubectl.words, "exec", "-i", pod, *probe) for node, pod in zip(names, found, strict=True)}
        with reached_by(words, "kubernetes", visit) as reached:
            yield reached


@contextmanager
def _ending_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise, where they would end this process as it stands, and its pods would stay."""
    numbers = (signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    ours = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]  # nohup ignores SIGHUP

    def end(number: int, frame: object) -> None:
        del frame
        for each in ours:
            signal.signal(each, signal.SIG_IGN)  # a second one would keep the pods from going
        raise SystemExit(128 + number)

    try:
        for each in ours:
            signal.signal(each, end)
        yield
    finally:
        for each in ours:
            signal.signal(each, signal.SIG_DFL)


@contextmanager
def _created(job: Mapping[str, Any], kubectl: Kubectl, visit: Visit) -> Iterator[None]:
    """A Job, which goes whatever happens, also where nobody knows whether it was created."""
    name = job["metadata"]["name"]
    try:
        kubectl("create", "-f", "-", text=json.dumps(job))
        yield
        _gone(name, kubectl, visit)
    except BaseException as error:
        if "(AlreadyExists)" not in str(error):  # that one is somebody else's
            try:
                _delete(name, kubectl, visit)
            except (KeyboardInterrupt, SystemExit):  # which ended the command
                _delete(name, kubectl, visit)
                raise
        raise


def _delete(name: str, kubectl: Kubectl, visit: Visit) -> None:
    """Deletes a Job, and says so where it cannot."""
    try:
        kubectl(*_DELETE, "--wait=false", f"job/{name}")
    except UnavailableError as left:
        visit.tell(f"job/{name} may still be there until its deadline: {left}")


def _gone(name: str, kubectl: Kubectl, visit: Visit) -> None:
    """Deletes a Job, and waits for its pods to go, which keep their nodes from those of the run until then."""
    words = ("--cascade=foreground", "--wait=true", f"--timeout={_GOING_S}s")
    try:
        kubectl(*_DELETE, *words, f"job/{name}", timeout_s=_GOING_S + 30.0)
    except UnavailableError as error:
        if "timed out" not in str(error):
            raise
        visit.tell(f"pods of job/{name} are not gone after {_GOING_S} s, and may keep others from their nodes: {error}")


def _up(job: Mapping[str, Any], kubectl: Kubectl, visit: Visit) -> dict[str, str]:
    """Pods and their nodes, once all run; meanwhile it is said what that waits for."""
    name, count = job["metadata"]["name"], job["spec"]["parallelism"]
    end_s, told = time.monotonic() + visit.most_s, ""
    while True:
        pods = json.loads(kubectl("get", "pods", "--selector", f"job-name={name}", "-o", "json") or "{}")
        found, why = placed(pods.get("items", []))
        if len(found) >= count:
            return found
        ended = [each for each in pods.get("items", []) if each.get("status", {}).get("phase") == "Failed"]
        if ended:  # which nothing starts again
            raise UnavailableError(f"Kubernetes did not keep pod {ended[0]['metadata']['name']}: {_ended(ended[0])}")
        why = why or f"{len(found)} of {count} pods run"
        if time.monotonic() >= end_s:
            raise UnavailableError(
                f"Kubernetes has not started the pods within {visit.most_s:g} s: {why}; wait longer with --wait"
            )
        if why != told:
            told = why
            visit.tell(f"the examination waits for pods: {why}; at most {visit.most_s:g} s, Ctrl-C ends it")
        time.sleep(_LOOK_S)


def placed(pods: Sequence[Mapping[str, Any]]) -> tuple[dict[str, str], str]:
    """Pods that run with their nodes, by name, and why the first of the others does not.

    Args:
        pods: objects as kubectl prints them.

    >>> pending = {"phase": "Pending", "conditions": [{"status": "False", "message": "0/3 nodes are available"}]}
    >>> run = {"metadata": {"name": "p0"}, "spec": {"nodeName": "gpu7"}, "status": {"phase": "Running"}}
    >>> placed([run, {"metadata": {"name": "p1"}, "status": pending}])
    ({'p0': 'gpu7'}, 'pod p1: 0/3 nodes are available')
    """
    found, why = {}, ""
    for pod in sorted(pods, key=lambda each: str(each["metadata"]["name"])):
        status = pod.get("status", {})
        if status.get("phase") == "Running":
            found[pod["metadata"]["name"]] = pod["spec"]["nodeName"]
        else:
            why = why or f"pod {pod['metadata']['name']}: {_waits(status)}"
    return found, why


def _ended(pod: Mapping[str, Any]) -> str:
    status = pod["status"]
    ends = [each.get("state", {}).get("terminated") for each in status.get("containerStatuses", [])]
    codes = [f"its container ended with code {each.get('exitCode')}" for each in ends if each]
    return " ".join(filter(None, (status.get("reason"), status.get("message")))) or (codes or ["it failed"])[0]


def _waits(status: Mapping[str, Any]) -> str:
    for each in status.get("containerStatuses", []):
        waiting = each.get("state", {}).get("waiting")
        if waiting:
            return f"{waiting.get('reason', 'waits')} {waiting.get('message', '')}".strip()
    said = [each["message"] for each in status.get("conditions", []) if each.get("message")]
    return str(said[0]) if said else str(status.get("phase", "not there yet"))
