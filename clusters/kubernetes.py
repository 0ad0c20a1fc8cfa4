"""Kubernetes as a queue: a run becomes a JobSet or TrainJob with one pod per node, handed over by kubectl.

Every pod runs `meshwright.clusters.pod`, which starts the agent of its node. kubectl is the only way to the cluster;
its words are lists, and whatever is secret goes through its standard input. The id of a run is
context/namespace/kind/name: it says which cluster has the run, whatever context is current when somebody asks.
"""

import json
import math
import re
import secrets as tokens
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from meshwright.clusters.base import NodePlan, StartPlan, StartRequest, Submission, identity, log_name
from meshwright.clusters.contract import Job, Lost, Said
from meshwright.clusters.dealing import ranks_per_node
from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.kubectl import Kubectl
from meshwright.clusters.kubernetes_manifest import KubernetesOptions, manifest, object_name, pod_run_dir, written
from meshwright.clusters.kubernetes_nodes import probe_job, reached_in_pods
from meshwright.clusters.lost import pods_ended
from meshwright.clusters.reaching import Reached, Visit
from meshwright.clusters.spawn import words_for

__all__ = ["KubernetesQueue", "plan_kubernetes"]

_LOGS_TIMEOUT_S = 600.0
_GRACE_S = 1
"""Of pods of a run that is cancelled, in seconds."""

_LINE = re.compile(r"\[pod/([^/\]]+)-[^-/\]]*/[^\]]*\] ([0-9T:-]+)(?:\.([0-9]{1,9}))?(Z|[+-][0-9:]+) (.*)")
"""What `kubectl logs --prefix --timestamps` prints; a pod has the name of its host and five letters more."""


def plan_kubernetes(request: StartRequest, options: KubernetesOptions) -> StartPlan:
    """The exact start plan, whose submission is the manifest; pure.

    Raises:
        UnavailableError: when Kubernetes would refuse it, or the job asks for what pods cannot do.
    """
    name = object_name(request.name, request.run_id)
    per_node = ranks_per_node(request, "pods are planned before their nodes are known", gpus=request.gpus_per_node)
    if request.gpus_per_node:
        options = replace(options, resources={"nvidia.com/gpu": str(request.gpus_per_node), **options.resources})
    port = request.meeting.port or request.meeting.ports[0]
    meeting = replace(request.meeting, host=f"{name}-node-0-0.{name}", port=port)
    plan = StartPlan.of(request, "kubernetes", nodes=(), meeting=meeting, variant=options.kind)
    plan = replace(plan, inherit=("*",))
    inside = replace(request, run_dir=Path(pod_run_dir(plan)))
    nodes = tuple(_node(inside, options, index=index, per_node=per_node) for index in range(request.num_nodes))
    plan = replace(plan, nodes=nodes)
    submission = Submission(
        (*Kubectl(options.namespace, options.context).words, "create", "-f", "-"),
        written(manifest(plan, options)),
        step=(),
    )
    return replace(plan, submission=submission)


def _node(request: StartRequest, options: KubernetesOptions, *, index: int, per_node: int) -> NodePlan:
    name = f"{object_name(request.name, request.run_id)}-node-0-{index}"
    ranks = tuple(range(index * per_node, (index + 1) * per_node))
    saves, lead_s = request.warning
    return NodePlan(
        name=name,
        index=index,
        ranks=ranks,
        cwd=options.workdir or str(request.program.workdir),
        env=(*sorted(request.program.env), *identity(request, name, index), ("MESHWRIGHT_SAVE_SIGNAL", saves)),
        agent=(options.python, "-u", "-m", "meshwright.clusters.pod", saves, f"{lead_s:g}"),
        argv=words_for(options.python, request.program.argv),
        logs=tuple(log_name(rank) for rank in ranks),
    )


class KubernetesQueue:
    """A namespace of a Kubernetes cluster.

    Args:
        options: what is asked of it.
        files: name -> text of what ranks of a request read in their run directory.
    """

    def __init__(
        self, options: KubernetesOptions, files: Callable[[StartRequest], Mapping[str, str]] | None = None
    ) -> None:
        self._options, self._files = options, files
        self._kubectl = Kubectl(options.namespace, options.context)

    def plan(self, request: StartRequest) -> StartPlan:
        """The exact start plan of a request, with its manifest; needs no kubectl."""
        files = {} if self._files is None else self._files(request)
        return plan_kubernetes(request, replace(self._options, files={**self._options.files, **files}))

    def reached(self, request: StartRequest, visit: Visit) -> AbstractContextManager[Reached]:
        """Nodes on which pods like those of a run can be started, a pod on each."""
        import yaml

        asked = replace(request, run_id=f"doctor-{tokens.token_hex(3)}")
        plan = plan_kubernetes(asked, replace(self._options, kind="JobSet", files={}))
        self._kubectl.need()
        assert plan.submission is not None, "plan_kubernetes made it"
        *_, jobset = yaml.safe_load_all(plan.submission.script)
        job = probe_job(jobset, python=self._options.python, most_s=visit.most_s)
        return reached_in_pods(job, self._kubectl, visit)

    def check(self, plan: StartPlan) -> None:
        """Makes sure that there is a kubectl.

        Raises:
            UnavailableError: when there is none.
        """
        del plan
        self._kubectl.need()

    @classmethod
    def of(cls, job: str) -> "KubernetesQueue":
        """The one that has a run.

        Args:
            job: the run's id.
        """
        *context, namespace, _, _ = job.rsplit("/", 3)  # a context may have any name, such as that of EKS with a slash
        return cls(KubernetesOptions(image="", namespace=namespace, context="".join(context) or None))

    def submit(self, plan: StartPlan, secrets: Mapping[str, str]) -> str:
        """Creates the key of the run's meeting, then its objects; returns the run's id, context/namespace/kind/name.

        The values of secrets stay here: pods take theirs from the Secret that the job names.
        """
        name = object_name(plan.name, plan.run_id)
        assert plan.submission is not None, "plan() made it"
        context = self._options.context or self._current_context()
        job = "/".join([*([context] if context else []), self._options.namespace, self._options.kind.lower(), name])
        key = ("create", "secret", "generic", f"{name}-key", "--from-file=key=/dev/stdin")
        self._kubectl(*key, text=tokens.token_hex(32))
        try:
            self._kubectl("create", "-f", "-", text=plan.submission.script)
        except UnavailableError:
            self._delete(job)
            raise
        return job

    def _current_context(self) -> str:
        """What it is now, so that it is known later; nothing in a pod, which has no kubeconfig."""
        with suppress(UnavailableError):
            return self._kubectl("config", "current-context").strip()
        return ""

    def status(self, job: str) -> Job:
        """What the cluster says of an id."""
        kind, name = job.split("/")[-2:]
        try:
            told = json.loads(self._kubectl("get", kind, name, "--ignore-not-found", "-o", "json") or "{}")
        except UnavailableError as error:
            return Job("unknown", str(error))
        if not told:
            return Job("gone", self._absent(job))
        found = _state(told)
        return self._blamed(found, job) if found.exit_code else found

    def _absent(self, job: str) -> str:
        kind, name = job.split("/")[-2:]
        context = self._options.context
        return f"there is no {kind} {name} in namespace {self._options.namespace}" + (
            f" of context {context}" if context else ""
        )

    def _blamed(self, found: Job, job: str) -> Job:
        """A run that failed, with its pods that went with their nodes, as far as the cluster still has them."""
        lost = [each for each in self.lost(job).values() if each.disrupted]
        words = "; ".join([found.detail, *(each.why for each in lost)])
        return replace(found, detail=words, exit_code=lost[0].exit_code) if lost else found

    def lost(self, job: str) -> dict[str, Lost]:
        """Pods that ended badly, by their nodes in the plan, as far as the cluster still has them."""
        try:
            pods = json.loads(self._kubectl("get", "pods", "--selector", _selector(job), "-o", "json") or "{}")
        except (UnavailableError, ValueError):
            return {}
        return {name.rpartition("-")[0]: lost for name, lost in pods_ended(pods.get("items", []))}

    def said(self, job: str, since_s: float | None = None) -> list[Said]:
        """What pods printed in the last so many seconds by the clocks of their machines, or ever; each in its order.

        Raises:
            UnavailableError: when the cluster does not answer.
        """
        words = ("logs", "--selector", _selector(job), "--prefix", "--timestamps", "--ignore-errors", "--tail=-1")
        since = () if since_s is None else (f"--since={math.ceil(since_s)}s",)
        text = self._kubectl(*words, *since, timeout_s=_LOGS_TIMEOUT_S)
        return [
            Said(found[1], _ns(*found.group(2, 3, 4)), found[5])
            for found in map(_LINE.fullmatch, text.split("\n"))
            if found
        ]

    def start_again_soon(self, job: str) -> bool:
        """Nothing: here no run is queued again."""
        del job
        return False

    def cancel(self, job: str) -> None:
        """Deletes a run's objects, and with them its pods.

        Raises:
            UnavailableError: when the cluster does not let us, or does not have the run.
        """
        if not self._delete(job):
            raise UnavailableError(f"nothing was cancelled: {self._absent(job)}")

    def _delete(self, job: str) -> bool:
        """Deletes what there is of a run; tells whether the run itself was there."""
        kind, name = job.split("/")[-2:]
        words = ("delete", "--ignore-not-found", "--wait=false", "--output=name")
        told = self._kubectl(*words, f"{kind}/{name}")
        self._kubectl(*words, f"configmap/{name}", f"secret/{name}-key")
        with suppress(UnavailableError):  # they go with the run, but would be given the time to save
            self._kubectl(*words, "pods", "--selector", _selector(job), f"--grace-period={_GRACE_S}")
        return bool(told.strip())


def _selector(job: str) -> str:
    return f"jobset.sigs.k8s.io/jobset-name={job.rpartition('/')[2]}"


def _ns(seconds: str, fraction: str | None, zone: str) -> int:
    """Nanoseconds since 1970.

    >>> _ns("2026-11-27T20:12:52", "5", "Z")
    1795810372500000000
    """
    return int(datetime.fromisoformat(seconds + zone).timestamp()) * 10**9 + int((fraction or "0").ljust(9, "0"))


def _state(told: Mapping[str, Any]) -> Job:
    """What an object says of itself.

    >>> _state({"status": {"conditions": [{"type": "Failed", "status": "True", "message": "a pod failed"}]}})
    Job(state='gone', detail='Failed: a pod failed', exit_code=1)
    """
    conditions = told.get("status", {}).get("conditions", [])
    ended = [
        each for each in conditions if each["status"] == "True" and each["type"] in ("Completed", "Complete", "Failed")
    ]
    if ended:
        kind, said = ended[-1]["type"], ended[-1].get("message", "")
        return Job("gone", kind + (f": {said}" if said else ""), int(kind == "Failed"))
    jobs = told.get("status", {}).get("replicatedJobsStatus", told.get("status", {}).get("jobsStatus", []))
    active = sum(each.get("active", 0) + each.get("ready", 0) for each in jobs)
    return Job("running" if active else "pending", f"{active} jobs active" if active else "")
