"""Launchers that go on without their terminal, and launchers beside this one that end when it does."""

import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from meshwright.clusters.base import StartPlan
from meshwright.clusters.contract import Cluster, Queue
from meshwright.parallel.errors import MeshwrightError

__all__ = ["beside", "check_apart", "in_background"]

_PR_SET_PDEATHSIG = 1


def in_background(run_dir: Path, act: Callable[[], int]) -> None:
    """Runs `act` in a process of its own that no terminal can end; what it prints is launcher.log."""
    sys.stdout.flush()
    sys.stderr.flush()
    first = os.fork()
    if not first:
        os.setsid()
        if os.fork():
            os._exit(0)
        _become(run_dir, act)
    os.waitpid(first, 0)


def beside(run_dir: Path, act: Callable[[], int]) -> int:
    """Runs `act` in a process of its own that gets SIGTERM when this one ends; what it prints is launcher.log.

    It leads a group of its own: a Ctrl-C at the terminal reaches this process alone, which then decides.

    Returns:
        The process id; that process ends with the code of `act`.
    """
    ours, everything = os.getpid(), set(signal.Signals)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, everything)  # until the child has no handlers of ours

    def tied() -> int:
        os.setpgid(0, 0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        _end_with(ours)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return act()

    try:
        return _forked(lambda: _become(run_dir, tied))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def check_apart(starts: Iterable[tuple[Cluster | Queue, StartPlan]]) -> int:
    """Looks whether plans could be executed here and now, in a process of its own.

    What a check attaches to has threads, and a fork of this process would have none of them.

    Returns:
        0, or the exit code of what was said.
    """

    def check_all() -> int:
        for cluster, plan in starts:
            cluster.check(plan)
        return 0

    _, status = os.waitpid(_forked(lambda: _end(check_all)), 0)
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


def _forked(act: Callable[[], None]) -> int:
    """Process id of a process that runs `act`, which ends it."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        act()
    return child


def _end_with(parent: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:  # it ended before the signal was asked for
        os.kill(os.getpid(), signal.SIGKILL)


def _become(run_dir: Path, act: Callable[[], int]) -> NoReturn:
    """Runs `act`, whose output is launcher.log, and ends with its code."""

    def logged() -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        log = os.open(run_dir / "launcher.log", flags, 0o600)
        null = os.open(os.devnull, os.O_RDONLY)
        for held, number in ((null, 0), (log, 1), (log, 2)):
            os.dup2(held, number)
        return act()

    _end(logged)


def _end(act: Callable[[], int]) -> NoReturn:
    """Runs `act` and ends with its code, whatever happens."""
    code = 70
    try:
        code = act()
    except MeshwrightError as error:
        sys.stderr.write(f"meshwright: {error}\n")
        code = int(getattr(error, "exit_code", code))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
