"""Nodes of Slurm, as a doctor reaches them: one step per node, in an allocation of its own or in that of a run.

Both follow from the plan of the job: what `sbatch` would be told, `salloc` is, and what starts agents starts probes.
The allocation lasts as long as a `cat` that reads from us, so it goes back whatever becomes of us. A step per node
tells which node does not answer; of one step for all, Slurm tells only that it failed.
"""

import os
import re
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from itertools import takewhile
from typing import IO

from meshwright.clusters.base import Submission
from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.probe import PROBE_ARGV
from meshwright.clusters.reaching import Reached, Visit, reached_by
from meshwright.clusters.slurm_commands import need_command, node_names, run_command
from meshwright.clusters.telling import telling

__all__ = ["allocation_words", "reached_by_slurm", "reached_in_job", "step_words"]

_MOST_S = 900
_LOOK_S = 2.0
_SQUEUE_S = 20.0
_END_S = 10.0
_HOLD = 'echo "$SLURM_JOB_ID $SLURM_JOB_NODELIST" && exec cat'
_NOT_OURS = (
    *("parsable", "output", "open-mode", "signal", "requeue", "no-requeue", "chdir", "dependency"),
    *("kill-on-invalid-dep", "mail-type", "mail-user", "ignore-pbs", "propagate", "test-only"),
)
"""Options of a batch job that salloc does not have, or that make no sense for a few minutes."""

_NOT_ANSWERS = ("label", "pty", "kill-on-bad-exit")
"""Options of a step that would change what a probe says."""


_OF_THE_USER = ("SLURM_JWT", "SLURM_CLUSTERS")
"""What lets somebody in, and where: no allocation sets them."""


def allocation_words(submission: Submission) -> tuple[str, ...]:
    """The exact words that get the nodes of a job for an examination; pure.

    Args:
        submission: of the job's plan.

    >>> words = ("sbatch", "--parsable", "--job-name=j", "--nodes=2", "--time=1-00:00:00")
    >>> allocation_words(Submission(words, "", ()))[:4]
    ('salloc', '--job-name=j-doctor', '--nodes=2', '--time=15')
    """
    words = [word for word in submission.argv[1:] if _name(word) not in (*_NOT_OURS, "time", "job-name")]
    own = next((word.partition("=")[2] for word in submission.argv if _name(word) == "job-name"), "meshwright")
    limit = next((word.partition("=")[2] for word in submission.argv if _name(word) == "time"), None)
    minutes = _MOST_S // 60 if limit is None else max(1, min(_MOST_S, _seconds(limit)) // 60)
    return ("salloc", f"--job-name={own}-doctor", *words, f"--time={minutes}", "sh", "-c", _HOLD)


def _name(word: str) -> str:
    return word.partition("=")[0].removeprefix("--")


def _seconds(limit: str) -> int:
    """Of days-hours:minutes:seconds.

    >>> _seconds("1-01:00:05")
    90005
    """
    days, hours, minutes, seconds = (int(each) for each in re.split("[-:]", limit))
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def step_words(submission: Submission, job: str, node: str) -> tuple[str, ...]:
    """The exact words that run a probe on one node of a job that has its nodes; pure.

    It shares all resources with other steps: one that cannot be ended would else have ranks wait for them for ever.

    Args:
        submission: of the job's plan.
        job: Slurm's id.
        node: its name.
    """
    options = list(takewhile(lambda word: word.startswith("--"), submission.step[1:]))
    python = submission.step[1 + len(options)]
    kept = [word for word in options if _name(word) not in ("nodes", "ntasks", *_NOT_ANSWERS)]
    place = (f"--jobid={job}", f"--nodelist={node}", "--nodes=1", "--ntasks=1", *kept, "--overlap", "--chdir=/")
    return ("srun", *place, python, *PROBE_ARGV[1:])


def reached_in_job(
    submission: Submission, *, job: str, nodes: Sequence[str], visit: Visit
) -> AbstractContextManager[Reached]:
    """Nodes of a job that has them.

    Args:
        submission: of the job's plan.
        job: Slurm's id.
        nodes: their names.
        visit: the examination.
    """
    return reached_by({node: step_words(submission, job, node) for node in nodes}, "slurm", visit)


@contextmanager
def reached_by_slurm(submission: Submission, num_nodes: int, visit: Visit) -> Iterator[Reached]:
    """The nodes that Slurm gives for an examination, at most so many, until this is left.

    Raises:
        UnavailableError: when it gives none in time.
    """
    free = {name: value for name, value in visit.environment.items() if _is_free(name)}
    visit = replace(visit, environment=free)
    with _allocated(allocation_words(submission), visit) as (job, nodes):
        inside = reached_in_job(submission, job=job, nodes=nodes[:num_nodes], visit=visit)
        with inside as found:
            yield found


def _is_free(name: str) -> bool:
    """Whether a variable has nothing of an allocation in which the doctor may have been called."""
    return not name.startswith(("SLURM_", "SLURMD_")) or name.startswith("SLURM_CONF") or name in _OF_THE_USER


@contextmanager
def _allocated(words: Sequence[str], visit: Visit) -> Iterator[tuple[str, list[str]]]:
    """Id and nodes of an allocation."""
    need_command(words[0])
    with tempfile.TemporaryFile() as complaints:
        holder = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env=visit.environment,
            start_new_session=True,
            bufsize=0,
        )
        given = False
        try:
            job, node_list = _granted(holder, lambda: _read(complaints), visit)
            given = True
            yield job, node_names(node_list)
        finally:
            _give_back(holder, waits=not given)


def _read(complaints: IO[bytes]) -> str:
    return os.pread(complaints.fileno(), 1 << 16, 0).decode(errors="replace")


def _granted(holder: "subprocess.Popen[bytes]", complaint: Callable[[], str], visit: Visit) -> tuple[str, str]:
    """Id and nodes, once Slurm has given them; meanwhile it is said what that waits for."""
    assert holder.stdout is not None, "it was started with a pipe"
    end_s, told, why = time.monotonic() + visit.most_s, "", "the queue"
    while not select.select([holder.stdout], [], [], min(_LOOK_S, max(0.0, end_s - time.monotonic())))[0]:
        why = _state(complaint()) or why
        if time.monotonic() >= end_s:
            raise UnavailableError(
                f"Slurm has not given the nodes within {visit.most_s:g} s: {why}; wait longer with --wait, or free some"
            )
        if why != told:
            told = why
            visit.tell(f"the examination waits for nodes: {why}; at most {visit.most_s:g} s, Ctrl-C ends it")
    words = holder.stdout.readline().decode().split()
    if len(words) != 2:
        raise UnavailableError(f"Slurm gives no nodes for an examination: {telling(complaint()) or 'salloc ended'}")
    return words[0], words[1]


def _state(complaint: str) -> str:
    """What the queue says of the allocation whose id salloc has told."""
    job = re.search(r"\b(?:job|job allocation) ([0-9]+)\b", complaint)
    if job is None:
        return ""
    with suppress(UnavailableError):
        words = ["squeue", "--noheader", f"--jobs={job[1]}", "--format=%T (%r)"]
        return f"job {job[1]} is {run_command(words, timeout_s=_SQUEUE_S).stdout.strip() or 'not there yet'}"
    return ""


def _give_back(holder: "subprocess.Popen[bytes]", *, waits: bool) -> None:
    """Ends the allocation, or takes it out of the queue."""
    assert holder.stdin is not None, "it was started with pipes"
    assert holder.stdout is not None, "it was started with pipes"
    holder.stdin.close()
    if waits:
        holder.terminate()
    try:
        holder.wait(_END_S)
    except subprocess.TimeoutExpired:
        holder.kill()  # Slurm ends what it gave at its time limit
        holder.wait()
    holder.stdout.close()
