"""From the blocks of a job for MPI, Ray and Kubernetes to the clusters that run it."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from meshwright.clusters.base import StartRequest
from meshwright.clusters.kubernetes import KubernetesQueue
from meshwright.clusters.kubernetes_manifest import MOUNT, KubernetesOptions
from meshwright.clusters.mpi import MpiCluster, MpiOptions, implementation_of
from meshwright.clusters.ray import RayCluster, RayOptions
from meshwright.launch.load import LoadedJob
from meshwright.launch.request import resolved_job

if TYPE_CHECKING:
    from meshwright.launch.spec.clusters import KubernetesCluster as KubernetesBlock
    from meshwright.launch.spec.clusters import MpiCluster as MpiBlock
    from meshwright.launch.spec.clusters import RayCluster as RayBlock

__all__ = ["kubernetes_queue", "mpi_cluster", "ray_cluster"]


def ray_cluster(found: "RayBlock") -> RayCluster:
    """A Ray cluster that runs already; it is attached to when a plan is checked."""
    return RayCluster(RayOptions(found.address, found.cpus_per_node, found.ready_timeout))


def mpi_cluster(found: "MpiBlock") -> MpiCluster:
    """What one mpiexec reaches; asks it whose it is."""
    python, kind = found.python or sys.executable, implementation_of(found.mpiexec)
    return MpiCluster(MpiOptions(kind, found.mpiexec, found.hostfile, python, found.extra))


def kubernetes_queue(found: "KubernetesBlock", loaded: LoadedJob) -> KubernetesQueue:
    """A namespace of Kubernetes; what pods read of the job lies in their own directories."""

    def files(request: StartRequest) -> Mapping[str, str]:
        return {"job.json": json.dumps(resolved_job(loaded, request.run_id, Path(MOUNT)))}

    resources, ranks = loaded.job.resources, loaded.job.ranks_per_node or 1
    asked = {
        "cpu": None if resources.cpus_per_rank is None else str(resources.cpus_per_rank * ranks),
        "memory": None if resources.memory_per_node is None else str(resources.memory_per_node),
    }
    options = KubernetesOptions(
        image=found.image,
        namespace=found.namespace,
        kind={"jobset": "JobSet", "trainjob": "TrainJob"}[found.kind],
        context=found.context,
        python=found.python,
        workdir=found.workdir,
        secret=found.secret,
        claim=found.claim,
        runtime=found.runtime,
        node_selector=found.node_selector,
        resources={name: amount for name, amount in asked.items() if amount is not None},
    )
    return KubernetesQueue(options, files)
