"""A stand-in for what runs pods: scheduler, kubelets, controllers of Job and JobSet, as far as they are documented.

    python pretend_jobset.py PLACE NAME

runs the JobSet (or TrainJob) NAME whose objects `pretend_kubectl` has put into PLACE. A pod is a process of this
machine, with the environment of its container and nothing in common with other pods but a claim. Files in PLACE say
what there is and what happens: `nodes` has the names of nodes (by default there are enough, gpu0 and so on), one pod
each, and `busy` those that others hold until a run is submitted; `kill-1` kills the container of pod 1, `evict-1`
evicts the pod, and `lose-1` loses its node; while there is a `hold-1` pod 1 is pending.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

__all__ = ["free_node", "going"]

_LOOK_S = 0.05
_MARK = "PRETENDED_POD"
_SECRETS = {"TOKEN": "tok-123"}
Spec = Mapping[str, Any]


def going(place: Path, *nodes: str, grace_s: float = 0.0) -> set[str]:
    """Nodes whose pods of an examination were deleted, but have not gone yet.

    Args:
        place: of the namespace.
        nodes: more of them.
        grace_s: that these take.
    """
    path = place / "going"
    known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    if nodes:
        known.update(dict.fromkeys(nodes, time.time() + grace_s))
        path.write_text(json.dumps(known))
    return {node for node, end_s in known.items() if end_s > time.time()}


def free_node(place: Path, pod: Spec, taken: Collection[str], count: int) -> str | None:
    """A node for a pod: one that it prefers, or the first that is free and not forbidden.

    Args:
        place: whose file `nodes` has their names.
        pod: its spec.
        taken: nodes that have a pod.
        count: of pods; so many nodes are free where there is no such file.
    """
    busy = place / "busy"
    taken = {*taken, *going(place), *(busy.read_text().split() if busy.exists() else ())}
    told = pod.get("affinity", {}).get("nodeAffinity", {})
    required = told.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", [{}])
    drawn = told.get("preferredDuringSchedulingIgnoredDuringExecution", [])
    forbidden = {value for each in required[0].get("matchFields", []) for value in each["values"]}
    liked = [value for each in drawn for field in each["preference"]["matchFields"] for value in field["values"]]
    path = place / "nodes"
    names = path.read_text().split() if path.exists() else [f"gpu{each}" for each in range(count + len(forbidden))]
    free = [name for name in names if name not in forbidden and name not in taken]
    return min(free, key=lambda name: (name not in liked, names.index(name)), default=None)


def _carriers(pod: str) -> Iterator[int]:
    """Processes of a pod: whatever they do, they keep the variable they began with."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"{_MARK}={pod}\0".encode() in path.read_bytes():
                yield int(path.parent.name)


def _kill(pod: str) -> None:
    for _ in range(3):  # some may be starting others
        for pid in _carriers(pod):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Pod:
    """One pod of one start."""

    def __init__(self, place: Path, name: str, index: int, spec: Spec) -> None:
        self.place, self.index, self.spec = place, index, spec
        self.name = f"{name}-{index}-{''.join(random.choices('bcdfghjklmnpqrstvwxz2456789', k=5))}"
        self.node: str | None = None
        self.process: subprocess.Popen[str] | None = None
        self.pump: Thread | None = None
        self.conditions: list[dict[str, str]] = []
        self.swept = False
        self.tell()

    def start(self, node: str, env: Mapping[str, str]) -> None:
        """Runs its container on a node."""
        self.node = node
        (container,) = self.spec["containers"]
        command = [word.replace("$$", "$") for word in container["command"]]
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **env, _MARK: self.name},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.pump = Thread(target=self._pump, daemon=True)
        self.pump.start()
        self.tell()

    def _pump(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        with (self.place / f"{self.name}.log").open("a") as file:
            for line in self.process.stdout:
                file.write(f"{time.time():.6f} {line}")
                file.flush()

    @property
    def code(self) -> int | None:
        """Exit code of its container, once that has ended, and with it whatever it started."""
        code = None if self.process is None else self.process.poll()
        if code is None:
            return None
        if not self.swept:
            assert self.pump is not None
            _kill(self.name)
            self.pump.join()
            self.swept = True
        return code if code >= 0 else 128 - code

    def tell(self) -> None:
        """Writes what kubectl says of it."""
        code = self.code
        phase = "Pending" if self.process is None else "Running" if code is None else "Failed" if code else "Succeeded"
        status: dict[str, Any] = {"phase": phase, "conditions": self.conditions}
        if self.process is None:
            message = "0 nodes are available: insufficient nvidia.com/gpu"
            status["conditions"] = [{"type": "PodScheduled", "status": "False", "message": message}]
        if code is not None:
            ended = {"exitCode": code, "reason": "OOMKilled" if code == 137 else "Error"}
            status["containerStatuses"] = [{"name": "node", "state": {"terminated": ended}}]
        told = {"metadata": {"name": self.name}, "spec": {"nodeName": self.node}, "status": status}
        part = self.place / f".{self.name}"
        part.write_text(json.dumps(told))
        part.rename(self.place / f"{self.name}.pod")

    def befall(self, what: str) -> None:
        """Something happens to it."""
        if what != "kill":
            reason = {"evict": "EvictionByEvictionAPI", "lose": "DeletionByTaintManager"}[what]
            self.conditions.append({"type": "DisruptionTarget", "status": "True", "reason": reason})
            self.tell()
        if what == "evict":
            Thread(target=self.end, daemon=True).start()
        else:
            _kill(self.name)

    def end(self) -> None:
        """TERM, and after its grace KILL."""
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            self.process.terminate()
        end_s = time.monotonic() + self.spec.get("terminationGracePeriodSeconds", 30)
        while self.code is None and time.monotonic() < end_s:
            time.sleep(_LOOK_S)
        _kill(self.name)
        self.process.wait()

    def delete(self) -> None:
        """Ends it; then nobody can ask for it or its log any more."""
        self.end()
        for suffix in ("pod", "log"):
            with suppress(FileNotFoundError):
                (self.place / f"{self.name}.{suffix}").rename(self.place / f"{self.name}.{suffix}-gone")


class Job:
    """The Job of a JobSet at one of its starts."""

    def __init__(self, place: Path, name: str, spec: Spec, restarts: int) -> None:
        self.place, self.name, self.spec, self.restarts = place, name, spec, restarts
        pod = spec["template"]["spec"]
        self.pods = [Pod(place, f"{name}-node-0", index, pod) for index in range(spec["parallelism"])]
        with socket.create_server((_address(), 0)) as free:
            self.port = free.getsockname()[1]

    @property
    def deleted(self) -> bool:
        """Whether somebody has deleted the whole."""
        return (self.place / f"deleted-{self.name}").exists()

    def run(self) -> str:
        """Runs its pods until all have ended; the reason of its failure, empty where it is complete."""
        why: str | None = None
        while why is None and not self.deleted:
            self._schedule()
            self._befall()
            why = self._why()
            time.sleep(_LOOK_S)
        self.delete([pod for pod in self.pods if pod.code is None])
        return why or ""

    def delete(self, pods: Collection[Pod]) -> None:
        """Deletes pods, all at once."""
        threads = [Thread(target=pod.delete) for pod in pods]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _schedule(self) -> None:
        for pod in self.pods:
            if (self.place / f"hold-{pod.index}").exists():
                continue
            taken = {other.node for other in self.pods if other.node is not None and other.code is None}
            if pod.process is None and (node := free_node(self.place, pod.spec, taken, len(self.pods))) is not None:
                pod.start(node, self._environment(pod))

    def _befall(self) -> None:
        for what in ("kill", "evict", "lose"):
            for pod in self.pods:
                order = self.place / f"{what}-{pod.index}"
                if order.exists() and pod.process is not None:
                    order.unlink()
                    pod.befall(what)

    def _why(self) -> str | None:
        """Why the Job has failed, empty where it is complete, None while it is neither."""
        ended = [(pod, pod.code) for pod in self.pods if pod.code is not None]
        for pod, code in ended:
            pod.tell()
            if code:
                return self._counted(pod, code)
        done = {pod.index for pod, code in ended}
        rules = self.spec.get("successPolicy", {}).get("rules", [])
        enough = any(done >= {int(each) for each in rule["succeededIndexes"].split(",")} for rule in rules)
        return "" if enough or len(done) == self.spec["completions"] else None

    def _counted(self, pod: Pod, code: int) -> str:
        """The reason of the Job's failure, by the first of its rules that is true of a pod."""
        for rule in self.spec.get("podFailurePolicy", {}).get("rules", []):
            if _is_true(rule, pod, code):
                assert rule["action"] in ("FailJob", "Count"), rule
                return "PodFailurePolicy" if rule["action"] == "FailJob" else "BackoffLimitExceeded"
        assert self.spec["backoffLimit"] == 0, "the first failure counts"
        return "BackoffLimitExceeded"

    def _environment(self, pod: Pod) -> dict[str, str]:
        (container,) = pod.spec["containers"]
        found = {each["name"]: self._value(each, pod) for each in container["env"]}
        plan = json.loads(found["MESHWRIGHT_PLAN"])
        plan["meeting"].update(host=_address(), port=self.port)  # there is no DNS, and all pods share this machine
        return {**found, "MESHWRIGHT_PLAN": json.dumps(plan), "JOB_COMPLETION_INDEX": str(pod.index)}

    def _value(self, variable: Spec, pod: Pod) -> str:
        """A variable's value; what pods see of volumes is a folder of this machine."""
        source = variable["valueFrom"]
        if "fieldRef" in source:
            assert source["fieldRef"]["fieldPath"].endswith("restart-attempt']"), source
            return str(self.restarts)
        if "secretKeyRef" in source:
            path = self.place / f"secret-{source['secretKeyRef']['name']}"
            return path.read_text() if path.exists() else _SECRETS[variable["name"]]
        config = json.loads((self.place / f"configmap-{self.name}").read_text())
        claims = [each.get("persistentVolumeClaim") for each in pod.spec.get("volumes", [])]
        disk = next((f"claim-{each['claimName']}" for each in claims if each), f"{pod.name}.disk")
        text: str = config["data"][source["configMapKeyRef"]["key"]]
        return text.replace('"/meshwright/', f'"{self.place / disk}/')


def _is_true(rule: Spec, pod: Pod, code: int) -> bool:
    """Whether a rule of a podFailurePolicy is about a pod that failed."""
    if "onExitCodes" in rule:
        asked = rule["onExitCodes"]
        return (code in asked["values"]) == (asked["operator"] == "In")
    has = {(each["type"], each["status"]) for each in pod.conditions}
    return any((each["type"], each["status"]) in has for each in rule["onPodConditions"])


def _address() -> str:
    from meshwright.clusters.network import interfaces

    return next(each for each in interfaces().values() if not each.startswith("127."))


def _job_of(whole: Spec) -> Spec:
    """The Job that an object stands for; of a TrainJob as a runtime without policies would have it."""
    if whole["kind"] == "JobSet":
        found: Spec = whole["spec"]["replicatedJobs"][0]["template"]["spec"]
        return found
    trainer = whole["spec"]["trainer"]
    pod = {"containers": [trainer], "terminationGracePeriodSeconds": 30}
    number = trainer["numNodes"]
    return {"parallelism": number, "completions": number, "backoffLimit": 0, "template": {"spec": pod}}


def _ends(policy: Spec, why: str, restarts: int) -> bool:
    """Whether a JobSet has failed with its Job."""
    for rule in policy.get("rules", []):
        if why in rule["onJobFailureReasons"]:
            assert rule["action"] == "FailJobSet", rule
            return True
    return restarts >= int(policy.get("maxRestarts", 0))


def _tell(place: Path, name: str, **fields: Any) -> None:
    part = place / f".status-{name}"
    part.write_text(json.dumps(fields))
    part.rename(place / f"status-{name}")


def main(place: Path, name: str) -> None:
    """Runs a JobSet to its end."""
    path = next(path for kind in ("jobset", "trainjob") if (path := place / f"{kind}-{name}").exists())
    whole = json.loads(path.read_text())
    _tell(place, name)
    job, why = Job(place, name, _job_of(whole), 0), ""
    while True:
        jobs = [{"name": "node", "active": 1, "ready": 1}]
        _tell(place, name, replicatedJobsStatus=jobs, restarts=job.restarts)
        why = job.run()
        if job.deleted or not why or _ends(whole["spec"].get("failurePolicy", {}), why, job.restarts):
            break
        job.delete(job.pods)
        job = Job(place, name, job.spec, job.restarts + 1)
    if job.deleted:
        job.delete(job.pods)
    message = f"jobset failed due to one or more job failures (first failed job: {name}-node-0: {why})"
    kind, message = ("Failed", message) if why else ("Completed", "jobset completed successfully")
    told = {"type": kind, "status": "True", "message": message}
    _tell(place, name, conditions=[told], restarts=job.restarts)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
