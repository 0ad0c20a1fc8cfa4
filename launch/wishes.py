"""What a job wants of its nodes, as a doctor asks for it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from meshwright.clusters.evidence import CHECKS, Wishes
from meshwright.clusters.kubernetes_manifest import MOUNT
from meshwright.launch.load import LoadedJob
from meshwright.launch.request import run_dir_of
from meshwright.launch.values import fill

if TYPE_CHECKING:
    from meshwright.launch.spec import Job

__all__ = ["directories_of", "wishes_for"]


def wishes_for(job: "Job", directories: Sequence[str], checks: Sequence[str] = (), *, here: bool = False) -> Wishes:
    """What a job wants of its nodes.

    Args:
        job: with its own checks, least bandwidth and so on.
        directories: that it writes to.
        checks: instead of its own; of a job without any, all.
        here: whether all its nodes are this machine, which then needs the GPUs of all.
    """
    port, reduce = job.rendezvous.port, job.health.allreduce
    wanted = checks or job.health.preflight or CHECKS
    return Wishes(
        checks=tuple(each for each in CHECKS if each in wanted),
        directories=tuple(dict.fromkeys(directories)),
        interface=job.rendezvous.interface,
        ports=(port, port) if isinstance(port, int) else job.rendezvous.port_range,
        gpus_per_node=_gpus(job, here=here),
        gpu_type=job.resources.gpu_type,
        allreduce_bytes=reduce.size,
        min_bus_bytes_per_s=None if reduce.min_busbw_gbps is None else reduce.min_busbw_gbps * 1e9,
    )


def directories_of(loaded: LoadedJob, base: Path) -> tuple[str, ...]:
    """Where runs and checkpoints lie; a run's own directory is not there yet, and those of pods are in pods."""
    job = loaded.job
    runs = run_dir_of(loaded, "doctor", base).parent
    if job.cluster.type == "kubernetes":
        runs = base = Path(MOUNT)
    checkpoints = base / fill(job.checkpoint.dir, name=job.name, run_id="doctor")
    return (str(runs), *([str(checkpoints.absolute())] if job.checkpoint.every_steps else []))


def _gpus(job: "Job", *, here: bool) -> int | None:
    """GPUs that each node must have; pretended nodes share those of this machine."""
    asked = job.resources.gpus_per_node or getattr(job.cluster, "gpus_per_node", None)
    if asked is None and job.nproc_per_node == "gpu":
        asked = 1
    return asked * job.num_nodes if asked and here else asked
