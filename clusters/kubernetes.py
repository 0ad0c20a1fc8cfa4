"""Kubernetes as a queue: a run becomes a JobSet or TrainJob with one pod per node, handed over by kubectl.

Every pod runs `meshwright.clusters.pod`, which starts the agent of its node. kubectl is the only way to the cluster;
its words are lists, and whatever is secret goes through its standard input.
"""

import json
import secrets as tokens
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from meshwright.clusters.base import NodePlan, StartPlan, StartRequest, Submission, identity, log_name
from meshwright.clusters.contract import Job
from meshwright.clusters.dealing import ranks_per_node
from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.kubernetes_manifest import KubernetesOptions, manifest, object_name, pod_run_dir, written
from meshwright.clusters.lost import LOST_CODE, lost_pods
from meshwright.clusters.spawn import words_for

__all__ = ["KubernetesQueue", "plan_kubernetes"]

_TIMEOUT_S = 60.0


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
    submission = Submission((*_kubectl(options), "create", "-f", "-"), written(manifest(plan, options)), step=())
    return replace(plan, submission=submission)


def _node(request: StartRequest, options: KubernetesOptions, *, index: int, per_node: int) -> NodePlan:
    name = f"{object_name(request.name, request.run_id)}-node-0-{index}"
    ranks = tuple(range(index * per_node, (index + 1) * per_node))
    return NodePlan(
        name=name,
        index=index,
        ranks=ranks,
        cwd=options.workdir or str(request.program.workdir),
        env=tuple(sorted(request.program.env)) + identity(request, name, index),
        agent=(options.python, "-u", "-m", "meshwright.clusters.pod"),
        argv=words_for(options.python, request.program.argv),
        logs=tuple(log_name(rank) for rank in ranks),
    )


def _kubectl(options: KubernetesOptions) -> tuple[str, ...]:
    context = () if options.context is None else ("--context", options.context)
    return ("kubectl", *context, "--namespace", options.namespace)


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

    def plan(self, request: StartRequest) -> StartPlan:
        """The exact start plan of a request, with its manifest; needs no kubectl."""
        files = {} if self._files is None else self._files(request)
        return plan_kubernetes(request, replace(self._options, files={**self._options.files, **files}))

    def check(self, plan: StartPlan) -> None:
        """Makes sure that there is a kubectl.

        Raises:
            UnavailableError: when there is none.
        """
        if shutil.which("kubectl") is None:
            raise UnavailableError("kubectl is not here; install it, or hand over what --dry-run prints yourself")

    def submit(self, plan: StartPlan, secrets: Mapping[str, str]) -> str:
        """Creates the key of the run's meeting, then its objects; returns the run's id, namespace/kind/name.

        The values of secrets stay here: pods take theirs from the Secret that the job names.
        """
        name = object_name(plan.name, plan.run_id)
        assert plan.submission is not None, "plan() made it"
        job = f"{self._options.namespace}/{self._options.kind.lower()}/{name}"
        key = ("create", "secret", "generic", f"{name}-key", "--from-file=key=/dev/stdin")
        self._run(*key, text=tokens.token_hex(32))
        try:
            self._run("create", "-f", "-", text=plan.submission.script)
        except UnavailableError:
            self._delete(job)
            raise
        return job

    def status(self, job: str) -> Job:
        """What the cluster says of an id."""
        _, kind, name = job.split("/")
        try:
            told = json.loads(self._run("get", kind, name, "--ignore-not-found", "-o", "json") or "{}")
        except UnavailableError as error:
            return Job("unknown", str(error))
        found = _state(told)
        return self._blamed(found, name) if found.exit_code else found

    def _blamed(self, found: Job, name: str) -> Job:
        """A run that failed, with its pods that went with their nodes, as far as the cluster still has them."""
        selector = f"jobset.sigs.k8s.io/jobset-name={name}"
        try:
            pods = json.loads(self._run("get", "pods", "--selector", selector, "-o", "json") or "{}")
        except (UnavailableError, ValueError):
            return found
        lost = lost_pods(pods.get("items", []))
        return replace(found, detail="; ".join([found.detail, *lost]), exit_code=LOST_CODE) if lost else found

    def logs(self, job: str, *, follow: bool = False) -> tuple[str, ...]:
        """The words that print the output of a run's pods, each line with its pod."""
        selector = f"jobset.sigs.k8s.io/jobset-name={job.split('/')[2]}"
        more = ("--follow",) if follow else ()
        words = ("logs", "--selector", selector, "--prefix", "--tail", "-1", "--max-log-requests", "1000")
        return (*_kubectl(self._options), *words, *more)

    def start_again_soon(self, job: str) -> bool:
        """Nothing: here no run is queued again."""
        del job
        return False

    def cancel(self, job: str) -> None:
        """Deletes a run's objects, and with them its pods.

        Raises:
            UnavailableError: when the cluster does not let us.
        """
        self._delete(job)

    def _delete(self, job: str) -> None:
        _, kind, name = job.split("/")
        objects = (f"{kind}/{name}", f"configmap/{name}", f"secret/{name}-key")
        self._run("delete", "--ignore-not-found", "--wait=false", *objects)

    def _run(self, *words: str, text: str = "") -> str:
        argv = (*_kubectl(self._options), *words)
        try:
            done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UnavailableError(f"kubectl {words[0]}: {error}") from error
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise UnavailableError(f"kubectl {words[0]}: {said[-1]}; see kubectl config current-context")
        return done.stdout


def _state(told: Mapping[str, Any]) -> Job:
    """What an object says of itself.

    >>> _state({"status": {"conditions": [{"type": "Failed", "status": "True", "message": "a pod failed"}]}})
    Job(state='gone', detail='Failed: a pod failed', exit_code=1)
    """
    if not told:
        return Job("gone", "there is no such object")
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
