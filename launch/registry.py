"""From the cluster a job names to the one that runs it."""

import subprocess

from meshwright.clusters.contract import Cluster, Queue
from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.kubernetes import KubernetesQueue
from meshwright.clusters.local import LocalCluster
from meshwright.clusters.slurm import SlurmQueue
from meshwright.launch.engines import kubernetes_queue, mpi_cluster, ray_cluster, slurm_queue, ssh_cluster
from meshwright.launch.load import LoadedJob

__all__ = ["cluster_of", "queue_of"]


def cluster_of(loaded: LoadedJob, warm: "subprocess.Popen[bytes] | None" = None) -> Cluster | Queue:
    """The cluster of a job.

    Args:
        loaded: the job.
        warm: an agent of this machine that was started already; only the local cluster takes it.
    """
    found = loaded.job.cluster
    if found.type == "local":
        return LocalCluster(warm, found.names if found.simulate_nodes > 1 else ())
    if found.type == "ssh":
        return ssh_cluster(found, loaded)
    if found.type == "mpi":
        return mpi_cluster(found)
    if found.type == "ray":
        return ray_cluster(found)
    if found.type == "kubernetes":
        return kubernetes_queue(found, loaded)
    return slurm_queue(found, loaded)


def queue_of(kind: str, job: str) -> Queue:
    """The queue of a run that was handed over before, to ask about it and to cancel it.

    Args:
        kind: type of the cluster.
        job: the queue's name of the run.

    Raises:
        UnavailableError: for a kind that this version does not have.
    """
    if kind == "kubernetes":
        return KubernetesQueue.of(job)
    if kind != "slurm":
        raise UnavailableError(f"the run lies in a queue of type {kind!r}, which this version does not have")
    return SlurmQueue()
