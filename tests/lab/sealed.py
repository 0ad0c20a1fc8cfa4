"""A program in namespaces of its own: what it starts, mounts and connects ends with it, and it ends with us.

Processes, mounts and networks of others are not seen there, and nothing has to be taken down, however we end.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from tests.lab.hosts import WITH_US

__all__ = ["SEAL", "make_folder", "sealed"]

SEAL = "MESHWRIGHT_LAB_SEAL"
"""Variable of the program: a word that the names of its folders have."""

_PREFIX = "meshwright-faults-"
_OWN = ("--mount", "--pid", "--net", "--fork", "--mount-proc", "--kill-child", "--propagation", "private")
_ENTER = """
set -e
mkdir -p /run/netns
mount -t tmpfs tmpfs /run/netns
ip link set lo up
exec "$@"
"""
_END_S = 10.0


def make_folder() -> Path:
    """A folder that all users see; that of a sealed program goes with it."""
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.environ.get(SEAL, '')}"))
    folder.chmod(0o755)
    return folder


def sealed(words: Sequence[str]) -> int:
    """Runs a program to its end; returns its exit code. A signal ends us, and first the program with all it made.

    Args:
        words: of the program.
    """
    seal = secrets.token_hex(3)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    child = None
    try:
        child = subprocess.Popen(
            [*WITH_US, "unshare", *_OWN, "bash", "-c", _ENTER, "_", *words],
            env={**os.environ, SEAL: seal},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        return child.wait()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if child is not None:
            child.kill()
            child.wait()
        _remove(seal)


def _leave(number: int, frame: FrameType | None) -> None:
    del frame
    sys.exit(128 + number)


def _remove(seal: str) -> None:
    """Removes the program's folders, to which what is being killed may still add something."""
    end_s = time.monotonic() + _END_S
    while (left := list(Path(tempfile.gettempdir()).glob(f"{_PREFIX}{seal}*"))) and time.monotonic() < end_s:
        for folder in left:
            shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)
