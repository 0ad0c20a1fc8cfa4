"""Slurm's commands: how they are run, what they complain of, and what a running job asks of them."""

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from meshwright.clusters.errors import UnavailableError

__all__ = ["node_names", "requeue", "run_command", "said", "times_queued_again"]

_COMMAND_TIMEOUT_S = 60.0
_UPDATE_S = 20.0


def run_command(
    words: Sequence[str], text: str = "", env: Mapping[str, str] | None = None
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
        timeout=_COMMAND_TIMEOUT_S,
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


def requeue(job: str, without: Sequence[str] = ()) -> bool:
    """Queues a running job again under its id, for other nodes than `without`; tells whether Slurm will.

    It ends the job by SIGTERM, and us with it. That waits here until Slurm knows what nodes to leave out, which it
    only takes of a job that is in the queue.
    """
    held = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        if run_command(["scontrol", "requeue", job]).returncode not in (0, -signal.SIGTERM, -signal.SIGKILL):
            return False
        words = ["scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(without)}"]
        end_s = time.monotonic() + _UPDATE_S
        while without and run_command(words).returncode and time.monotonic() < end_s:
            time.sleep(0.2)
        return True
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
