"""A run that starts after others have ended: on Slurm the queue sees to it, elsewhere the launcher waits."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from meshwright.clusters.base import StartRequest
from meshwright.clusters.blame import Verdict
from meshwright.clusters.request import Earlier
from meshwright.launch.errors import JobError, Problem
from meshwright.launch.exits import Exit
from meshwright.launch.load import LoadedJob
from meshwright.launch.report import Outcome
from meshwright.launch.runs import Known, RunError, Standing, find_run, read_run, standing
from meshwright.launch.supervise import Interrupts, now_unix_s

__all__ = ["after_others", "wait_for_others", "why_not"]

_LOOK_S, _SLOWEST_LOOK_S = 0.2, 10.0


def after_others(request: StartRequest, loaded: LoadedJob) -> StartRequest:
    """The request, with the runs that must have ended before.

    Args:
        request: of the job.
        loaded: the job.

    Raises:
        JobError: for a run that is not known, that has failed already, or that the job's queue could not wait for.
    """
    found, problems = [], []
    for index, asked in enumerate(loaded.job.after):
        run_id, when = (asked, "ok") if isinstance(asked, str) else (asked.run, asked.when)
        key = f"after.{index}"
        try:
            found.append(_earlier(find_run(run_id), when, loaded.job.cluster.type))
        except RunError as error:
            problems.append(Problem(loaded.where(key), key, str(error)))
    if problems:
        raise JobError(problems)
    return replace(request, limits=replace(request.limits, after=tuple(found)))


def _earlier(known: Known, when: str, cluster: str) -> Earlier:
    now = standing(known)
    why = why_not(known.run_id, when, now)
    if why is not None:
        raise RunError(f"{why}; launch that again first, or write {{run: {known.run_id}, when: any}}")
    earlier = Earlier(known.run_id, known.run_dir, when)
    if cluster != "slurm" or now.over:
        return earlier
    if known.cluster != "slurm" or known.job is None:
        raise RunError(
            f"{known.run_id} goes on outside of Slurm ({now.detail}), which cannot wait for it; launch later"
        )
    return replace(earlier, job=known.job)


def why_not(run_id: str, when: str, now: Standing) -> str | None:
    """Why what comes after a run is not started; None where it is, or where the run is not over.

    >>> why_not("r1", "ok", Standing("failed", "", 7)), why_not("r1", "any", Standing("failed", "", 7))
    ('run r1 failed (exit code 7)', None)
    """
    if not now.over or when == "any" or now.state == "succeeded":
        return None
    return f"run {run_id} {now.state} (exit code {now.exit_code})"


def wait_for_others(known: Known, earlier: Sequence[Earlier], say: Callable[[str], object]) -> Outcome | None:
    """Waits until runs have ended; how this run ended where it does not start.

    Args:
        known: the run that waits.
        earlier: runs that it waits for.
        say: takes a line for people.
    """
    began_s = now_unix_s()
    with Interrupts() as interrupts:
        for each in earlier:
            why = _waited(each, interrupts, say)
            if why is not None:
                code = 128 + interrupts.numbers[0] if interrupts.numbers else int(Exit.UNAVAILABLE)
                state = "interrupted" if interrupts.numbers else "failed"
                return Outcome(known.run_id, state, code, Verdict(None), why, 0, began_s, now_unix_s())
    return None


def _waited(earlier: Earlier, interrupts: Interrupts, say: Callable[[str], object]) -> str | None:
    """Why not to start; None where one run has ended as it should."""
    look_s, said = _LOOK_S, False
    while not interrupts.numbers:
        found = read_run(Path(earlier.run_dir))
        if found is None:
            return f"after: the run directory {earlier.run_dir} of run {earlier.run_id} is gone; not started"
        now = standing(found)
        if now.over:
            why = why_not(earlier.run_id, earlier.when, now)
            return None if why is None else f"after: {why}; not started"
        if not said:
            say(f"meshwright: waiting for the end of run {earlier.run_id} ({now.state}: {now.detail})\n")
            said = True
        _sleep(look_s, interrupts)
        look_s = min(_SLOWEST_LOOK_S, look_s * 1.5)
    return f"interrupted while it waited for run {earlier.run_id}"


def _sleep(seconds: float, interrupts: Interrupts) -> None:
    end_s = time.monotonic() + seconds
    while not interrupts.numbers and time.monotonic() < end_s:
        time.sleep(min(_LOOK_S, seconds))
