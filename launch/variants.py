"""The jobs of a sweep, every one of them checked before any starts."""

import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from meshwright.launch.capabilities import check_capabilities
from meshwright.launch.errors import JobError, Problem
from meshwright.launch.load import LoadedJob, OpenJob, check_job, open_job
from meshwright.launch.sweep import SweepPlan, Variant, plan_sweep
from meshwright.launch.values import fill

__all__ = ["jobs_of", "load_one"]

Place = Path | str


def jobs_of(opened: OpenJob, plan: SweepPlan, clusters_file: Place | None = None) -> list[LoadedJob]:
    """The job of every run; it has no sweep any more.

    Raises:
        JobError: with every problem of any run, where the sweep or the job has the key.
    """
    found: dict[Problem, list[Variant]] = {}
    jobs = []
    for variant in plan.variants:
        try:
            jobs.append(_job(opened, variant, clusters_file))
            check_capabilities(jobs[-1])
        except JobError as error:
            for problem in error.problems:
                found.setdefault(problem, []).append(variant)
    if found:
        ordered = sorted(found, key=lambda problem: _place(problem.where))
        raise JobError([_said(problem, found[problem], len(plan.variants)) for problem in ordered])
    problems = [*_one_cluster(plan, jobs), *_apart(jobs), *_ports(plan, jobs)]
    if problems:
        raise JobError(problems)
    return jobs


def _job(opened: OpenJob, variant: Variant, clusters_file: Place | None) -> LoadedJob:
    loaded = check_job(replace(opened, root=variant.apply(opened.root)), clusters_file)
    return replace(loaded, job=loaded.job.model_copy(update={"sweep": None}))


def _place(where: str) -> tuple[int, ...]:
    """Line and column of "job.yaml:3:1"; overrides, which have none, come first."""
    return tuple(int(part) for part in where.split(":")[-2:] if part.isdecimal())


def _said(problem: Problem, variants: Sequence[Variant], total: int) -> Problem:
    """A problem with the first run that has it, unless all have."""
    if len(variants) == total:
        return problem
    first, more = variants[0], f" and {len(variants) - 1} more" if len(variants) > 1 else ""
    return replace(problem, message=f"{problem.message} (run {first.index} of the sweep{more}: {first})")


def _one_cluster(plan: SweepPlan, jobs: Sequence[LoadedJob]) -> Iterator[Problem]:
    first = jobs[0].job.cluster.type
    for variant, loaded in zip(plan.variants, jobs, strict=True):
        kind = loaded.job.cluster.type
        if kind != first:
            mark = next((each.mark for each in variant.settings if each.key.startswith("cluster")), None)
            message = f"the first run is on {first}, run {variant.index} on {kind}; a sweep runs on one kind of cluster"
            yield Problem(str(mark or loaded.where("cluster")), "cluster", message)
            return


def _apart(jobs: Sequence[LoadedJob]) -> Iterator[Problem]:
    """What two runs would write into."""

    def run_dir(loaded: LoadedJob) -> str:
        return fill(loaded.job.logs.dir, name=loaded.job.name, run_id=loaded.job.name)

    def saves(loaded: LoadedJob) -> str:
        return fill(loaded.job.checkpoint.dir, name=loaded.job.name, run_id=loaded.job.name)

    if _shared(jobs, run_dir):
        yield Problem(jobs[0].where("logs.dir"), "logs.dir", "runs of the sweep share it; put {name} or {run_id} in it")
    if jobs[0].job.command is None and _shared(jobs, saves):
        message = "runs of the sweep would continue from each other's checkpoints; put {name} in it"
        yield Problem(jobs[0].where("checkpoint.dir"), "checkpoint.dir", message)


def _shared(jobs: Sequence[LoadedJob], of: Callable[[LoadedJob], Hashable]) -> bool:
    return len({of(each) for each in jobs}) < len(jobs)


def _ports(plan: SweepPlan, jobs: Sequence[LoadedJob]) -> Iterator[Problem]:
    named = [each.job.rendezvous.port for each in jobs if isinstance(each.job.rendezvous.port, int)]
    if plan.max_parallel > 1 and len(set(named)) < len(named) and jobs[0].job.cluster.type != "kubernetes":
        message = f"{plan.max_parallel} runs at a time would meet at one port; write auto, or sweep.max_parallel: 1"
        yield Problem(jobs[0].where("rendezvous.port"), "rendezvous.port", message)


def load_one(path: Place, overrides: Sequence[str] = (), index: int | None = None) -> LoadedJob:
    """A job, or one run of its sweep; says so where none was chosen.

    Args:
        path: the job file.
        overrides: "dotted.key=value".
        index: of the run, from 0; None takes the first.

    Raises:
        JobError: when the job makes no sense, or has no such run.
    """
    opened = open_job(path, overrides)
    plan = plan_sweep(opened)
    if plan is None:
        if index is not None:
            raise JobError([Problem(f"{path}:1:1", "sweep", "--sweep-index, but the job has no sweep")])
        return check_job(opened)
    total = len(plan.variants)
    if index is not None and not 0 <= index < total:
        message = f"--sweep-index {index}: the sweep has the runs 0 to {total - 1}"
        raise JobError([Problem(str(opened.root.marks["sweep"]), "sweep", message)])
    variant = plan.variants[index or 0]
    if index is None:
        sys.stderr.write(
            f"meshwright: the job is a sweep of {total} runs; this is the first, {variant}; --sweep-index N of verify "
            "and simulate looks at another\n"
        )
    return _job(opened, variant, None)
