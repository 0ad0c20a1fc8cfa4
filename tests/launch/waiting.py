"""Waiting for what other processes do."""

import time
from collections.abc import Callable

__all__ = ["eventually"]


def eventually(holds: Callable[[], bool], timeout_s: float = 30.0) -> bool:
    """Whether something comes to hold in time."""
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        if holds():
            return True
        time.sleep(0.02)
    return False
