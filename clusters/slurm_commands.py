"""Slurm's commands: how they are run, what they complain of, and what a running job asks of them."""

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from meshwright.clusters.errors import UnavailableError

__all__ = ["controller_answers", "hasten", "node_names", "requeue", "run_command", "said", "times_queued_again"]

_COMMAND_TIMEOUT_S = 60.0
_PING_S = 2.0
_UPDATE_S = 20.0
_AGAIN_AFTER_S = 15


def run_command(
    words: Sequence[str],
    text: str = "",
    env: Mapping[str, str] | None = None,
    *,
    timeout_s: float = _COMMAND_TIMEOUT_S,
) -> "subprocess.CompletedProcess[str]":
    """One of Slurm's commands, run to its end.

    Raises:
        UnavailableError: where there is none.
    """
    if shutil.which(words[0]) is None:
        raise UnavailableError(f"cluster: there is no `{words[0]}` on PATH; launch where Slurm's commands are")
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


def said(done: "subprocess.CompletedProcess[str]") -> str:
    """What a command complained of, in one line."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return " / ".join(lines[-3:]) or f"{done.args[0]} ended with code {done.returncode}"


def node_names(node_list: str) -> list[str]:
    """Names of the nodes of a job, from Slurm's short form."""
    done = run_command(["scontrol", "show", "hostnames", node_list])
    if done.returncode:
        raise UnavailableError(f"scontrol show hostnames: {said(done)}")
    return done.stdout.split()


def times_queued_again(job: str) -> int | None:
    """How often Slurm has queued a job again, the time it is ending for included; None where it does not say.

    A job that ends is COMPLETING, whether it was cancelled or will start again; only this number tells which.
    """
    with suppress(UnavailableError, subprocess.TimeoutExpired):
        found = re.search(r"\bRestarts=([0-9]+)", run_command(["scontrol", "show", "job", job]).stdout)
        return None if found is None else int(found[1])
    return None


def controller_answers() -> bool:
    """Whether Slurm's controller is heard of from here."""
    with suppress(UnavailableError, subprocess.TimeoutExpired):
        return " is UP" in run_command(["scontrol", "ping"], timeout_s=_PING_S).stdout
    return False


def requeue(job: str, without: Sequence[str] = ()) -> bool:
    """Queues a running job again under its id, for other nodes than `without`; tells whether Slurm will.

    It ends the job by SIGTERM, and us with it. That waits here until Slurm knows the rest.
    """
    held = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        if run_command(["scontrol", "requeue", job]).returncode not in (0, -signal.SIGTERM, -signal.SIGKILL):
            return False
        hasten(job, without)
        return True
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def hasten(job: str, without: Sequence[str] = (), *, patience_s: float = _UPDATE_S) -> bool:
    """Lets a job that Slurm queues again start soon, on other nodes than `without`; tells whether Slurm will.

    Slurm itself would hold it for as long as its credentials live (`AuthInfo=cred_expire`, 2 minutes), since a node
    that still ends the job must not take its new start for the old one, which it tells by the second they were made in.
    Slurm takes both only of a job that is in its queue, which it is a moment after it was told to be.
    """
    words = [f"StartTime=now+{_AGAIN_AFTER_S}", *([f"ExcNodeList={','.join(without)}"] if without else [])]
    end_s = time.monotonic() + patience_s
    while run_command(["scontrol", "update", f"JobId={job}", *words]).returncode:
        if time.monotonic() >= end_s:
            return False
        time.sleep(0.2)
    return True
