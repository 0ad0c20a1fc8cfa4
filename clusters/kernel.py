"""What the kernel of a machine says of a death: processes that it killed for want of memory, errors of GPUs.

Two sources, from a moment on: its log, where that is for this user, and how often it killed in this control group.
"""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Lock

from meshwright.clusters.xid import CRITICAL_XIDS, KMSG, parse_xids, records

__all__ = ["Kernel", "oom_kills"]

_KILLED = re.compile(r"[Oo]ut of memory: Killed process (\d+) \(")
_PROC = Path("/proc")


class Kernel:
    """Hears the kernel from now on; safe to use from several threads.

    Args:
        log: of the kernel.
    """

    def __init__(self, log: Path = KMSG) -> None:
        self._lock, self._lines, self._log = Lock(), list[str](), -1
        self._kills = oom_kills()
        with suppress(OSError):
            self._log = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
            os.lseek(self._log, 0, os.SEEK_END)

    def __del__(self) -> None:
        if self._log >= 0:
            os.close(self._log)

    def why(self, pid: int) -> str:
        """Why a process may have died, in words; empty where the kernel has nothing to say.

        Args:
            pid: of a process that has ended, in the eyes of this one.
        """
        with self._lock:
            if self._log >= 0:
                self._lines += records(self._log)
            lines = list(self._lines)
        return "; ".join([*self._of_memory(pid, lines), *_of_gpus(pid, lines)])

    def _of_memory(self, pid: int, lines: list[str]) -> Iterator[str]:
        killed = {int(found[1]) for line in lines if (found := _KILLED.search(line))}
        if pid in killed:
            yield "the kernel killed it for want of memory"
        elif oom_kills() > self._kills:
            yield "the kernel killed a process for want of memory"


def _of_gpus(pid: int, lines: list[str]) -> Iterator[str]:
    """Xids that speak of a sick GPU, or name the process."""
    for xid in dict.fromkeys(parse_xids(lines)):
        if xid.number in CRITICAL_XIDS or re.search(rf"\bpid='?{pid}\b", xid.text):
            yield f"GPU at {xid.bus_id}: Xid {xid.number}: {CRITICAL_XIDS.get(xid.number, xid.text)}"


def oom_kills(proc: Path = _PROC) -> int:
    """Processes of this one's control group that the kernel has killed for want of memory; 0 where it does not say.

    Args:
        proc: where the kernel tells of processes.
    """
    with suppress(OSError, ValueError):
        for told in _counters(proc):
            for line in told.read_text().splitlines() if told.exists() else ():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0


def _counters(proc: Path) -> Iterator[Path]:
    """Files of this process's control group that count, of the second version and of the first, as mounted here."""
    groups = [line.split(":", 2) for line in (proc / "self/cgroup").read_text().splitlines()]
    own = {name: path for number, names, path in groups for name in ("" if number == "0" else names).split(",")}
    for line in (proc / "self/mountinfo").read_text().splitlines():
        place, _, what = line.partition(" - ")
        root, mounted = place.split()[3:5]
        kind, *_, options = what.split() or [""]  # a mount may have no source
        if kind == "cgroup2":
            path, name = own.get(""), "memory.events"
        elif kind == "cgroup" and "memory" in options.split(","):
            path, name = own.get("memory"), "memory.oom_control"
        else:
            continue
        if path is not None:
            yield Path(mounted, os.path.relpath(path, root) if _inside(path, root) else "", name)


def _inside(path: str, root: str) -> bool:
    return Path(path).is_relative_to(root)
