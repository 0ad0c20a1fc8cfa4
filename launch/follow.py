"""One run from its start to its exit record: what ranks say goes to files and people, what agents say decides."""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, TextIO

from meshwright.clusters.base import StartPlan, log_name
from meshwright.clusters.blame import Blame, Verdict, judge
from meshwright.clusters.contract import Handle
from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.masking import Concealer, Mask, conceal_while
from meshwright.clusters.records import error_records, hang_record, last_words, log_end
from meshwright.launch.exits import Exit
from meshwright.launch.health_lines import HealthLines
from meshwright.launch.page.live import LivePage
from meshwright.launch.page.write import PAGE, try_to_write_page
from meshwright.launch.report import Outcome, outcome_of
from meshwright.launch.restarts import RestartLines, line_of
from meshwright.launch.rundir import EXCLUDED_FILE, RunDirError, write_json
from meshwright.launch.stream import MergedStream, Shown
from meshwright.launch.supervise import Interrupts, RunState, supervise
from meshwright.launch.trouble import trouble

if TYPE_CHECKING:
    from meshwright.launch.progress import ProgressBar
    from meshwright.launch.relaunch import Relaunch
    from meshwright.launch.spec.job import Job

__all__ = ["Run", "conclude", "follow", "places", "report"]

_HANGS = (
    "meshwright: failure.hang sees a rank from its call of start_ranks (meshwright.parallel.collectives) on; "
    "hangs of a program that does not call it are not seen"
)
_SHOWN = (("loss curve", "loss.png"), ("page", PAGE))


@dataclass(frozen=True)
class Run:
    """A run that is about to start.

    Args:
        job: what it is of.
        plan: what is started.
        shown: ranks whose lines are for people; None is all.
        secrets: their values.
        started_unix_s: when the launch began.
        as_json: lines of ranks go to standard error.
    """

    job: "Job"
    plan: StartPlan
    shown: Sequence[int] | None
    secrets: tuple[str, ...]
    started_unix_s: float
    as_json: bool = False

    @cached_property
    def mask(self) -> Mask:
        """Replaces its secrets."""
        return Mask(self.secrets)

    @property
    def directory(self) -> Path:
        """Its run directory."""
        return Path(self.plan.run_dir)


def follow(
    run: Run,
    start: Callable[[RunState, Interrupts], Handle],
    *,
    keep: Callable[[Outcome, RunState], bool] = lambda outcome, state: True,
    relaunch: "Relaunch | None" = None,
    signals: Interrupts | None = None,
) -> Outcome:
    """Starts a plan and follows it until nothing of it is left.

    Args:
        run: what is started.
        start: the one thing that starts it; it may do so by another plan, which it leaves in the state. Where it
            cannot, and somebody interrupts meanwhile, that is the end.
        keep: whether the end is the end; otherwise no exit record is written.
        relaunch: starts a run again of which nothing is left.
        signals: what collects them, where not all end the run.

    Raises:
        MeshwrightError: when it cannot be started or followed; it was ended, and its exit record says why.
    """
    with signals or Interrupts() as interrupts:
        state = RunState.of(run.plan)
        try:
            with closing(_Output(run)) as stream:
                handle = _begun(start, state, interrupts)
                while handle is not None:
                    supervise(handle, state, interrupts, watchers=stream.watchers, mask=run.mask)
                    handle = None if relaunch is None else relaunch(state, interrupts, stream.said.moved)
        except Exception as error:
            told = _recorded(run, state, error)
            raise told from (error.__cause__ if told is error else error)
        outcome = conclude(run, state, interrupts.numbers)
        return _kept(run, outcome, state, keep=keep)


def _begun(start: Callable[[RunState, Interrupts], Handle], state: RunState, interrupts: Interrupts) -> Handle | None:
    """A started run; None where it could not be had, and nobody wants it any more."""
    try:
        return start(state, interrupts)
    except UnavailableError:
        if not interrupts.numbers:
            raise
        return None


def _kept(run: Run, outcome: Outcome, state: RunState, *, keep: Callable[[Outcome, RunState], bool]) -> Outcome:
    if keep(outcome, state):
        write_json(run.directory / "exit.json", outcome.as_dict())
    _say_apart(state.apart)
    return outcome


def _recorded(run: Run, state: RunState, raised: Exception) -> Exception:
    """Writes why a run ended that could not be started or followed, as far as that can be written; what to raise."""
    error = trouble(run.directory, raised) if isinstance(raised, OSError) else raised
    times_s = (run.started_unix_s, round(time.time(), 3))
    outcome = replace(
        outcome_of(state, Verdict(None), [], times_s=times_s),
        state="failed",
        exit_code=int(getattr(error, "exit_code", Exit.INTERNAL)),
        reason=run.mask(str(error) or type(error).__name__),
        attempts=state.attempt + bool(state.attempt_unix_s),
    )
    with suppress(RunDirError):  # that it cannot be is said, and ends the launcher
        write_json(run.directory / "exit.json", outcome.as_dict())
        _write_page(run)
    return error


def _write_page(run: Run) -> None:
    """The last page of a run that logs steps; those before ask for it again."""
    if run.job.train is not None:
        try_to_write_page(run.directory)


def _say_apart(names: Sequence[str]) -> None:
    if names:
        who = ", ".join(sorted(names))
        sys.stderr.write(f"meshwright: {who} do not share the run directory; what ranks wrote there was sent here\n")


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


class _PlanOnDisk:
    """Keeps plan.json as it is executed: names of nodes may be known only once they are placed, and others left out."""

    def __init__(self, plan: StartPlan) -> None:
        self._plan = plan

    def __call__(self, state: RunState) -> None:
        if state.plan is not self._plan:
            self._plan = state.plan
            write_json(Path(state.plan.run_dir) / "plan.json", state.plan.as_dict())
            if state.losses.excluded:
                write_json(Path(state.plan.run_dir) / EXCLUDED_FILE, state.losses.excluded)


def _bar(run: Run) -> "ProgressBar":
    from meshwright.launch.progress import ProgressBar

    assert run.job.train is not None, "a bar counts the steps of a training"
    return ProgressBar(run.directory / "metrics.jsonl", run.job.train.steps)


def _pages(run: Run, write: Callable[[str], object]) -> list[LivePage]:
    """The page of a run that logs steps, while it goes on."""
    return [] if run.job.train is None else [LivePage(run.directory, write)]


class _Output:
    """Where lines of ranks go while the run lasts."""

    def __init__(self, run: Run) -> None:
        job, screen = run.job, sys.stderr if run.as_json else sys.stdout
        self._bar = _bar(run) if job.train is not None and screen.isatty() else None
        shown = Shown(
            ranks=range(run.plan.world_size) if run.shown is None else frozenset(run.shown),
            prefix=job.logs.prefix,
            keep_attempts=job.logs.keep_attempts,
            mask=run.mask,
            write=self._bar.write if self._bar else _LinePrinter(screen),
        )
        self._stream = MergedStream(run.directory, shown)
        write = self._bar.write if self._bar else _LinePrinter(sys.stderr)
        if run.plan.limits.hang_s is not None and job.train is None:
            write(_HANGS)
        self.said = RestartLines(run.mask, write, range(len(run.plan.limits.past)))
        bar = [self._bar] if self._bar else []
        self._health = HealthLines(run.directory, run.mask, write)
        self._concealer, self._ended = Concealer(run.directory, run.secrets), Event()
        self._thread = conceal_while(self._concealer, self._ended)
        self._page, on_disk = _pages(run, write), _PlanOnDisk(run.plan)
        first = (on_disk, self._stream, self.said, self._health)
        self.watchers: list[Callable[[RunState], None]] = [*first, *bar, *self._page]

    def close(self) -> None:
        self._stream.close()
        self._ended.set()
        self._thread.join()
        self._concealer.finish()
        for page in self._page:
            page.close()
        if self._bar:
            self._bar.close()


def conclude(run: Run, state: RunState, interrupts: Sequence[int], *, one_log: bool = False) -> Outcome:
    """How a run ended, from what agents said and ranks left behind.

    Args:
        run: that ended.
        state: what agents said.
        interrupts: signals to the launcher.
        one_log: whether a rank's first log has lines of all attempts.
    """
    attempt = 0 if one_log else state.attempt
    tails = {rank: log_end(run.directory / log_name(rank, attempt)) for rank in state.ends}
    records = error_records(run.directory, state.attempt_unix_s)
    hang, last = hang_record(run.directory, state.attempt_unix_s), last_words(run.directory, state.attempt)
    verdict = judge(state.ends.values(), records, tails, hang=hang, last=last)
    first = None if verdict.first is None else _masked(verdict.first, run.mask)
    victims = tuple(_masked(victim, run.mask) for victim in verdict.victims)
    verdict = Verdict(first, victims, run.mask(verdict.hang), verdict.only_lost)
    times_s = (run.started_unix_s, round(time.time(), 3))
    return outcome_of(state, verdict, interrupts, times_s=times_s)


def _masked(blame: Blame, mask: Mask) -> Blame:
    return replace(blame, traceback=mask(blame.traceback), evidence=mask(blame.evidence))


def report(run: Run, outcome: Outcome) -> None:
    """Says how a run ended, to people or as JSON."""
    if run.plan.limits.hang_s is not None and not any(run.directory.glob("ranks/*/progress.json")):
        sys.stderr.write("meshwright: failure.hang had nothing to go by: no rank called meshwright's start_ranks\n")
    if outcome.exit_code:
        sys.stderr.write(f"meshwright: {outcome}\n")
        if outcome.reason.startswith("setup failed"):
            for log in sorted(run.directory.glob("logs/setup-*.log")):
                sys.stderr.write(run.mask(f"--- end of {log}\n{log_end(log, 4096).rstrip()}\n"))
    elif outcome.restarts:
        sys.stderr.write("".join(f"meshwright: {line_of(each)}\n" for each in outcome.restarts))
    _write_page(run)
    told = places(run.directory)
    if run.as_json:
        told = json.dumps({**outcome.as_dict(), "run_dir": str(run.directory)}) + "\n"
    try:
        sys.stdout.write(told)
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads; the exit code still tells
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def places(run_dir: Path) -> str:
    """Where to look, as the last words of a launcher."""
    found = (f"{what}: {run_dir / name}\n" for what, name in _SHOWN if (run_dir / name).exists())
    return f"run directory: {run_dir}\n" + "".join(found)
