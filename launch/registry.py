"""From the cluster a job names to the one that runs it."""

import os
import subprocess
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from meshwright.clusters.contract import Cluster, Queue
from meshwright.clusters.environment import inherited
from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.kubernetes import KubernetesQueue
from meshwright.clusters.kubernetes_manifest import KubernetesOptions
from meshwright.clusters.local import LocalCluster
from meshwright.clusters.slurm import SlurmOptions, SlurmQueue
from meshwright.clusters.ssh import SshCluster, SshHost, SshOptions
from meshwright.launch.engines import kubernetes_queue, mpi_cluster, ray_cluster
from meshwright.launch.load import LoadedJob

if TYPE_CHECKING:
    from meshwright.launch.spec.clusters import SlurmCluster as SlurmBlock
    from meshwright.launch.spec.clusters import SshCluster as SshBlock
    from meshwright.launch.spec.machines import Resources

__all__ = ["cluster_of", "queue_of", "ssh_options"]


def cluster_of(loaded: LoadedJob, warm: "subprocess.Popen[bytes] | None" = None) -> Cluster | Queue:
    """The cluster of a job.

    Args:
        loaded: the job.
        warm: an agent of this machine that was started already; only the local cluster takes it.
    """
    found = loaded.job.cluster
    if found.type == "local":
        return LocalCluster(warm)
    if found.type == "ssh":
        return _ssh(found, passed=inherited(loaded.job.env_pass, os.environ))
    if found.type == "mpi":
        return mpi_cluster(found)
    if found.type == "ray":
        return ray_cluster(found)
    if found.type == "kubernetes":
        return kubernetes_queue(found, loaded)
    return SlurmQueue(_slurm_options(found, loaded.job.resources))


def queue_of(kind: str, job: str) -> Queue:
    """The queue of a run that was handed over before, to ask about it and to cancel it.

    Args:
        kind: of the cluster.
        job: the queue's name of the run.

    Raises:
        UnavailableError: for a kind that this version does not have.
    """
    if kind.startswith("kubernetes"):
        return KubernetesQueue(KubernetesOptions(image="", namespace=job.partition("/")[0]))
    if kind != "slurm":
        raise UnavailableError(f"the run lies in a queue of type {kind!r}, which this version does not have")
    return SlurmQueue()


def _slurm_options(found: "SlurmBlock", resources: "Resources") -> SlurmOptions:
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
    return SlurmOptions(
        words={name: value for name, value in words.items() if value is not None} | found.sbatch,
        step=found.srun,
        time_s=found.time,
        cores_per_rank=resources.cpus_per_rank or 1,
        cores_per_node=found.cpus_per_node,
        requeue=found.requeue,
        python=found.python or sys.executable,
    )


def _ssh(found: "SshBlock", passed: Mapping[str, str]) -> SshCluster:
    python = found.python or sys.executable
    hosts = [
        SshHost(host.name, host.addr or host.name, host.slots, host.gpus, host.python or python, found.env | host.env)
        for host in found.hosts
    ]
    return SshCluster(hosts, ssh_options(found), passed)


def ssh_options(found: "SshBlock") -> SshOptions:
    """How a job's hosts are reached."""
    return SshOptions(
        user=found.user,
        port=found.port,
        identity_file=found.identity_file,
        known_hosts=found.known_hosts,
        host_keys=found.host_keys,
        jump=found.jump,
        config=found.config,
        connect_timeout_s=found.connect_timeout,
        lost_after_s=found.lost_after,
    )
