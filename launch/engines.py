"""From the blocks of a job to the clusters that run it."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from meshwright.clusters.base import StartRequest
from meshwright.clusters.environment import inherited
from meshwright.clusters.kubernetes import KubernetesQueue
from meshwright.clusters.kubernetes_manifest import MOUNT, KubernetesOptions
from meshwright.clusters.mpi import MpiCluster, MpiOptions, implementation_of
from meshwright.clusters.pod_sizes import SIZES_FILE
from meshwright.clusters.ray import RayCluster, RayOptions
from meshwright.clusters.slurm import SlurmOptions, SlurmQueue
from meshwright.clusters.ssh import SshCluster, SshHost, SshOptions
from meshwright.launch.load import LoadedJob
from meshwright.launch.request import resolved_job
from meshwright.launch.sizes import differing

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from meshwright.launch.spec.block import Block
    from meshwright.launch.spec.clusters import KubernetesCluster as KubernetesBlock
    from meshwright.launch.spec.clusters import MpiCluster as MpiBlock
    from meshwright.launch.spec.clusters import RayCluster as RayBlock
    from meshwright.launch.spec.clusters import SlurmCluster as SlurmBlock
    from meshwright.launch.spec.clusters import SshCluster as SshBlock

__all__ = ["kubernetes_queue", "mpi_cluster", "ray_cluster", "slurm_queue", "ssh_cluster", "ssh_hosts", "ssh_options"]

Options = TypeVar("Options", bound="DataclassInstance")


def _options(kind: type[Options], block: "Block", /, **given: Any) -> Options:
    """A cluster's options: fields that a block has by the same name, and what is given besides; no python is ours."""
    shared = {field.name for field in fields(kind)} & set(type(block).model_fields)
    named = {name: getattr(block, name) for name in shared}
    if "python" in named:
        named["python"] = named["python"] or sys.executable
    return kind(**named | given)


def _said(words: Mapping[str, str | None]) -> dict[str, str]:
    """Only what was said."""
    return {name: word for name, word in words.items() if word is not None}


def ray_cluster(found: "RayBlock") -> RayCluster:
    """A Ray cluster that runs already; it is attached to when a plan is checked."""
    return RayCluster(_options(RayOptions, found, ready_timeout_s=found.ready_timeout))


def mpi_cluster(found: "MpiBlock") -> MpiCluster:
    """What one mpiexec reaches; asks it whose it is."""
    return MpiCluster(_options(MpiOptions, found, implementation=implementation_of(found.mpiexec), hosts=found.names))


def ssh_cluster(found: "SshBlock", loaded: LoadedJob) -> SshCluster:
    """Machines reached by ssh, with the variables of the launcher that ranks get."""
    return SshCluster(ssh_hosts(found), ssh_options(found), inherited(loaded.job.env_pass, os.environ))


def ssh_hosts(found: "SshBlock") -> list[SshHost]:
    """A job's hosts; what one says of itself wins over what is said of all."""
    return [
        _options(
            SshHost,
            host,
            addr=host.addr or host.name,
            python=host.python or found.python or sys.executable,
            env=found.env | host.env,
        )
        for host in found.hosts
    ]


def ssh_options(found: "SshBlock") -> SshOptions:
    """How a job's hosts are reached."""
    return _options(SshOptions, found, connect_timeout_s=found.connect_timeout, lost_after_s=found.lost_after)


def slurm_queue(found: "SlurmBlock", loaded: LoadedJob) -> SlurmQueue:
    """Slurm, through the commands of this machine; words of the job that Slurm knows by other names come first."""
    resources = loaded.job.resources
    words = {
        "partition": found.partition,
        "account": found.account,
        "qos": found.qos,
        "constraint": found.constraint,
        "reservation": found.reservation,
        "exclude": ",".join(found.exclude) or None,
        "mem": None if resources.memory_per_node is None else f"{-(-resources.memory_per_node // (1 << 20))}M",
        "exclusive": "" if resources.exclusive else None,
    }
    options = _options(
        SlurmOptions,
        found,
        words=_said(words) | found.sbatch,
        step=found.srun,
        time_s=found.time,
        cores_per_rank=resources.cpus_per_rank or 1,
        cores_per_node=found.cpus_per_node,
    )
    return SlurmQueue(options)


def kubernetes_queue(found: "KubernetesBlock", loaded: LoadedJob) -> KubernetesQueue:
    """A namespace of Kubernetes; what pods read of the job lies in their own directories."""

    def files(request: StartRequest) -> Mapping[str, str]:
        job = {"job.json": json.dumps(resolved_job(loaded, request.run_id, Path(MOUNT)))}
        sizes = differing(loaded.job)
        return {**job, SIZES_FILE: json.dumps(sizes)} if sizes else job

    resources, ranks = loaded.job.resources, loaded.job.ranks_per_node or 1
    asked = {
        "cpu": None if resources.cpus_per_rank is None else str(resources.cpus_per_rank * ranks),
        "memory": None if resources.memory_per_node is None else str(resources.memory_per_node),
    }
    kind = {"jobset": "JobSet", "trainjob": "TrainJob"}[found.kind]
    return KubernetesQueue(_options(KubernetesOptions, found, kind=kind, resources=_said(asked)), files)
