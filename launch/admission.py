"""Nodes of a run that are only known once it has them are examined by its own launcher, before ranks start on them."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright.clusters.contract import Admitting, Cluster, Queue
from meshwright.clusters.reaching import Reached, Visit
from meshwright.clusters.slurm_nodes import reached_in_job
from meshwright.clusters.verdicts import BAD, Diagnosis
from meshwright.launch.load import LoadedJob
from meshwright.launch.preflight import PreflightError, judged
from meshwright.launch.supervise import now_unix_s
from meshwright.launch.wishes import directories_of, wishes_for

if TYPE_CHECKING:
    from meshwright.launch.follow import Run
    from meshwright.launch.spec import Job

__all__ = ["admit", "examined_at_start", "left_out"]


def examined_at_start(cluster: Cluster | Queue, loaded: LoadedJob, base: Path) -> Cluster | Queue:
    """A cluster of a job; if it gives nodes only at the start, one that has them examined there, as the job wants.

    Args:
        cluster: of the job.
        loaded: the job.
        base: directory that relative ones start from.
    """
    job = loaded.job

    out: list[str] = []

    def see(reached: Reached) -> list[dict[str, Any]]:
        found = replace(_diagnosed(job, directories_of(loaded, base), reached), excluded=tuple(out))
        sick = judged(job.health, found)
        again = ", ".join(name for name in sick if name in out)
        if again:  # it would be for ever
            raise PreflightError(f"{again} not fit, and {job.cluster.type} gives it again; nothing started")
        out.extend(sick)
        return left_out(found, sick, attempt=-1)

    if isinstance(cluster, Admitting) and job.health.preflight:
        cluster.admit = see
    return cluster


def _diagnosed(job: "Job", directories: Sequence[str], reached: Reached) -> Diagnosis:
    """What a job's own checks find on nodes that a run of it has."""
    from meshwright.clusters.examine import examine
    from meshwright.clusters.health import diagnose

    wishes = wishes_for(job, directories)
    return diagnose(examine(reached, wishes), wishes)


def admit(
    run: "Run",
    *,
    ended: Callable[[], bool],
    without: Callable[[list[dict[str, Any]]], bool],
    examine: "Callable[[Run], Diagnosis] | None" = None,
) -> None:
    """Comes back where ranks of a run on Slurm may start.

    Args:
        run: that has its nodes.
        ended: whether the run is being ended, which speaks against no node.
        without: queues it again without nodes, each with why; comes back only where it cannot be, with False.
        examine: its nodes; a doctor by default.

    Raises:
        PreflightError: for nodes that are not fit and are not, or cannot be, left out.
    """
    health = run.job.health
    if not health.preflight:
        return
    found = (examine or _examined)(run)
    if ended():
        return
    sick = judged(health, found)
    if sick and not without(left_out(found, sick, attempt=len(run.plan.limits.past) - 1)):
        raise PreflightError(f"{', '.join(sick)} not fit, and the job cannot be queued again without; nothing started")


def _examined(run: "Run") -> Diagnosis:
    job, plan = run.job, run.plan
    assert plan.submission is not None, "a queue plans with one"
    names = [node.name for node in plan.nodes]
    directories = [plan.run_dir, *([job.checkpoint.dir] if job.checkpoint.every_steps else [])]
    inside = os.environ.get("SLURM_JOB_ID", "")
    with reached_in_job(plan.submission, job=inside, nodes=names, visit=Visit()) as reached:
        return _diagnosed(job, directories, reached)


def left_out(found: Diagnosis, sick: tuple[str, ...], *, attempt: int) -> list[dict[str, Any]]:
    """What a run keeps of nodes that it goes on without: who, why, since when.

    Args:
        found: on all nodes.
        sick: those that are left out.
        attempt: after which; -1 is before the first.
    """
    why: dict[str, str] = {}
    for each in found.verdicts:
        if each.state == BAD and each.node in sick:
            why.setdefault(each.node, f"{each.check}: {each.found}")
    common = {"attempt": attempt, "step": None, "lost": False, "time_unix_s": now_unix_s()}
    return [{"node": node, "why": why[node], **common} for node in sick]
