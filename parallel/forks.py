"""Processes that are forked from one that has imported torch; see `forking` for what that does.

It is started once for a process that asks, and again where variables have changed that may be read at imports.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, Pipe

from meshwright.parallel.errors import RankError
from meshwright.parallel.forking import Signal, Start

__all__ = ["Fork", "Forker", "forker", "learn"]

_IMPORT_S = 300.0  # to import torch may take long where the disk is slow
_END_S = 10.0
_SAID_BYTES = 8192
_DEFAULTS = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
_LATER = ("CUDA_VISIBLE_DEVICES", "GLOO_", "MASTER_", "MESHWRIGHT_", "NCCL_", "PYTEST_CURRENT_TEST", "TORCH_NCCL_")
"""Variables that nothing reads before a rank has begun; a fork gets all, but others come too late for some."""
_SHARED = ("meshwright", "transformers")
"""Packages of which a rank needs much of what its caller, or a rank before it, has imported."""
_CODE = (
    "import signal; interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "from meshwright.parallel.forking import host; host({descriptor}, {parent}, interrupt)"
)


class Fork:
    """One process; like `subprocess.Popen` as far as ranks need it."""

    def __init__(self, process: int, end: Connection, source: "Forker") -> None:
        self.pid = process
        self._end = end
        self._source = source  # which lives as long as somebody holds a process of it
        self._code: int | None = None
        self._ended = False

    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self._ended or self._end.poll()

    def ending(self) -> str:
        """Waits for the end and says how it came, such as "exit code 7" or "signal 9 (SIGKILL)"."""
        self.wait()
        return f"the end of what forked it, with {self._source.ending()}" if self._code is None else _told(self._code)

    def wait(self) -> None:
        """Until the process has ended."""
        if not self._ended:
            with suppress(EOFError, ConnectionError):  # as the kernel kills it with its parent
                self._code = self._end.recv()
            self._ended = True
            self._end.close()

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless the process has ended."""
        if not self.has_ended():
            self._source.signal(self.pid, number)


class Forker:
    """The process that forks others, and ends with this object or this process.

    Args:
        variables: environment to start it with.
    """

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._owner = os.getpid()
        self._variables = dict(variables)
        self._lock = threading.Lock()
        self._log = os.memfd_create("ranks")
        self._control, there = Pipe()
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CODE.format(descriptor=there.fileno(), parent=os.getpid())],
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=self._variables,
            )
        self._finish = weakref.finalize(self, _end, self._process, self._control, self._log)

    def serves(self, variables: Mapping[str, str]) -> bool:
        """Whether a fork would be like a process that is started with these variables, by this process."""
        names = {name for name in {*variables, *self._variables} if not name.startswith(_LATER)}
        same = all(variables.get(name) == self._variables.get(name) for name in names)
        return same and self._owner == os.getpid() and self._finish.alive and self._process.poll() is None

    def start(self, *, rank: int, log: int) -> Fork:
        """Another process, with the variables of this moment, which serves a socket.

        Args:
            rank: descriptor of its end of the socket.
            log: descriptor of what gets its errors; what it prints goes to stderr of this process.

        Raises:
            RankError: when there is none, with why.
        """
        wish = Start([*_shared(sys.modules), *_LEARNED], list(sys.path), _environment(), os.sched_getaffinity(0))
        here, there = Pipe(duplex=False)
        with self._lock, there, _opened(".") as folder:
            try:
                answer = self._ask(wish, [rank, there.fileno(), 2, log, folder])
            except (EOFError, ConnectionError, TimeoutError) as error:
                raise RankError(f"no rank could be started: {self._fate(error)}") from error
            except BaseException:
                self._finish()  # what it answers would be taken for the answer to the next wish
                raise
        if isinstance(answer, str):
            raise RankError(f"no rank could be started: {answer}")
        return Fork(answer, here, self)

    def signal(self, process: int, number: int) -> None:
        """Sends a signal to a process of this one's, unless that has ended; a fork of the owner sends none."""
        if self._owner == os.getpid() and self._finish.alive:
            with self._lock, suppress(ConnectionError):
                self._control.send(Signal(process, number))

    def ending(self) -> str:
        """Waits for the end of this process, and says how it came."""
        return _told(self._process.wait())

    def _ask(self, wish: Start, handles: list[int]) -> int | str:
        self._control.send(wish)
        with socket.fromfd(self._control.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as line:
            socket.send_fds(line, [b"\0"], handles)
        if not self._control.poll(_IMPORT_S):
            raise TimeoutError(f"torch was not imported within {_IMPORT_S:g} s")
        answer: int | str = self._control.recv()
        return answer

    def _fate(self, error: Exception) -> str:
        """Why it does not answer, and the end of what it wrote; it is ended if it has not been."""
        if isinstance(error, TimeoutError):
            self._process.kill()
        how = f"the process that forks ranks ended with {self.ending()}"
        size = os.fstat(self._log).st_size
        said = os.pread(self._log, _SAID_BYTES, max(0, size - _SAID_BYTES)).decode(errors="replace")
        self._finish()
        return f"{error if isinstance(error, TimeoutError) else how}\n{said}"


def forker() -> Forker:
    """The process to fork from, started unless there is one that serves the variables of this moment."""
    variables = _environment()
    with _CHOICE:
        if not _CURRENT or not _CURRENT[0].serves(variables):
            _CURRENT.clear()  # one that still has ranks lives as long as they
            _CURRENT.append(Forker(variables))
        return _CURRENT[0]


def learn(modules: Iterable[str]) -> None:
    """Has forks come with what ranks before them imported by themselves.

    Args:
        modules: names; only those of packages that ranks share are heeded.
    """
    _LEARNED.update(dict.fromkeys(_shared(modules)))


def _shared(modules: Iterable[str]) -> list[str]:
    return [name for name in list(modules) if name.partition(".")[0] in _SHARED]


def _environment() -> dict[str, str]:
    """Variables of a rank that is started now."""
    return {**_DEFAULTS, **os.environ}


_CHOICE = threading.Lock()
_CURRENT: list[Forker] = []
_LEARNED: dict[str, None] = {}


@contextmanager
def _opened(folder: str) -> Iterator[int]:
    """A descriptor of a folder, which may have been deleted."""
    descriptor = os.open(folder, os.O_PATH)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _end(process: subprocess.Popen[bytes], control: Connection, log: int) -> None:
    """Ends what forks, and thereby what it forked."""
    control.close()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    os.close(log)


def _told(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:  # one of those in real time
        return f"signal {-code}"
