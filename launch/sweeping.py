"""Launches a sweep: the one place that executes a `Series`.

Where the launcher follows runs itself, each gets a launcher of its own beside this one, which starts them in order,
ends them when it is interrupted, and takes them along when it dies. A queue gets one array of all.
"""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from meshwright.clusters.contract import Queue
from meshwright.clusters.slurm import SlurmQueue
from meshwright.clusters.spawn import end_warm
from meshwright.launch.background import beside, check_apart, in_background
from meshwright.launch.follow import Run
from meshwright.launch.launch import LaunchOptions, follow_run, say_detached, shown_ranks, warn_of, write_inputs
from meshwright.launch.load import OpenJob
from meshwright.launch.relaunch import Relaunch
from meshwright.launch.request import resolved_job
from meshwright.launch.rundir import RunDirError, create_run_dir, make_run_id, write_json, write_text
from meshwright.launch.runs import Known, cancel, remember
from meshwright.launch.series import Member, Series, series_of
from meshwright.launch.summary import SWEEP_FILE, Screen, conclude, follow_array
from meshwright.launch.supervise import Interrupts, now_unix_s
from meshwright.launch.sweep import SweepPlan

__all__ = ["launch_sweep"]

_LOOK_S = 0.1
_KILL_WAIT_S = 5.0


def launch_sweep(options: LaunchOptions, opened: OpenJob, sweep: SweepPlan) -> int:
    """Runs every combination to its end, or prints what it would start; returns the worst exit code.

    Args:
        options: of the command line.
        opened: the job file.
        sweep: what it asks for.

    Raises:
        MeshwrightError: for what is wrong with any of them, before anything has been started.
    """
    end_warm()  # every run has agents of its own
    base, sweep_id = Path.cwd(), options.run_id or make_run_id()
    series = series_of(opened, sweep, sweep_id, base=base, reveal=not options.dry_run)
    if options.dry_run:
        sys.stdout.write(json.dumps(series.as_dict(), indent=2) + "\n" if options.as_json else str(series))
        return 0
    refused = _check(series)
    if refused:
        return refused
    warn_of(series.members[0].plan)
    _write(series, opened, base)
    runs = tuple(each.plan.run_dir for each in series.members)
    kind = series.members[0].plan.cluster
    known = Known(sweep_id, sweep.name, kind, str(series.directory), now_unix_s(), runs=runs)
    if series.array is not None:
        return _hand_over(series, known, options)
    if not options.detach:
        return _run_all(series, known, as_json=options.as_json)
    in_background(series.directory, lambda: _run_all(series, known, as_json=False))
    say_detached(known, options)
    return 0


def _check(series: Series) -> int:
    """Looks whether all could start here and now.

    Returns:
        0, or the exit code of what was said.
    """
    for path in (series.directory, *(Path(each.plan.run_dir) for each in series.members)):
        if path.exists():
            raise RunDirError(f"logs.dir: {path} exists already; choose another --run-id, or leave it out")
    if series.array is not None:
        first = series.members[0]
        first.cluster.check(replace(first.plan, submission=series.array))
        return 0
    return check_apart((each.cluster, each.plan) for each in series.members)


def _write(series: Series, opened: OpenJob, base: Path) -> None:
    create_run_dir(series.directory, ())
    write_text(series.directory / "job.yaml", opened.text)
    told = series.as_dict()
    runs = [{name: value for name, value in run.items() if name != "plan"} for run in told["runs"]]
    write_json(series.directory / SWEEP_FILE, {**told, "runs": runs})
    for each in series.members:
        write_inputs(each.loaded, each.plan, resolved_job(each.loaded, each.plan.run_id, base))


def _known(series: Series, member: Member) -> Known:
    plan = member.plan
    shown = shown_ranks(member.loaded)
    return Known(
        plan.run_id, plan.name, plan.cluster, plan.run_dir, now_unix_s(), shown, sweep=series.sweep_id
    ).of_this_process()


def _run(series: Series, member: Member) -> int:
    """One run, in a process of its own."""
    known, cluster = _known(series, member), member.cluster
    assert not isinstance(cluster, Queue), "that one takes all at once"
    run = Run(member.loaded.job, member.plan, known.shown, tuple(member.secrets.values()), known.started_unix_s)
    relaunch = Relaunch(member.loaded, series.base, member.request, known.started_unix_s)
    return follow_run(known, run, cluster, relaunch=relaunch)


class _Running:
    """Launchers of runs, by process id."""

    def __init__(self, series: Series, screen: Screen) -> None:
        self._series, self._screen = series, screen
        self._began: dict[int, tuple[Member, float]] = {}

    def __len__(self) -> int:
        return len(self._began)

    def start(self, member: Member) -> None:
        pid = beside(Path(member.plan.run_dir), lambda: _run(self._series, member))
        self._began[pid] = (member, now_unix_s())
        self._screen(f"{member.plan.run_id} started: {member.variant}")

    def tell(self, number: int) -> None:
        for pid in self._began:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def reap(self) -> None:
        for pid, (member, began_unix_s) in list(self._began.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del self._began[pid]
                self._ended(member, os.waitstatus_to_exitcode(status), began_unix_s)

    def _ended(self, member: Member, code: int, began_unix_s: float) -> None:
        """Says it; a launcher that wrote no record gets one, so that the run is known to be over."""
        record = Path(member.plan.run_dir, "exit.json")
        code = 128 - code if code < 0 else code
        if not record.exists():
            reason = f"its launcher ended with code {code}; see launcher.log"
            told = {"run_id": member.plan.run_id, "state": "failed", "exit_code": code or 70, "reason": reason}
            write_json(record, {**told, "started_unix_s": began_unix_s, "ended_unix_s": now_unix_s()})
        state = json.loads(record.read_text())["state"]
        self._screen(f"{member.plan.run_id} {state}{f' with code {code}' if code else ''}: {member.variant}")

    def end(self) -> None:
        """Ends what is left, with grace and then without."""
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            self.tell(number)
            end_s = time.monotonic() + _KILL_WAIT_S
            while self._began and time.monotonic() < end_s:
                self.reap()
                time.sleep(_LOOK_S)


def _run_all(series: Series, known: Known, *, as_json: bool) -> int:
    """Starts runs in order, as many at a time as may be, until all are over or somebody interrupts."""
    remember(known.of_this_process())
    screen = Screen(series.directory, sys.stderr if as_json else sys.stdout)
    number, most = len(series.members), series.sweep.max_parallel
    screen(f"sweep {series.sweep_id}: {number} runs, at most {most} at a time; `meshwright logs RUN -f` shows one")
    running, told, waiting = _Running(series, screen), 0, list(series.members)
    with Interrupts() as interrupts:
        try:
            while running or (waiting and not interrupts.numbers):
                while waiting and len(running) < most and not interrupts.numbers:
                    running.start(waiting.pop(0))
                for signalled in interrupts.numbers[told:]:
                    running.tell(signalled)
                    told += 1
                running.reap()
                time.sleep(_LOOK_S)
        finally:
            running.end()
        code = 128 + interrupts.numbers[0] if interrupts.numbers else None
        return conclude(known, screen, as_json=as_json, code=code)


def _hand_over(series: Series, known: Known, options: LaunchOptions) -> int:
    """Gives all runs to the queue as one array, and looks at it unless it is to be left alone; Ctrl-C cancels it."""
    queue, array = series.members[0].cluster, series.array
    assert isinstance(queue, SlurmQueue), "the one with arrays"
    assert array is not None, "made with it"
    job = queue.submit_all(array, [(Path(each.plan.run_dir), each.secrets) for each in series.members])
    known = replace(known, job=job).of_this_process()
    remember(known)
    for each in series.members:
        remember(replace(_known(series, each), job=f"{job}_{each.variant.index}"))
    if options.detach:
        say_detached(known, options)
        return 0
    sys.stderr.write(f"meshwright: {known.cluster} has the sweep as job {job}; Ctrl-C cancels it\n")
    return follow_array(known, interrupted=lambda: cancel(known), as_json=options.as_json)
