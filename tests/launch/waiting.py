"""Waiting for what other processes do."""

import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

__all__ = ["eventually", "kill_all"]


def eventually(holds: Callable[[], bool], timeout_s: float = 30.0) -> bool:
    """Whether something comes to hold in time."""
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        if holds():
            return True
        time.sleep(0.02)
    return False


def kill_all(pids: Iterable[int]) -> None:
    """Ends processes, of which some may be gone by the time."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
