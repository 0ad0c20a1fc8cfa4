"""Finds and kills what a run left behind, by the run id in the environment of processes.

Process groups miss what called setsid; names and patterns hit strangers. A run id in /proc/PID/environ does neither.
Each process is held by a pidfd while its environment is read, so that a reused process id is never hit.

Run by path (`python -I -S sweep.py RUN_ID NODE ATTEMPT`) it waits for the end of its input, which ends with its parent.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["carriers", "main", "sweep"]

_PROC = Path("/proc")
_LOOKS = 2
_PAUSE_S = 0.01


def _state(pid: int) -> str:
    """One letter of the kernel; Z and X are gone, though somebody may not have reaped them yet."""
    try:
        return (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "X"


def carriers(run_id: str, node: int | None = None, attempt: int | None = None) -> Iterator[int]:
    """Process ids of this user that carry the run id (node, attempt) in their environment; this process left out."""
    wanted = [f"MESHWRIGHT_RUN_ID={run_id}".encode()]
    if node is not None:
        wanted.append(f"MESHWRIGHT_NODE={node}".encode())
    if attempt is not None:
        wanted.append(f"TORCHELASTIC_RESTART_COUNT={attempt}".encode())
    for entry in os.listdir(_PROC) if _PROC.is_dir() else ():
        if not entry.isdecimal() or int(entry) == os.getpid():
            continue
        with suppress(OSError):
            variables = (_PROC / entry / "environ").read_bytes().split(b"\0")
            if all(each in variables for each in wanted) and _state(int(entry)) not in "ZX":
                yield int(entry)


def sweep(run_id: str, node: int | None = None, attempt: int | None = None, *, timeout_s: float = 5.0) -> int:
    """Kills every process that carries the run id, again and again until none is left; tells how many it hit.

    None is left when two looks find none: the environment of a process that just executes a program cannot be read.
    """
    end_s = time.monotonic() + timeout_s
    hit: set[int] = set()
    looks = 0
    while looks < _LOOKS and time.monotonic() < end_s:
        time.sleep(_PAUSE_S if looks or hit else 0.0)
        found = list(carriers(run_id, node, attempt))
        looks = 0 if found else looks + 1
        hit.update(pid for pid in found if _kill(pid, run_id))
    return len(hit)


def _kill(pid: int, run_id: str) -> bool:
    try:
        held = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        if f"MESHWRIGHT_RUN_ID={run_id}".encode() not in (_PROC / str(pid) / "environ").read_bytes().split(b"\0"):
            return False
        signal.pidfd_send_signal(held, signal.SIGKILL)
    except OSError:
        return False
    finally:
        os.close(held)
    return True


def main() -> None:
    """Sweeps when the process that started this one is gone, however it went."""
    run_id, node, attempt = sys.argv[1:]
    sys.stdin.buffer.read()
    sweep(run_id, int(node), int(attempt))


if __name__ == "__main__":
    main()
