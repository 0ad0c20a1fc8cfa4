"""A launch from the job file to the exit code: load, plan, then the one place that executes the plan."""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import Popen
from typing import TYPE_CHECKING, Any, TextIO

from meshwright.clusters.base import StartPlan, StartRequest, log_name
from meshwright.clusters.contract import Cluster
from meshwright.launch.capabilities import check_capabilities
from meshwright.launch.exits import Blame, Verdict, judge
from meshwright.launch.load import LoadedJob, load_job
from meshwright.launch.logs import Mask, log_end
from meshwright.launch.registry import cluster_of
from meshwright.launch.report import Outcome, outcome_of
from meshwright.launch.request import request_of, resolved_job
from meshwright.launch.rundir import (
    RunDirError,
    create_run_dir,
    error_records,
    hang_record,
    make_run_id,
    write_json,
    write_text,
)
from meshwright.launch.stream import MergedStream, Shown
from meshwright.launch.supervise import Interrupts, RunState, supervise

if TYPE_CHECKING:
    from meshwright.launch.progress import ProgressBar

__all__ = ["LaunchOptions", "launch"]


@dataclass(frozen=True)
class LaunchOptions:
    """What the command line asks for.

    Args:
        path: the job file.
        overrides: dotted.key=value.
        run_id: None makes one.
        dry_run: only print the plan.
        as_json: one JSON object on standard output; the ranks' lines go to standard error.
    """

    path: Path
    overrides: tuple[str, ...] = ()
    run_id: str | None = None
    dry_run: bool = False
    as_json: bool = False


@dataclass(frozen=True)
class _Run:
    """One launch between its parts."""

    loaded: LoadedJob
    request: StartRequest
    plan: StartPlan
    mask: Mask
    started_unix_s: float
    as_json: bool

    @property
    def directory(self) -> Path:
        return self.request.run_dir


def launch(options: LaunchOptions, warm: "Popen[bytes] | None" = None) -> int:
    """Runs a job to its end, or prints what it would start; returns the exit code.

    Args:
        options: what to launch.
        warm: an agent that was started already.

    Raises:
        MeshwrightError: for what the user can mend, before anything has been started.
    """
    started_unix_s, base = round(time.time(), 3), Path.cwd()
    loaded = load_job(options.path, options.overrides)
    check_capabilities(loaded)
    run_id = options.run_id or make_run_id()
    request = request_of(loaded, run_id, base=base, reveal=not options.dry_run)
    cluster = cluster_of(loaded, warm)
    plan = cluster.plan(request)
    if options.dry_run:
        sys.stdout.write(json.dumps(plan.as_dict(), indent=2) + "\n" if options.as_json else str(plan))
        return 0
    cluster.check(plan)
    secrets = {secret.name: secret.value for secret in request.program.secrets}
    run = _Run(loaded, request, plan, Mask(secrets.values()), started_unix_s, options.as_json)
    _write_inputs(run, resolved_job(loaded, run_id, base))
    outcome = _execute(run, cluster, secrets)
    _tell(run, outcome)
    return outcome.exit_code


def _execute(run: _Run, cluster: Cluster, secrets: Mapping[str, str]) -> Outcome:
    """The one place that starts a plan; follows it until nothing of it is left."""
    with Interrupts() as interrupts:
        state, stream = RunState(run.plan), _Output(run)
        try:
            supervise(cluster.start(run.plan, secrets), state, interrupts, watchers=stream.watchers)
        except OSError as error:
            why = f"{run.directory}: the run was ended, since its logs cannot be written: {error.strerror}"
            raise RunDirError(f"{why}; free some space, or set logs.dir") from error
        finally:
            stream.close()
        return _conclude(run, state, interrupts.numbers)


def _write_inputs(run: _Run, resolved: dict[str, Any]) -> None:
    create_run_dir(run.directory)
    write_text(run.directory / "job.yaml", run.loaded.text)
    write_json(run.directory / "job.json", resolved)
    write_json(run.directory / "plan.json", run.plan.as_dict())


class _LinePrinter:
    """Prints lines until nobody reads them any more."""

    def __init__(self, screen: TextIO) -> None:
        self._screen: TextIO | None = screen

    def __call__(self, line: str) -> None:
        if self._screen is None:
            return
        try:
            self._screen.write(f"{line}\n")
            self._screen.flush()
        except BrokenPipeError:  # `| head`: the run goes on, its lines are in merged.log
            self._screen = None


def _bar(run: _Run) -> "ProgressBar":
    from meshwright.launch.progress import ProgressBar

    assert run.loaded.job.train is not None, "a bar counts the steps of a training"
    return ProgressBar(run.directory / "metrics.jsonl", run.loaded.job.train.steps)


class _Output:
    """Where lines of ranks go while the run lasts."""

    def __init__(self, run: _Run) -> None:
        job, screen = run.loaded.job, sys.stderr if run.as_json else sys.stdout
        self._bar = _bar(run) if job.train is not None and screen.isatty() else None
        everybody = range(run.plan.world_size)
        chosen = everybody if job.command is not None and "logs.show_ranks" not in run.loaded.keys else None
        shown = Shown(
            ranks=chosen or frozenset(job.logs.show_ranks),
            prefix=job.logs.prefix,
            keep_attempts=job.logs.keep_attempts,
            mask=run.mask,
            write=self._bar.write if self._bar else _LinePrinter(screen),
        )
        self._stream = MergedStream(run.plan, shown)
        self.watchers: list[Callable[[RunState], None]] = [self._stream, *([self._bar] if self._bar else [])]

    def close(self) -> None:
        self._stream.close()
        if self._bar:
            self._bar.close()


def _conclude(run: _Run, state: RunState, interrupts: list[int]) -> Outcome:
    tails = {rank: log_end(run.directory / log_name(rank, state.attempt)) for rank in state.ends}
    records = error_records(run.directory, state.attempt_unix_s)
    verdict = judge(state.ends.values(), records, tails, hang=hang_record(run.directory, state.attempt_unix_s))
    first = None if verdict.first is None else _masked(verdict.first, run.mask)
    verdict = Verdict(first, tuple(_masked(victim, run.mask) for victim in verdict.victims), run.mask(verdict.hang))
    times_s = (run.started_unix_s, round(time.time(), 3))
    outcome = outcome_of(state, verdict, interrupts, times_s=times_s)
    write_json(run.directory / "exit.json", outcome.as_dict())
    return outcome


def _masked(blame: Blame, mask: Mask) -> Blame:
    return replace(blame, traceback=mask(blame.traceback))


def _tell(run: _Run, outcome: Outcome) -> None:
    if run.request.limits.hang_s is not None and not any(run.directory.glob("ranks/*/progress.json")):
        sys.stderr.write("meshwright: failure.hang had nothing to go by: no rank called meshwright's start_ranks\n")
    if outcome.exit_code:
        sys.stderr.write(f"meshwright: {outcome}\n")
        if outcome.reason.startswith("setup failed"):
            for log in sorted(run.directory.glob("logs/setup-*.log")):
                sys.stderr.write(run.mask(f"--- end of {log}\n{log_end(log, 4096).rstrip()}\n"))
    told = f"run directory: {run.directory}\n"
    if run.as_json:
        told = json.dumps({**outcome.as_dict(), "run_dir": str(run.directory)}) + "\n"
    elif (run.directory / "loss.png").exists():
        told += f"loss curve: {run.directory / 'loss.png'}\n"
    try:
        sys.stdout.write(told)
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads; the exit code still tells
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
