"""Arms every Python process that has this folder on its path, so that faults can be made inside of it from outside."""

import os
import runpy
import signal
import socket
import time
from collections.abc import Callable


def _crash(number: int, frame: object) -> None:
    raise RuntimeError("a crash that the lab asked for")


def _slow(flush: object, wait_s: float) -> object:
    def flush_late(descriptor: int) -> None:
        time.sleep(wait_s)
        flush(descriptor)

    return flush_late


def _armed(run: Callable[..., object]) -> Callable[..., object]:
    def run_armed(*args: object, **kwargs: object) -> object:
        signal.signal(signal.SIGRTMIN + 5, _crash)
        return run(*args, **kwargs)

    return run_armed


if "LAB_CRASH" in os.environ and "RANK" in os.environ:
    signal.signal(signal.SIGRTMIN + 5, _crash)
elif "LAB_CRASH" in os.environ:  # ranks that are forked have no start of their own
    runpy.run_module = _armed(runpy.run_module)
if "LAB_FLUSH_S" in os.environ:
    os.fsync = _slow(os.fsync, float(os.environ["LAB_FLUSH_S"]))
if socket.gethostname() == os.environ.get("LAB_SKEWED"):
    _now = time.time
    time.time = lambda: _now() + 120.0
