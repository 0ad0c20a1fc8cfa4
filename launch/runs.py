"""Runs by their id, from any terminal: what a launch leaves on disk, and how a run stands.

launch.json in the run directory says who launched it and which queue has it; a pointer under the user's state directory
(~/.local/state/meshwright/runs) says where the run directory is.
"""

import hashlib
import json
import os
import signal
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from meshwright.clusters.contract import DistantQueue
from meshwright.launch.exits import Exit
from meshwright.launch.home import user_folder
from meshwright.launch.queues import queue_of
from meshwright.launch.rundir import EXCLUDED_FILE, write_json
from meshwright.parallel.errors import MeshwrightError, nearest

__all__ = [
    "Known",
    "RunError",
    "Standing",
    "all_runs",
    "cancel",
    "fetch",
    "find_run",
    "forget_secrets",
    "read_run",
    "remember",
    "standing",
]

LAUNCH_FILE = "launch.json"


class RunError(MeshwrightError):
    """A run that cannot be found, or that is not here to be acted on."""

    exit_code = int(Exit.USAGE)


@dataclass(frozen=True)
class Known:
    """What is on disk of a launch.

    Args:
        run_id: of the run.
        name: of the job.
        cluster: its type.
        run_dir: absolute.
        started_unix_s: when it was launched.
        shown: ranks whose lines are for people; None is all.
        host: of the launcher.
        pid: of the launcher.
        began: when that process began, in the kernel's ticks, so that a number that was given again is told apart.
        job: the queue's id; None where the launcher itself follows the run.
        sweep: id of the sweep that it is a run of.
        runs: directories of its runs, where it is a sweep.
    """

    run_id: str
    name: str
    cluster: str
    run_dir: str
    started_unix_s: float
    shown: tuple[int, ...] | None = None
    host: str = ""
    pid: int = 0
    began: str = ""
    job: str | None = None
    sweep: str = ""
    runs: tuple[str, ...] = ()

    def of_this_process(self) -> "Known":
        """The same, launched by this process."""
        return replace(self, host=socket.gethostname(), pid=os.getpid(), began=_began(os.getpid()))


@dataclass(frozen=True)
class Standing:
    """How a run stands: pending, running, lost, unknown, or the state and code of its exit record."""

    state: str
    detail: str = ""
    exit_code: int | None = None

    @property
    def over(self) -> bool:
        """Whether nothing will happen any more."""
        return self.exit_code is not None


def _began(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _pointers() -> Path:
    return user_folder("XDG_STATE_HOME", ".local/state") / "meshwright" / "runs"


def remember(known: Known) -> None:
    """Writes a launch down; a state directory that cannot be written only costs the other commands."""
    write_json(Path(known.run_dir, LAUNCH_FILE), asdict(known))
    place = hashlib.sha256(known.run_dir.encode()).hexdigest()[:8]
    with suppress(OSError):
        _pointers().mkdir(mode=0o700, parents=True, exist_ok=True)
        (_pointers() / f"{known.run_id}-{place}").write_text(known.run_dir)


def read_run(run_dir: Path) -> Known | None:
    """What is known of the run of a directory; None where nothing is."""
    try:
        told = json.loads((run_dir / LAUNCH_FILE).read_text())
        shown = told.pop("shown")
        runs = tuple(told.pop("runs", ()))
        return Known(**told, shown=None if shown is None else tuple(shown), runs=runs)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def all_runs() -> list[Known]:
    """Every run of this user whose directory is still there, the newest last."""
    found = []
    for pointer in _pointers().iterdir() if _pointers().is_dir() else ():
        with suppress(OSError):
            known = read_run(Path(pointer.read_text()))
            if known is not None:
                found.append(known)
            elif not Path(pointer.read_text()).exists():
                pointer.unlink()
    return sorted(found, key=lambda each: each.started_unix_s)


def find_run(run_id: str) -> Known:
    """A run by its id, or by its directory.

    Raises:
        RunError: when there is none, or several.
    """
    known = read_run(Path(run_id))
    if known is not None:
        return known
    runs = all_runs()
    found = [each for each in runs if each.run_id == run_id]
    if len(found) == 1:
        return found[0]
    if found:
        places = ", ".join(sorted(each.run_dir for each in found))
        raise RunError(f"{run_id}: several runs have this id; name the run directory: {places}")
    ids = [each.run_id for each in runs]
    hint = nearest(run_id, ids) if ids else "nothing was launched by this user"
    raise RunError(f"no run {run_id!r} is known; {hint}")


def _record(run_dir: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(Path(run_dir, "exit.json").read_text())
    except (OSError, ValueError):
        return None
    return found


def _left_out(run_dir: str) -> str:
    """Nodes that a run goes on without, and why."""
    try:
        told = json.loads(Path(run_dir, EXCLUDED_FILE).read_text())
        return ", ".join(f"{each['node']} ({each['why']})" for each in told if "back_unix_s" not in each)
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def standing(known: Known) -> Standing:
    """How a run stands now; its own exit record decides, not what a queue remembers."""
    record = _record(known.run_dir)
    if record is not None and (known.job is None or record["state"] != "interrupted"):
        return Standing(record["state"], record["reason"], record["exit_code"])
    if known.job is not None:
        return _array(known, known.job) if known.runs else _in_queue(known, record)
    if known.host != socket.gethostname():
        return Standing("unknown", f"its launcher runs on {known.host}")
    if known.pid and _began(known.pid) == known.began:
        left_out = _left_out(known.run_dir)
        return Standing("running", f"launcher {known.pid}{f'; goes on without {left_out}' if left_out else ''}")
    return _lost()


def _array(known: Known, job: str) -> Standing:
    """How a sweep in a queue stands, which has no launcher of its own; one question for all its runs."""
    told = queue_of(known.cluster, job).status(job)
    records = [record for run_dir in known.runs if (record := _record(run_dir)) is not None]
    done = f"{len(records)} of {len(known.runs)} runs are over"
    if told.state != "gone":
        return Standing(told.state, f"job {job}: {told.detail}; {done}")
    found = [standing(run) for run_dir in known.runs if (run := read_run(Path(run_dir))) is not None]
    bad = [each for each in found if each.state != "succeeded"]
    if not bad and len(found) == len(known.runs):
        return Standing("succeeded", done, 0)
    worst = max((each.exit_code or int(Exit.UNAVAILABLE) for each in bad), default=int(Exit.UNAVAILABLE))
    return Standing("failed", f"{len(bad)} of {len(known.runs)} runs did not succeed", worst)


def _in_queue(known: Known, record: dict[str, Any] | None) -> Standing:
    assert known.job is not None, "a run of a queue"
    queue = queue_of(known.cluster, known.job)
    job = queue.status(known.job)
    if job.state != "gone":
        return Standing(job.state, f"job {known.job}: {job.detail}")
    if isinstance(queue, DistantQueue) and job.exit_code is not None:
        from meshwright.launch.fetch import end_of

        with suppress(OSError, ValueError, KeyError, MeshwrightError):  # others are listed whatever this one lacks
            end_of(known, queue, job)
    record = record or _record(known.run_dir)  # it may have been written meanwhile
    if record is not None:
        return Standing(record["state"], record["reason"], record["exit_code"])
    if job.exit_code is not None:
        return Standing("failed" if job.exit_code else "succeeded", f"job {known.job}: {job.detail}", job.exit_code)
    return _forgotten(known, job.detail)


def _forgotten(known: Known, detail: str) -> Standing:
    """Of a run without a record that its queue has no more."""
    if known.sweep and not detail and not Path(known.run_dir, "launcher.log").exists():
        # Slurm keeps nothing of a task that is taken out of an array before it began
        return Standing("cancelled", f"job {known.job} left the queue before it began", 128 + signal.SIGINT)
    if "CANCELLED" in detail:
        return Standing("cancelled", f"job {known.job}: {detail}", 128 + signal.SIGINT)
    return _lost(f"job {known.job}: {detail or 'forgotten'}")


def _lost(detail: str = "its launcher is gone") -> Standing:
    return Standing("lost", f"{detail}, and there is no exit record", int(Exit.UNAVAILABLE))


def fetch(known: Known) -> None:
    """Brings what a run said since somebody last looked, where its nodes do not share its directory with us."""
    if known.job is None:
        return
    queue = queue_of(known.cluster, known.job)
    if isinstance(queue, DistantQueue):
        from meshwright.launch.fetch import fetch as bring

        bring(known, queue)


def cancel(known: Known) -> str:
    """Ends a run, with the grace of its plan; says how it was asked. One that is lost leaves no secrets.

    Raises:
        RunError: when it is over, or its launcher is elsewhere.
        UnavailableError: when its queue cannot, or does not have it.
    """
    from meshwright.launch.looks import Looks

    now = standing(known)
    if now.over:
        if known.job is not None:
            now = Looks(known).wait()
        if now.over:
            raise RunError(f"run {known.run_id} is over: {now.state}")
    if known.job is not None:
        fetch(known)  # a queue may forget with the run what it said
        queue = queue_of(known.cluster, known.job)
        queue.cancel(known.job)
        if isinstance(queue, DistantQueue):
            from meshwright.launch.fetch import note_cancelled

            note_cancelled(known)
        forget_secrets(known, begun=now.state == "pending")
        return f"job {known.job} was cancelled"
    if now.state != "running":
        raise RunError(f"run {known.run_id}: {now.detail}; cancel it there")
    os.kill(known.pid, signal.SIGTERM)
    return f"its launcher {known.pid} was asked to end"


def forget_secrets(known: Known, *, begun: bool = True) -> None:
    """Takes away what only a start would have: a run that ends does it itself, unless it is lost.

    Args:
        known: will not start any more.
        begun: whether also of those of its runs that have begun, which are about to end.
    """
    from meshwright.clusters.files import step_folder
    from meshwright.clusters.slurm import SECRETS_FILE

    for run_dir in map(Path, (known.run_dir, *known.runs)):
        if begun or not (run_dir / "launcher.log").exists():
            for path in (run_dir / SECRETS_FILE, step_folder(run_dir) / "start.json"):
                path.unlink(missing_ok=True)
