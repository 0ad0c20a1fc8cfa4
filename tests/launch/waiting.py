"""Waiting for what other processes do."""

import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

__all__ = ["eventually", "kill_all", "least_s"]


def eventually(holds: Callable[[], bool], timeout_s: float = 120.0) -> bool:
    """Whether something comes to hold in time; how long it takes says more about the neighbours of this machine.

    Between two looks it waits twice as long as a look takes: those that start processes would keep a core busy.
    """
    end_s = time.monotonic() + timeout_s
    while (began_s := time.monotonic()) < end_s:
        if holds():
            return True
        time.sleep(min(max(0.02, 2 * (time.monotonic() - began_s)), 1.0))
    return False


def least_s(measured_s: Callable[[int], float], limit_s: float, tries: int = 3) -> float:
    """The shortest of some times, the first below a limit if one is: others on this machine only make them longer.

    >>> least_s(lambda number: 3.0 - number, limit_s=2.5)
    2.0
    """
    found_s = float("inf")
    for number in range(tries):
        found_s = min(found_s, measured_s(number))
        if found_s < limit_s:
            break
    return found_s


def kill_all(pids: Iterable[int]) -> None:
    """Ends processes, of which some may be gone by the time."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
