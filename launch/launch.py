"""A launch from the job file to the exit code: load, plan, then the one place that executes the plan."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from meshwright.clusters.base import StartPlan
from meshwright.clusters.contract import Cluster, Queue
from meshwright.clusters.spawn import end_warm, warm_agent
from meshwright.launch.admission import examined_at_start
from meshwright.launch.after import after_others, wait_for_others
from meshwright.launch.background import check_apart, in_background
from meshwright.launch.capabilities import check_capabilities
from meshwright.launch.claim import check_free, claimed
from meshwright.launch.follow import Run, follow, report
from meshwright.launch.load import LoadedJob, OpenJob, check_job, open_job
from meshwright.launch.preflight import on_fit_nodes
from meshwright.launch.registry import cluster_of
from meshwright.launch.relaunch import Relaunch
from meshwright.launch.request import request_of, resolved_job
from meshwright.launch.rundir import ASKED_FILE, create_run_dir, make_run_id, write_json, write_text
from meshwright.launch.runs import Known, RunError, cancel, read_run, remember
from meshwright.launch.spares import range_of
from meshwright.launch.sweep import SweepPlan, plan_sweep
from meshwright.launch.values import check_name
from meshwright.launch.watch import watch

__all__ = ["LaunchOptions", "follow_run", "launch", "say_detached", "shown_ranks", "warn_of", "write_inputs"]

_KNOWN_S, _LOOK_S = 5.0, 0.02


@dataclass(frozen=True)
class LaunchOptions:
    """What the command line asks for.

    Args:
        path: the job file.
        overrides: dotted.key=value.
        run_id: None makes one.
        dry_run: only print the plan.
        as_json: one JSON object on standard output; the ranks' lines go to standard error.
        detach: come back as soon as the run is on its way.
    """

    path: Path
    overrides: tuple[str, ...] = ()
    run_id: str | None = None
    dry_run: bool = False
    as_json: bool = False
    detach: bool = False


def launch(options: LaunchOptions) -> int:
    """Runs a job to its end, or prints what it would start; returns the exit code.

    Args:
        options: what to launch.

    Raises:
        MeshwrightError: for what the user can mend, before anything has been started.
    """
    _check_run_id(options.run_id)
    if options.dry_run:
        return _launch(options, Path.cwd())
    with claimed(options.run_id):
        return _launch(options, Path.cwd())


def _launch(options: LaunchOptions, base: Path) -> int:
    started_unix_s = round(time.time(), 3)
    opened = open_job(options.path, options.overrides)
    sweep = plan_sweep(opened)
    if sweep is not None:
        return _sweep(options, opened, sweep)
    loaded = _fit(opened, options, base)
    run_id = options.run_id or make_run_id()
    request = after_others(request_of(loaded, run_id, base=base, reveal=not options.dry_run), loaded)
    if request.limits.after:
        end_warm()  # nobody takes it for a while
    cluster = examined_at_start(cluster_of(loaded, None if options.detach else warm_agent()), loaded, base)
    plan = cluster.plan(request)
    if options.dry_run:
        sys.stdout.write(json.dumps(plan.as_dict(), indent=2) + "\n" if options.as_json else str(plan))
        return 0
    refused = _refused(cluster, plan, detach=options.detach)
    if refused:
        return refused
    warn_of(plan)
    secrets = {secret.name: secret.value for secret in request.program.secrets}
    write_inputs(loaded, plan, resolved_job(loaded, run_id, base))
    known = Known(run_id, plan.name, plan.cluster, plan.run_dir, started_unix_s, shown_ranks(loaded))
    if isinstance(cluster, Queue):
        return _hand_over(known, cluster.submit(plan, secrets), options)
    run = Run(loaded.job, plan, known.shown, tuple(secrets.values()), started_unix_s, options.as_json)
    relaunch = Relaunch(loaded, base, request, started_unix_s)
    return _act(known, options, lambda: follow_run(known, run, cluster, relaunch=relaunch))


def _act(known: Known, options: LaunchOptions, act: Callable[[], int]) -> int:
    """Follows a run, here or in a process of its own."""
    if not options.detach:
        return act()
    in_background(Path(known.run_dir), act)
    end_s = time.monotonic() + _KNOWN_S
    while read_run(Path(known.run_dir)) is None and time.monotonic() < end_s:
        time.sleep(_LOOK_S)  # until others can find it by its id
    say_detached(known, options)
    return 0


def _refused(cluster: Cluster | Queue, plan: StartPlan, *, detach: bool) -> int:
    """Looks whether a plan could be executed here and now.

    Returns:
        0, or the exit code of what was said; what is to be said by this process is raised.
    """
    if detach and not isinstance(cluster, Queue):  # which is followed by a fork of this process
        return check_apart([(cluster, plan)])
    cluster.check(plan)
    return 0


def warn_of(plan: StartPlan) -> None:
    """Says at a launch what is dangerous about its plan."""
    if plan.meeting.warning:
        sys.stderr.write(f"meshwright: rendezvous.bind: the first node listens on {plan.meeting.warning}\n")


def _check_run_id(run_id: str | None) -> None:
    """Raises for a name that is not safe as one directory."""
    try:
        if run_id is not None:
            check_name(run_id)
    except ValueError as error:
        raise RunError(f"--run-id {run_id!r}: {error}") from None


def _fit(opened: OpenJob, options: LaunchOptions, base: Path) -> LoadedJob:
    """The job, checked, on nodes that are fit for it as far as it wants them examined."""
    loaded = check_job(opened)
    check_capabilities(loaded)
    return loaded if options.dry_run else on_fit_nodes(loaded, base)


def _sweep(options: LaunchOptions, opened: OpenJob, sweep: SweepPlan) -> int:
    from meshwright.launch.sweeping import launch_sweep  # which launches runs by this module

    return launch_sweep(options, opened, sweep)


def follow_run(known: Known, run: Run, cluster: Cluster, *, relaunch: Relaunch) -> int:
    """Starts a run and follows it to its end; returns its exit code.

    Args:
        known: what is on disk of it.
        run: what is started.
        cluster: that it is started on.
        relaunch: starts it, and again where its policy has that and its agents cannot.
    """
    remember(known.of_this_process())
    outcome = wait_for_others(known, run.plan.limits.after, sys.stderr.write)
    if outcome is not None:
        write_json(run.directory / "exit.json", outcome.as_dict())
    else:
        outcome = follow(run, partial(relaunch.first, cluster), relaunch=relaunch)
    report(run, outcome)
    return outcome.exit_code


def _hand_over(known: Known, job: str, options: LaunchOptions) -> int:
    """Looks at a run that a queue has taken, unless it is to be left alone; Ctrl-C cancels it."""
    known = replace(known, job=job).of_this_process()
    remember(known)
    if options.detach:
        say_detached(known, options)
        return 0
    sys.stderr.write(f"meshwright: {known.cluster} has the run as job {job}; Ctrl-C cancels it\n")
    cancelled: list[str] = []

    def interrupted() -> None:
        cancelled.append(cancel(known))

    now = watch(known, interrupted=interrupted, screen=sys.stderr if options.as_json else sys.stdout)
    if not Path(known.run_dir, "exit.json").exists():
        sys.stderr.write(f"meshwright: run {known.run_id} {now.state}: {now.detail}\n")
    if options.as_json:
        told = {"run_id": known.run_id, "state": now.state, "exit_code": now.exit_code, "reason": now.detail}
        sys.stdout.write(json.dumps({**told, "run_dir": known.run_dir, "job": job}) + "\n")
    return 130 if cancelled else int(now.exit_code or 0)


def say_detached(known: Known, options: LaunchOptions) -> None:
    """Says how a run that goes on by itself is found again."""
    if options.as_json:
        sys.stdout.write(json.dumps({"run_id": known.run_id, "run_dir": known.run_dir, "job": known.job}) + "\n")
    else:
        sys.stdout.write(f"run {known.run_id} goes on by itself; `meshwright attach {known.run_id}` shows it\n")
        sys.stdout.write(f"run directory: {known.run_dir}\n")


def shown_ranks(loaded: LoadedJob) -> tuple[int, ...] | None:
    """Ranks whose lines are shown; all of a program of the user that does not say which."""
    job = loaded.job
    return None if job.command is not None and "logs.show_ranks" not in loaded.keys else job.logs.show_ranks


def write_inputs(loaded: LoadedJob, plan: StartPlan, resolved: dict[str, Any]) -> None:
    """Makes a run directory with what was asked for and what is started."""
    run_dir = Path(plan.run_dir)
    check_free(run_dir)
    create_run_dir(run_dir)
    write_text(run_dir / "job.yaml", loaded.text)
    write_json(run_dir / "job.json", resolved)
    write_json(run_dir / "plan.json", plan.as_dict())
    if plan.submission is not None and range_of(loaded.job) is not None:
        asked = {**loaded.job.as_dict(), **{key: resolved[key] for key in ("logs", "checkpoint")}}
        write_json(run_dir / ASKED_FILE, {"job": asked, "plan": plan.as_dict()})
