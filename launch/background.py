"""A launcher that goes on without its terminal."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

__all__ = ["in_background"]


def in_background(run_dir: Path, act: Callable[[], int]) -> bool:
    """Runs `act` in a process of its own that no terminal can end; what it prints is launcher.log.

    Returns:
        True in the process that was asked; the other one ends with the code of `act`.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    first = os.fork()
    if first:
        os.waitpid(first, 0)
        return True
    os.setsid()
    if os.fork():
        os._exit(0)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    log = os.open(run_dir / "launcher.log", flags, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for held, number in ((null, 0), (log, 1), (log, 2)):
        os.dup2(held, number)
    code = 70
    try:
        code = act()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
