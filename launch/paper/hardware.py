"""The hardware that a job asks for, or that such jobs usually have."""

from dataclasses import dataclass, field
from pathlib import Path

from meshwright.clusters import calibration
from meshwright.clusters.hardware import Gpu, gpu
from meshwright.clusters.simulated.cluster import Cluster
from meshwright.clusters.simulated.efficiency import Efficiency, fitted
from meshwright.launch.errors import JobError, Problem
from meshwright.launch.load import LoadedJob
from meshwright.launch.spec.job import Job

__all__ = ["Hardware", "hardware_of"]

_USUAL_GPU = "H100"
_USUAL_NODE = 8


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What a job is predicted on.

    Args:
        cluster: of as many GPUs as the job has ranks.
        efficiency: of such hardware.
        notes: what nobody said and was assumed.
    """

    cluster: Cluster
    efficiency: Efficiency = field(default_factory=fitted)
    notes: tuple[str, ...] = ()


def hardware_of(loaded: LoadedJob, *, gpu_name: str | None = None, network_gbps: float | None = None) -> Hardware:
    """The GPUs and links that a job asks for, or those that such jobs usually have.

    Args:
        loaded: the job.
        gpu_name: of the catalog, or a .yaml of `meshwright doctor --calibrate`; `resources.gpu_type` by default.
        network_gbps: Gbit/s between nodes, per GPU and direction.

    Raises:
        JobError: for a GPU that the catalog does not know; names the nearest.
    """
    if gpu_name is not None and gpu_name.endswith((".yaml", ".yml")):
        return _calibrated(loaded, Path(gpu_name), network_gbps=network_gbps)
    job, notes = loaded.job, list[str]()
    kind = _kind(loaded, gpu_name, notes)
    per_node = _gpus_per_node(job, notes)
    if network_gbps is None and job.mesh.world_size > per_node:
        usual = 8 * kind.network_bytes_per_s / 1e9
        notes.append(
            f"nobody says how fast the network is, so {usual:g} Gb/s per GPU are taken, as usual with {kind.name}"
        )
    cluster = Cluster(
        gpu=kind,
        num_gpus=job.mesh.world_size,
        gpus_per_node=per_node,
        network_bytes_per_s=None if network_gbps is None else network_gbps * 1e9 / 8,
    )
    return Hardware(cluster=cluster, notes=tuple(notes))


def _calibrated(loaded: LoadedJob, entry: Path, *, network_gbps: float | None) -> Hardware:
    """A machine that was measured; it holds all ranks of the job."""
    ranks = loaded.job.mesh.world_size
    if network_gbps is not None:
        text = f"{entry} says how fast ranks of that machine talk; leave it out"
        raise JobError([Problem("--network-gbps", "network_gbps", text)])
    try:
        kind, reached = calibration.hardware_of(entry, ranks=ranks)
    except calibration.CalibrationError as error:
        raise JobError([Problem("--gpu", "gpu", str(error))]) from error
    return Hardware(cluster=Cluster(gpu=kind, num_gpus=ranks, gpus_per_node=ranks), efficiency=reached)


def _kind(loaded: LoadedJob, gpu_name: str | None, notes: list[str]) -> Gpu:
    name = gpu_name or loaded.job.resources.gpu_type
    if name is None:
        name = _USUAL_GPU
        notes.append(f"the job names no GPU, so {name} is taken; say which by --gpu or resources.gpu_type")
    try:
        found = gpu(name)
    except ValueError as error:
        where = "--gpu" if gpu_name else loaded.where("resources.gpu_type")
        raise JobError([Problem(where, "resources.gpu_type", str(error))]) from error
    lacks = found.lacks(loaded.job.train.precision) if loaded.job.train else None
    if lacks:
        raise JobError([Problem(loaded.where("train.precision"), "train.precision", lacks)])
    return found


def _gpus_per_node(job: Job, notes: list[str]) -> int:
    asked = job.resources.gpus_per_node or getattr(job.cluster, "gpus_per_node", None)
    per_node = asked or job.ranks_per_node or _USUAL_NODE
    if job.num_nodes == 1 and not asked and job.mesh.world_size > _USUAL_NODE:
        per_node = _USUAL_NODE
        notes.append(f"{job.mesh.world_size} ranks do not fit one node, so nodes of {per_node} GPUs are taken")
    return int(per_node)
