"""When and how ranks die, to the millisecond, without reaping them.

One thread per rank blocks in waitid(WNOWAIT): the exact time and status are known at once, while the zombie keeps
its process id, so that its group can be killed without hitting a stranger.
"""

import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Condition, Thread
from typing import Any

from meshwright.clusters.kernel import Kernel

__all__ = ["Death", "Deaths", "exit_code_of"]


@dataclass(frozen=True)
class Death:
    """The end of one rank.

    Args:
        rank: global rank.
        code: exit code, or minus the signal that killed it.
        time_unix_s: when.
        ended_by_us: whether it was asked to end before it died.
        kernel: what the kernel says of it, in words.
    """

    rank: int
    code: int
    time_unix_s: float
    ended_by_us: bool
    kernel: str = ""

    def as_event(self, attempt: int) -> dict[str, Any]:
        """What a launcher is told of it."""
        return {"attempt": attempt, **asdict(self)}


def exit_code_of(code: int) -> int:
    """A shell's exit code of a status: 128 + N for signal N.

    >>> exit_code_of(7), exit_code_of(-9)
    (7, 137)
    """
    return 128 - code if code < 0 else code


class Deaths:
    """Watches the processes of one attempt; safe to use from several threads.

    Args:
        pids: global rank -> process id; children of this process.
        report: called once per death, from a thread of its own.
    """

    def __init__(self, pids: Mapping[int, int], report: Callable[[Death], None]) -> None:
        self.pids = dict(pids)
        self._report = report
        self._dead: dict[int, Death] = {}
        self._asked: set[int] = set()
        self._forgotten = False
        self._warned: set[int] = set()
        self._changed = Condition()
        self._kernel = Kernel()
        for rank in self.pids:
            Thread(target=self._watch, args=(rank,), name=f"rank-{rank}", daemon=True).start()

    def _watch(self, rank: int) -> None:
        code = _wait(self.pids[rank])
        now = time.time()
        with self._changed:
            asked = rank in self._asked
        death = Death(rank, code, now, asked, "" if asked or not code else self._kernel.why(self.pids[rank]))
        self._report(death)  # first, so that who waits for all deaths knows that all are reported
        with self._changed:
            self._dead[rank] = death
            self._changed.notify_all()

    @property
    def all_dead(self) -> bool:
        """Whether no process is left."""
        return len(self._dead) == len(self.pids)

    @property
    def known(self) -> list[Death]:
        """Those that have been."""
        return list(self._dead.values())

    @property
    def failed(self) -> bool:
        """Whether one ended with anything but 0."""
        return any(death.code for death in list(self._dead.values()))

    def send(self, number: signal.Signals) -> None:
        """Signals the process group of every rank that lives; their deaths count as ours from now on."""
        with self._changed:
            living = self._living()
            self._asked.update(living)
            for rank in living:
                with suppress(ProcessLookupError, PermissionError):
                    _signal_group(self.pids[rank], number)
                    _signal_group(self.pids[rank], signal.SIGCONT)  # a stopped process would not see it

    def warn(self, number: signal.Signals) -> list[int]:
        """Signals the ranks that have a handler for it, which would kill the others, once each; tells which."""
        with self._changed:
            living = self._living()
            able = [rank for rank in living if rank not in self._warned and _catches(self.pids[rank], number)]
            self._warned.update(able)
            for rank in able:
                with suppress(ProcessLookupError):
                    os.kill(self.pids[rank], number)
        return able

    @property
    def warned(self) -> list[int]:
        """Ranks that were told by `warn` that they are to leave."""
        with self._changed:
            return sorted(self._warned)

    def kill_groups(self) -> None:
        """Kills what is left of every rank's process group, unless they are forgotten."""
        with self._changed:
            living = self._living()
            self._asked.update(living)
            for rank, pid in () if self._forgotten else self.pids.items():
                with suppress(ProcessLookupError, PermissionError):
                    (_signal_group if rank in living else os.killpg)(pid, signal.SIGKILL)

    def forget(self) -> None:
        """Signals nobody any more; call before anything reaps them, which gives their process ids to others."""
        with self._changed:
            self._forgotten = True

    def _living(self) -> list[int]:
        """Ranks that may be signalled."""
        return [] if self._forgotten else [rank for rank in self.pids if rank not in self._dead]

    def wait(self, timeout_s: float) -> bool:
        """Waits until all are dead; tells whether they are."""
        with self._changed:
            return self._changed.wait_for(lambda: self.all_dead, timeout_s)


def _signal_group(pid: int, number: signal.Signals) -> None:
    """Signals the group of a rank that lives; one that has only just been forked is not yet in a group of its own."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        os.kill(pid, number)


def _catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal and lets it in, by the masks the kernel shows.

    A fork that has not begun yet has the handlers of its agent, and lets nothing in.
    """
    with suppress(OSError, StopIteration, ValueError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        caught, held = (
            int(next(line for line in lines if line.startswith(name)).split()[1], 16) for name in ("SigCgt:", "SigBlk:")
        )
        return bool((caught & ~held) >> (number - 1) & 1)
    return False


def _wait(pid: int) -> int:
    try:
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    except ChildProcessError:  # somebody reaped it: the status is lost, that it is gone is not
        return -int(signal.SIGKILL)
    assert found is not None, pid
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
