"""From the cluster a job names to the one that runs it."""

import subprocess

from meshwright.clusters.contract import Cluster
from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.local import LocalCluster
from meshwright.launch.load import LoadedJob

__all__ = ["cluster_of"]


def cluster_of(loaded: LoadedJob, warm: "subprocess.Popen[bytes] | None" = None) -> Cluster:
    """The cluster of a job.

    Args:
        loaded: the job.
        warm: an agent of this machine that was started already; only the local cluster takes it.
    """
    found = loaded.job.cluster
    if found.type == "local":
        return LocalCluster(warm)
    raise UnavailableError(f"cluster type {found.type!r} can be planned with, but not be started yet")
