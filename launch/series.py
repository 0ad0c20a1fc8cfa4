"""What a sweep starts: a start plan per run and, on Slurm, the one array that holds them. A value that prints."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from meshwright.clusters.base import StartPlan, StartRequest, Submission
from meshwright.clusters.contract import Cluster, Queue
from meshwright.clusters.slurm_array import array_of, as_tasks, unlike
from meshwright.launch.admission import examined_at_start
from meshwright.launch.after import after_others
from meshwright.launch.errors import JobError, Problem
from meshwright.launch.load import LoadedJob, OpenJob
from meshwright.launch.preflight import on_fit_nodes
from meshwright.launch.registry import cluster_of
from meshwright.launch.request import request_of
from meshwright.launch.sweep import SweepPlan, Variant
from meshwright.launch.values import fill
from meshwright.launch.variants import jobs_of

__all__ = ["Member", "Series", "series_of"]


@dataclass(frozen=True)
class Member:
    """One run of a sweep, ready to start.

    Args:
        variant: its values.
        loaded: its job.
        request: what is asked of its cluster.
        cluster: that runs it.
        plan: what is started.
        secrets: values of its secrets.
    """

    variant: Variant
    loaded: LoadedJob
    request: StartRequest
    cluster: Cluster | Queue
    plan: StartPlan
    secrets: dict[str, str]


@dataclass(frozen=True)
class Series:
    """All runs of a sweep, ready to start.

    Args:
        sweep_id: groups them.
        sweep: what was asked for.
        directory: of the sweep itself.
        base: directory the launch was typed in.
        members: in order.
        array: the one submission of all; None where the launcher starts them.
    """

    sweep_id: str
    sweep: SweepPlan
    directory: Path
    base: Path
    members: tuple[Member, ...]
    array: Submission | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able values; of secrets, names and sources only."""
        runs = [
            {
                "index": each.variant.index,
                "run_id": each.plan.run_id,
                "run_dir": each.plan.run_dir,
                "set": list(each.variant.overrides),
                "plan": each.plan.as_dict(),
            }
            for each in self.members
        ]
        array = None if self.array is None else asdict(self.array)
        head = {"sweep_id": self.sweep_id, "name": self.sweep.name, "directory": str(self.directory)}
        return {**head, "max_parallel": self.sweep.max_parallel, "array": array, "runs": runs}

    def __str__(self) -> str:
        number, most = len(self.members), self.sweep.max_parallel
        cluster = self.members[0].plan.cluster
        head = [
            f"sweep {self.sweep.name}/{self.sweep_id} on {cluster}: {number} runs, at most {most} at a time",
            f"directory  {self.directory}",
            *(f"run {each.variant.index:<6} {each.plan.run_id}: {each.variant}" for each in self.members),
        ]
        if self.array is not None:
            lines = [f"           | {line}" for line in self.array.script.splitlines()]
            head += [f"submit     {shlex.join(self.array.argv)}", "script     on its standard input:", *lines]
        return "\n".join([*head, *(f"\n{_told(each.plan)}" for each in self.members)])


def _told(plan: StartPlan) -> str:
    """A plan, whose submission is the array's."""
    if plan.submission is None:
        return str(plan)
    return f"{replace(plan, submission=None)}step       {shlex.join(plan.submission.step)}\n"


def series_of(opened: OpenJob, sweep: SweepPlan, sweep_id: str, *, base: Path, reveal: bool) -> Series:
    """Everything that a sweep starts, all of it checked; starts nothing.

    Args:
        opened: the job file.
        sweep: its combinations.
        sweep_id: groups the runs.
        base: directory the launch is typed in.
        reveal: read the values of secrets; a dry run does not.

    Raises:
        MeshwrightError: for what is wrong with any of them.
    """
    members = []
    jobs = jobs_of(opened, sweep)
    for variant, loaded in zip(sweep.variants, _on_fit_nodes(jobs, base) if reveal else jobs, strict=True):
        asked = request_of(loaded, sweep.run_id(sweep_id, variant.index), base=base, reveal=reveal)
        request = after_others(asked, loaded)
        cluster = examined_at_start(cluster_of(loaded), loaded, base)
        secrets = {secret.name: secret.value for secret in request.program.secrets}
        members.append(Member(variant, loaded, request, cluster, cluster.plan(request), secrets))
    directory = (base / fill(members[0].loaded.job.logs.dir, name=sweep.name, run_id=sweep_id)).absolute()
    series = Series(sweep_id, sweep, directory, base, tuple(members))
    return _as_array(opened, series) if isinstance(members[0].cluster, Queue) else series


def _on_fit_nodes(jobs: Sequence[LoadedJob], base: Path) -> Iterator[LoadedJob]:
    """The jobs on nodes that were found fit; runs that want the same of the same nodes have them examined once."""
    found: dict[str, LoadedJob] = {}
    for loaded in jobs:
        wanted = f"{loaded.job.cluster!r} {loaded.job.health!r} {loaded.job.num_nodes}"
        if wanted not in found:
            found[wanted] = on_fit_nodes(loaded, base)
        yield replace(loaded, job=loaded.job.model_copy(update={"cluster": found[wanted].job.cluster}))


def _as_array(opened: OpenJob, series: Series) -> Series:
    plans = [each.plan for each in series.members]
    found = unlike(plans)
    if found is not None:
        index, what = found
        message = f"run {index} ({series.sweep.variants[index]}) asks Slurm for {what}; tasks of an array are alike"
        place = str(series.sweep.variants[index].settings[-1].mark)
        raise JobError([Problem(place, "sweep.grid", f"{message}; sweep over these keys with --set")])
    sweep = series.sweep
    array = array_of(plans, sweep.name, directory=series.directory, max_parallel=sweep.max_parallel)
    tasks = as_tasks(plans, array)
    members = [replace(member, plan=plan) for member, plan in zip(series.members, tasks, strict=True)]
    return replace(series, members=tuple(members), array=array)
