"""Slurm's commands: how they are run, what they complain of, and what a running job asks of them."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.telling import telling

__all__ = [
    "JobNow",
    "SilentError",
    "controller_answers",
    "hasten",
    "kill_wait_s",
    "look_at",
    "need_command",
    "node_names",
    "requeue",
    "run_command",
    "said",
    "submitted",
    "times_queued_again",
]

_COMMAND_TIMEOUT_S = 60.0
_PING_S = 2.0
_SHOW_S = 5.0
_KILL_WAIT_S = 30.0  # where nothing else is set
_UPDATE_S = 20.0
_FIND_S = 30.0
_AGAIN_AFTER_S = 15


class SilentError(UnavailableError):
    """One of Slurm's commands did not end in time, so that nobody knows whether it did what it was asked for."""


def need_command(name: str) -> None:
    """Makes sure that one of Slurm's commands is here.

    Raises:
        UnavailableError: where it is not.
    """
    if shutil.which(name) is None:
        raise UnavailableError(f"cluster: there is no `{name}` on PATH; launch where Slurm's commands are")


def run_command(
    words: Sequence[str],
    text: str = "",
    env: Mapping[str, str] | None = None,
    *,
    timeout_s: float | None = None,
) -> "subprocess.CompletedProcess[str]":
    """One of Slurm's commands, run to its end; it has a minute for that unless it is given another time.

    Raises:
        UnavailableError: where there is none, or it does not end.
    """
    need_command(words[0])
    timeout_s = _COMMAND_TIMEOUT_S if timeout_s is None else timeout_s
    try:
        return subprocess.run(
            words,
            input=text,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",  # a path may hold any bytes
            timeout=timeout_s,
            env=env,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SilentError(f"`{words[0]}` did not answer in {timeout_s:g} s; is Slurm's controller up?") from None


def said(done: "subprocess.CompletedProcess[str]") -> str:
    """What a command complained of, in one line."""
    return telling(done.stderr) or f"{done.args[0]} ended with code {done.returncode}"


def submitted(words: Sequence[str], script: str, env: Mapping[str, str]) -> str:
    """Has sbatch take a job; Slurm's id of it, also where it took it without a word.

    Args:
        words: of sbatch; `--output` is no other job's.
        script: what it reads.
        env: of it, and of the job.

    Raises:
        UnavailableError: when Slurm does not take it, or nobody knows.
    """
    try:
        done = run_command(words, text=script, env=env)
    except SilentError as error:
        found = _job_with_output(next(word.partition("=")[2] for word in words if word.startswith("--output=")))
        if found is None:
            why = "and no job of this run was found; should Slurm have one after all, it will end at once"
            raise UnavailableError(f"{error} {why}") from None
        return found
    taken = re.match(r"[0-9]+", done.stdout)
    if done.returncode or taken is None:
        raise UnavailableError(f"Slurm did not take this job: {said(done)}")
    return taken.group()


def _job_with_output(output: str) -> str | None:
    """The id of this user's job with a file of output, as it was asked for; it may take a while to be there."""
    end_s = time.monotonic() + _FIND_S
    words = ["squeue", "--noheader", "--states=all", f"--user={os.getuid()}", "--Format=ArrayJobID:30,STDOUT:8192"]
    while True:
        with suppress(UnavailableError):
            rows = (line.split(None, 1) for line in run_command(words, timeout_s=_UPDATE_S).stdout.splitlines())
            found = [row[0] for row in rows if len(row) == 2 and row[1].rstrip() == output]
            if found:
                return found[0]
        if time.monotonic() >= end_s:
            return None
        time.sleep(_FIND_S / 30)


def node_names(node_list: str) -> list[str]:
    """Names of the nodes of a job, from Slurm's short form."""
    done = run_command(["scontrol", "show", "hostnames", node_list])
    if done.returncode:
        raise UnavailableError(f"scontrol show hostnames: {said(done)}")
    return done.stdout.split()


@dataclass(frozen=True)
class JobNow:
    """What Slurm says of a job that runs, or ran a moment ago.

    A job that ends is COMPLETING, whether it was cancelled or will start again; only the number tells which.

    Args:
        state: RUNNING, COMPLETING, ...
        restarts: how often it was queued again, the time it is ending for included.
        preempted: whether it has a grace until it makes room for another.
    """

    state: str
    restarts: int
    preempted: bool


def look_at(job: str) -> JobNow | None:
    """How a job is; None where Slurm does not say."""
    with suppress(UnavailableError):
        words = re.findall(r"\b(\w+)=(\S+)", run_command(["scontrol", "show", "job", job], timeout_s=_SHOW_S).stdout)
        told = dict(reversed(words))  # a comment, which comes late, may look like anything
        if told.get("Restarts", "").isdecimal():
            preempted = told.get("PreemptTime", "None") != "None"
            return JobNow(told.get("JobState", ""), int(told["Restarts"]), preempted)
    return None


def times_queued_again(job: str) -> int | None:
    """How often Slurm has queued a job again, see `JobNow`; None where it does not say."""
    now = look_at(job)
    return None if now is None else now.restarts


def kill_wait_s() -> float:
    """How long Slurm leaves a job between SIGTERM and SIGKILL."""
    with suppress(UnavailableError):
        told = run_command(["scontrol", "show", "config"], timeout_s=_SHOW_S).stdout
        found = re.search(r"^KillWait\s*=\s*([0-9]+)", told, re.MULTILINE)
        if found:
            return float(found[1])
    return _KILL_WAIT_S


def controller_answers() -> bool:
    """Whether Slurm's controller is heard of from here."""
    with suppress(UnavailableError):
        return " is UP" in run_command(["scontrol", "ping"], timeout_s=_PING_S).stdout
    return False


def requeue(job: str, without: Sequence[str] = ()) -> bool:
    """Queues a running job again under its id, for other nodes than `without`; tells whether Slurm will.

    It ends the job by SIGTERM, and us with it. That waits here until Slurm knows the rest.
    """
    held = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        with suppress(SilentError):  # it may have done it
            if run_command(["scontrol", "requeue", job]).returncode not in (0, -signal.SIGTERM, -signal.SIGKILL):
                return False
            hasten(job, without)
            return True
        return hasten(job, without)  # which only a job that waits takes
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def hasten(job: str, without: Sequence[str] = (), *, patience_s: float | None = None) -> bool:
    """Lets a job that Slurm queues again start soon, on other nodes than `without`; tells whether Slurm will.

    Slurm itself would hold it for as long as its credentials live (`AuthInfo=cred_expire`, 2 minutes), since a node
    that still ends the job must not take its new start for the old one, which it tells by the second they were made in.
    Slurm takes both only of a job that is in its queue, which it is a moment after it was told to be.
    """
    words = [f"StartTime=now+{_AGAIN_AFTER_S}", *([f"ExcNodeList={','.join(without)}"] if without else [])]
    end_s = time.monotonic() + (_UPDATE_S if patience_s is None else patience_s)
    while not _updated(job, words):
        if time.monotonic() >= end_s:
            return False
        time.sleep(0.2)
    return True


def _updated(job: str, words: Sequence[str]) -> bool:
    with suppress(UnavailableError):
        return run_command(["scontrol", "update", f"JobId={job}", *words], timeout_s=_UPDATE_S).returncode == 0
    return False
