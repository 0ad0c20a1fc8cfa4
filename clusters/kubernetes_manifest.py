"""A start plan as objects of Kubernetes: a JobSet or a Kubeflow TrainJob, and the ConfigMap that its pods read. Pure.

Secrets are never in them: a variable of a secret refers to a key of a Secret that is in the namespace already. Nothing
of a job stands where Kubernetes would expand `$(NAME)`: commands are ours, values come from the ConfigMap, as JSON
in ASCII, so that they hold any bytes.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from meshwright.clusters.base import StartPlan
from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.kubernetes_nodes import NodeChoice
from meshwright.clusters.kubernetes_policy import RESTARTS, job_policy, jobset_policy
from meshwright.clusters.kubernetes_schema import faults, schema_of

__all__ = ["MOUNT", "KubernetesOptions", "manifest", "object_name", "pod_run_dir", "written"]

MOUNT = "/meshwright"
"""Where pods keep run directories, on the volume claim if there is one."""

_MOST_BYTES = 100_000
"""The kernel takes a variable of at most 128 KiB."""


@dataclass(frozen=True)
class KubernetesOptions(NodeChoice):
    """What is asked of a cluster, besides which of its nodes.

    Args:
        image: of the pods, with meshwright in it.
        namespace: of all objects.
        kind: "JobSet" or "TrainJob".
        context: of kubectl; None is its current one.
        python: interpreter in the image.
        workdir: of ranks in the image; None is the same path as here.
        secret: name of the Secret that has the job's secrets, one key per variable.
        claim: name of the volume claim for run directories; None keeps them in the pod.
        runtime: of a TrainJob.
        resources: of each pod, such as {"nvidia.com/gpu": "8"}.
        files: name -> text of what ranks read in the run directory.
    """

    image: str
    namespace: str = "default"
    kind: str = "JobSet"
    context: str | None = None
    python: str = "python3"
    workdir: str | None = None
    secret: str | None = None
    claim: str | None = None
    runtime: str = "torch-distributed"
    resources: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


def object_name(name: str, run_id: str) -> str:
    """The name of a run's objects, which is also the start of its pods' host names.

    >>> object_name("Llama_8b", "20261126T090000Z-a1b2c3")
    'llama-8b-20261126t090000z-a1b2c3'
    """
    words = re.sub(r"[^a-z0-9]+", "-", f"{name[:16]}-{run_id[:24]}".lower()).strip("-")
    return words if words[0].isalpha() else f"r-{words}"


def pod_run_dir(plan: StartPlan) -> str:
    """A run's directory in its pods."""
    return f"{MOUNT}/runs/{plan.name}/{plan.run_id}"


def manifest(plan: StartPlan, options: KubernetesOptions) -> list[dict[str, Any]]:
    """The objects of a plan, checked against their schemas.

    Raises:
        UnavailableError: when one of them would be refused.
    """
    name = object_name(plan.name, plan.run_id)
    meta = {"name": name, "namespace": options.namespace, "labels": _labels(plan)}
    run = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "immutable": True, "data": _data(plan, options)}
    made = _jobset(plan, options) if options.kind == "JobSet" else _trainjob(plan, options)
    whole = {"apiVersion": made.pop("apiVersion"), "kind": options.kind, "metadata": meta, "spec": made}
    wrong = list(faults(whole, schema_of(options.kind)))
    if wrong:
        raise UnavailableError(f"Kubernetes would refuse this {options.kind}: {'; '.join(wrong)}")
    return [run, whole]


def written(objects: list[dict[str, Any]]) -> str:
    """Objects as the YAML that kubectl reads."""
    import yaml

    return "---\n".join(yaml.safe_dump(each, sort_keys=False, width=120) for each in objects)


def _labels(plan: StartPlan) -> dict[str, str]:
    return {"app.kubernetes.io/managed-by": "meshwright", "meshwright/run": object_name(plan.name, plan.run_id)}


def _data(plan: StartPlan, options: KubernetesOptions) -> dict[str, str]:
    inside = asdict(replace(plan, submission=None, run_dir=pod_run_dir(plan)))
    data = {"plan": json.dumps(inside), "files": json.dumps(dict(options.files))}
    for key, text in data.items():
        if len(text.encode()) > _MOST_BYTES:
            raise UnavailableError(f"the {key} of this run has {len(text)} bytes, of which a pod takes {_MOST_BYTES}")
    return data


def _environment(plan: StartPlan, options: KubernetesOptions) -> list[dict[str, Any]]:
    name = object_name(plan.name, plan.run_id)
    read = {"MESHWRIGHT_PLAN": "plan", "MESHWRIGHT_FILES": "files"}
    found = [
        {"name": variable, "valueFrom": {"configMapKeyRef": {"name": name, "key": key}}}
        for variable, key in read.items()
    ]
    found.append({"name": "MESHWRIGHT_KEY", "valueFrom": {"secretKeyRef": {"name": f"{name}-key", "key": "key"}}})
    if plan.secrets and options.secret is None:
        names = ", ".join(variable for variable, _ in plan.secrets)
        raise UnavailableError(f"secrets {names}: name the Secret that has them by cluster.secret; values never travel")
    for variable, _ in plan.secrets:
        found.append({"name": variable, "valueFrom": {"secretKeyRef": {"name": options.secret, "key": variable}}})
    return found


def _lead_s(plan: StartPlan) -> float:
    """How long ranks of a pod that has to go may take to save, before their grace begins: its last word."""
    return float(plan.nodes[0].agent[-1])


def _restarts(plan: StartPlan) -> list[dict[str, Any]]:
    """How often the JobSet has started its pods again, where it may."""
    label = {"fieldRef": {"fieldPath": f"metadata.labels['{RESTARTS}']"}}
    return [{"name": "MESHWRIGHT_RESTARTS", "valueFrom": label}] if plan.limits.max_restarts else []


def _command(plan: StartPlan) -> list[str]:
    """The words of a pod; Kubernetes takes `$$` for `$` and `$(NAME)` for a variable.

    Raises:
        UnavailableError: for bytes that a manifest cannot hold.
    """
    for word in plan.nodes[0].agent:
        if any("\ud800" <= each <= "\udfff" for each in word):
            raise UnavailableError(
                f"command: {word!r} is not Unicode text, which a manifest is; rename it in the image"
            )
    return [word.replace("$", "$$") for word in plan.nodes[0].agent]


def _resources(options: KubernetesOptions) -> dict[str, Any]:
    """Requests equal to limits: a pod of a training is never squeezed out by another."""
    return {"limits": dict(options.resources), "requests": dict(options.resources)} if options.resources else {}


def _pod(plan: StartPlan, options: KubernetesOptions) -> dict[str, Any]:
    volume = {"persistentVolumeClaim": {"claimName": options.claim}} if options.claim else {"emptyDir": {}}
    container = {
        "name": "node",
        "image": options.image,
        "command": _command(plan),
        "env": [*_environment(plan, options), *_restarts(plan)],
        "ports": [{"containerPort": plan.meeting.port}],
        "resources": _resources(options),
        "volumeMounts": [{"name": "runs", "mountPath": MOUNT}],
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": math.ceil(_lead_s(plan) + plan.limits.shutdown_grace_s) + 10,
        "automountServiceAccountToken": False,
        **options.choice(),
        "containers": [container],
        "volumes": [{"name": "runs", **volume}],
    }


def _jobset(plan: StartPlan, options: KubernetesOptions) -> dict[str, Any]:
    job = {
        "parallelism": len(plan.nodes),
        "completions": len(plan.nodes),
        "completionMode": "Indexed",
        "backoffLimit": 0,
        **job_policy(plan.limits),
        "template": {"metadata": {"labels": _labels(plan)}, "spec": _pod(plan, options)},
    }
    network = {
        "enableDNSHostnames": True,
        "publishNotReadyAddresses": True,
        "subdomain": object_name(plan.name, plan.run_id),
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "network": network,
        "failurePolicy": jobset_policy(plan.limits),
        "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job}}],
    }


def _trainjob(plan: StartPlan, options: KubernetesOptions) -> dict[str, Any]:
    if options.claim or options.choice():
        raise UnavailableError(
            "a TrainJob takes volumes and nodes from its runtime; use kind: jobset for claim or nodes"
        )
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "runtimeRef": {
            "apiGroup": "trainer.kubeflow.org",
            "kind": "ClusterTrainingRuntime",
            "name": options.runtime,
        },
        "trainer": {
            "image": options.image,
            "command": _command(plan),
            "env": _environment(plan, options),
            "numNodes": len(plan.nodes),
            **({"resourcesPerNode": _resources(options)} if options.resources else {}),
        },
    }
