"""Queues of runs that were handed over before: who only looks at runs reads no job, and imports nothing that would."""

from meshwright.clusters.contract import Queue
from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.kubernetes import KubernetesQueue
from meshwright.clusters.slurm import SlurmQueue

__all__ = ["queue_of"]


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
