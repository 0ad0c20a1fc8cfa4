"""From the cluster a job names to the one that runs it."""

import subprocess

from meshwright.clusters.contract import Cluster, Queue
from meshwright.clusters.local import LocalCluster
from meshwright.launch.engines import kubernetes_queue, mpi_cluster, ray_cluster, slurm_queue, ssh_cluster
from meshwright.launch.load import LoadedJob

__all__ = ["cluster_of"]


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
