"""How a doctor talks with nodes: a line each, over the two pipes of whatever carries a probe there.

Every cluster gives its nodes as `Reached`. A node has a carrier of its own (ssh, srun, mpiexec, kubectl exec, an actor
of Ray), so that one that cannot be reached is named and keeps nobody else from being examined.
"""

import json
import os
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any, Protocol

from meshwright.clusters.evidence import Reach
from meshwright.clusters.telling import telling

__all__ = ["Carrier", "Line", "Reached", "Visit", "answering", "carried", "reached_by", "unique_names"]

_END_S = 2.0


class Carrier(Protocol):
    """What has a probe: a process of this machine, or what looks like one."""

    @property
    def stdin(self) -> "IO[bytes] | None":
        """What the probe reads; its end ends the probe."""

    @property
    def stdout(self) -> "IO[bytes] | None":
        """What the probe says."""

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status; subprocess.TimeoutExpired when it does not end in time."""


class Line:
    """A probe, and our end of the line to it.

    Args:
        carrier: of the probe.
        complaint: what it complained of, once it is gone.
        ends: what ends a carrier that does not end by itself, one after the other.
        end_s: how long each of them may take.
    """

    def __init__(
        self,
        carrier: Carrier,
        *,
        complaint: Callable[[], str],
        ends: Sequence[Callable[[], object]],
        end_s: float = _END_S,
    ) -> None:
        assert carrier.stdin is not None, "it was started with pipes"
        assert carrier.stdout is not None, "it was started with pipes"
        self._carrier, self._complaint, self._ends = carrier, complaint, tuple(ends)
        self._end_s = end_s
        self._in, self._out, self._rest = carrier.stdin, carrier.stdout, b""

    def fileno(self) -> int:
        """What becomes readable when the probe says something."""
        return self._out.fileno()

    def ask(self, question: Mapping[str, Any]) -> None:
        """Sends a question; a probe that is gone is found when it is read."""
        left = memoryview(json.dumps(question).encode() + b"\n")
        with suppress(OSError):
            while left:
                left = left[self._in.write(left) or 0 :]

    def read(self) -> list[dict[str, Any]] | None:
        """What has come since; None at the end of the line."""
        data = os.read(self.fileno(), 1 << 16)
        *lines, self._rest = (self._rest + data).split(b"\n")
        told = []
        for line in lines:
            with suppress(ValueError):  # what a login shell prints before the probe starts
                told.append(json.loads(line))
        return [each for each in told if isinstance(each, dict)] if data else None

    def why_gone(self) -> str:
        """Why a probe ended."""
        code = self._carrier.wait()
        return self.complaint() or f"it ended with exit code {code}"

    def complaint(self) -> str:
        """What tells most of what was complained of so far; empty where there is nothing."""
        return telling(self._complaint())

    def close(self) -> None:
        """Tells the probe to go, with what it started."""
        with suppress(OSError):
            self._in.close()

    def end(self) -> None:
        """Waits until the probe has gone, and sees to it."""
        self.close()
        for act in (lambda: None, *self._ends):
            act()
            with suppress(subprocess.TimeoutExpired):
                self._carrier.wait(self._end_s)
                break
        else:
            self._carrier.wait()
        self._out.close()


def carried(reach: Reach, environment: Mapping[str, str] | None = None) -> Line:
    """A line to a node by the process that its words start.

    Args:
        reach: of the node.
        environment: of that process; None is ours.

    Raises:
        OSError: when it cannot be started.
    """
    complaints = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the line)
    try:
        return _ProcessLine(
            subprocess.Popen(
                reach.argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                env=environment,
                start_new_session=True,
                bufsize=0,
            ),
            complaints,
        )
    except BaseException:
        complaints.close()
        raise


class _ProcessLine(Line):
    """A line by a process, whose errors go to a file."""

    def __init__(self, process: "subprocess.Popen[bytes]", complaints: IO[bytes]) -> None:
        def complaint() -> str:
            complaints.seek(0)
            return complaints.read().decode(errors="replace")

        def kill() -> None:
            os.killpg(process.pid, signal.SIGKILL)

        # what mpiexec started leads groups of its own, and is ended by it alone
        super().__init__(process, complaint=complaint, ends=(process.terminate, kill))
        self._complaints = complaints

    def end(self) -> None:
        """Waits until the process has gone, and sees to it."""
        super().end()
        self._complaints.close()


@dataclass(frozen=True)
class Reached:
    """Nodes that can be examined.

    Args:
        reaches: of every node, by its real name.
        open_line: starts the probe of one; raises OSError where it cannot.
    """

    reaches: tuple[Reach, ...]
    open_line: Callable[[Reach], Line] = carried


@dataclass(frozen=True)
class Visit:
    """An examination, as a cluster sees it.

    Args:
        environment: of what reaches nodes, without the job's secrets.
        most_s: how long nodes that others have are waited for.
        tell: says what is waited for.
    """

    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    most_s: float = 600.0
    tell: Callable[[str], object] = lambda line: None


@contextmanager
def reached_by(words: Mapping[str, Sequence[str]], by: str, visit: Visit) -> Iterator[Reached]:
    """Nodes that need nothing but the words of each.

    Args:
        words: node -> what starts its probe.
        by: as in `Reach`.
        visit: the examination.
    """
    reaches = tuple(Reach(name, tuple(each), by) for name, each in words.items())
    yield Reached(reaches, partial(carried, environment=visit.environment))


def answering(words: Mapping[str, Sequence[str]], within_s: float) -> tuple[str, ...]:
    """Nodes on which something can be run now, all asked at once.

    Args:
        words: node -> what runs something there that ends with 0.
        within_s: how long they have for it.

    >>> answering({"a": ["true"], "b": ["false"], "c": ["sleep", "60"]}, 0.5)
    ('a',)
    """
    null, until_s = subprocess.DEVNULL, time.monotonic() + within_s
    asked: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, each in words.items():
            asked[name] = subprocess.Popen(each, stdin=null, stdout=null, stderr=null, start_new_session=True)
        _wait(asked.values(), until_s)
        return tuple(name for name, each in asked.items() if each.poll() == 0)
    finally:
        _end(asked.values())


def _wait(processes: Iterable["subprocess.Popen[bytes]"], until_s: float) -> None:
    for each in processes:
        with suppress(subprocess.TimeoutExpired):
            each.wait(max(0.0, until_s - time.monotonic()))


def _end(processes: Iterable["subprocess.Popen[bytes]"]) -> None:
    """Ends those that are left, all at once; what mpiexec started is ended by it alone, so it is asked first."""
    left = [each for each in processes if each.poll() is None]
    for each in left:
        each.terminate()
    _wait(left, time.monotonic() + _END_S)
    for each in left:
        with suppress(ProcessLookupError):
            os.killpg(each.pid, signal.SIGKILL)
        each.wait()


def unique_names(places: Sequence[tuple[str, str]], mark: str = "-") -> list[str]:
    """Names of nodes: those of their machines, with the end of another name where a machine has several nodes.

    Args:
        places: machine of each node, and a name of the node that no other has.
        mark: between the two.

    >>> unique_names([("gpu1", "ab12cd34ef"), ("gpu2", "0011223344"), ("gpu2", "5566778899")])
    ['gpu1', 'gpu2-223344', 'gpu2-778899']
    """
    often = Counter(machine for machine, _ in places)
    return [machine if often[machine] == 1 else f"{machine}{mark}{name[-6:]}" for machine, name in places]
