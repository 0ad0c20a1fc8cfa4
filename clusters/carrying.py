"""What a process shows of itself in /proc/PID/environ, changed after its start.

The kernel shows the memory in which a process got its variables when it was executed, whatever became of them since,
and a fork shows its parent's. So an agent starts with a variable that only takes room, and who is forked from it writes
there by what a sweep will know it. No variable points to the room by then: the agent has dropped it.
"""

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

__all__ = ["make_room", "show"]

_ROOM = "MESHWRIGHT_ROOM"
_ROOM_BYTES = 1024
_AGAIN = "meshwright_room"  # a word of the interpreter's: what starts it may drop variables
_ENV_START = 47  # of the fields of /proc/PID/stat behind the name, see proc(5)
_ENVIRON = Path("/proc/self/environ")


def make_room() -> None:
    """Executes this program once more, with room, unless it has some; nothing may have been read or started yet."""
    if os.environ.pop(_ROOM, None) is not None or _AGAIN in sys._xoptions or not _ENVIRON.exists():
        return
    words = [sys.executable, "-X", _AGAIN, *sys.orig_argv[1:]]
    with suppress(OSError):  # such as a list of variables that is as long as can be
        os.execve(sys.executable, words, {**os.environ, _ROOM: " " * _ROOM_BYTES})


def show(variables: Mapping[str, str]) -> bool:
    """Writes variables into the room of this process; tells whether there is any, and they fit."""
    data = b"\0" + b"".join(f"{name}={value}\0".encode() for name, value in variables.items())
    address = _room()
    if address is None or len(data) > _ROOM_BYTES:
        return False
    import ctypes

    ctypes.memmove(address, data.ljust(_ROOM_BYTES, b"\0"), _ROOM_BYTES)
    return True


def _room() -> int | None:
    """Address of the room, behind its name."""
    name = _ROOM.encode() + b"="
    try:
        at = (b"\0" + _ENVIRON.read_bytes()).find(b"\0" + name)
        start = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[_ENV_START])
    except (OSError, IndexError):
        return None
    return None if at < 0 or not start else start + at + len(name)
