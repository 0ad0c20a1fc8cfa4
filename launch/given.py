"""A run starts on as many nodes as its cluster gives.

Where the job names its nodes, that is known from the job. Where the cluster knows them (`Counting`), an elastic job
asks at every start how many there are; where they are not all to be had (`FewerNodesError`), it takes fewer.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace

from meshwright.clusters.base import StartPlan, StartRequest
from meshwright.clusters.contract import Cluster, Counting, Handle, Queue
from meshwright.clusters.errors import FewerNodesError
from meshwright.launch.load import LoadedJob
from meshwright.launch.sizes import shape_of, sized
from meshwright.launch.spares import fewest_of, names_of, range_of
from meshwright.launch.supervise import Interrupts

__all__ = ["counted", "counts", "started"]


def counts(loaded: LoadedJob) -> bool:
    """Whether it is left to the cluster how many nodes a job runs on."""
    return range_of(loaded.job) is not None and not names_of(loaded.job)


def counted(cluster: Cluster | Queue, loaded: LoadedJob, request: StartRequest) -> LoadedJob:
    """An elastic job with the number of nodes that its cluster has, though never fewer than it runs on.

    Args:
        cluster: of the job.
        loaded: the job; any other is as it was.
        request: what is asked of each node.

    Raises:
        UnavailableError: when the cluster does not say.
    """
    if not counts(loaded) or not isinstance(cluster, Counting):
        return loaded
    return replace(loaded, have=max(fewest_of(loaded.job), cluster.count(request)))


def started(
    cluster: Cluster,
    loaded: LoadedJob,
    planned: Callable[[LoadedJob], StartPlan],
    *,
    secrets: Mapping[str, str],
    write: Callable[[LoadedJob, StartPlan], object],
    interrupts: Interrupts,
) -> tuple[LoadedJob, StartPlan, Handle]:
    """Starts a job, if it is elastic on fewer nodes where not all are to be had; says so.

    Args:
        cluster: of the job.
        loaded: the job.
        planned: makes the plan of it on as many nodes as it has.
        secrets: their values.
        write: keeps job and plan before they are started.
        interrupts: signals to the launcher; after one no further number of nodes is tried.

    Returns:
        the job with the number of nodes it has, its plan, and the run.

    Raises:
        MeshwrightError: when it cannot be started.
    """
    while True:
        plan = planned(loaded)
        write(loaded, plan)
        try:
            return loaded, plan, cluster.start(plan, secrets)
        except FewerNodesError as error:
            if interrupts.numbers:
                raise
            loaded = _fewer(loaded, error)


def _fewer(loaded: LoadedJob, error: FewerNodesError) -> LoadedJob:
    now, fewest = sized(loaded).job.num_nodes, fewest_of(loaded.job)
    if not counts(loaded) or now <= fewest:
        raise error
    smaller = replace(loaded, have=max(fewest, min(now - 1, error.have)))
    job = sized(smaller).job
    sys.stderr.write(f"meshwright: {error}; {job.num_nodes} of at most {now} nodes are tried ({shape_of(job)})\n")
    return smaller
