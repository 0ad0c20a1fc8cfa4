"""A process that imports what ranks need, and is forked for each of them; whoever asks for ranks starts it.

It computes nothing, has one thread and begins no CUDA, so that a fork of it is like a process that imported the same.
The caller sends it wishes (`Start`, `Signal`); for every rank it writes how that ended to a pipe of the rank's own. It
ends, and ends its ranks, when the caller does.
"""

import os
import pickle
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module, invalidate_caches
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from meshwright.parallel.importing import import_all

__all__ = ["NUM_HANDLES", "Signal", "Start", "draw_anew", "host"]

_POLL_S = 0.5
NUM_HANDLES = 5
"""Descriptors that come after a `Start`: the rank's socket, the pipe for its end, its stdout, stderr and folder."""


class Start(NamedTuple):
    """Another rank is wanted; its process id is the answer, or why there is none.

    Args:
        modules: what it will need of what its caller, or ranks before it, have imported.
        path: for imports.
        variables: all of its environment.
        cores: processors that it may use.
    """

    modules: Sequence[str]
    path: Sequence[str]
    variables: dict[str, str]
    cores: set[int]


class Signal(NamedTuple):
    """A rank is to be signalled, if it has not ended.

    Args:
        process: id.
        number: of the signal.
    """

    process: int
    number: int


def host(descriptor: int, parent: int, interrupt: Any) -> None:
    """Forks ranks until the parent is gone; each is a return from here into `meshwright.parallel.serving.serve`.

    Args:
        descriptor: of the socket to the parent.
        parent: process id.
        interrupt: handler of SIGINT for ranks: a Ctrl-C is theirs and the parent's, who decides what becomes of this.
    """
    import_all(["meshwright.parallel.serving"])
    serving = import_module("meshwright.parallel.serving")  # it raises what the other keeps
    rank = _Host(Connection(descriptor), parent, interrupt).work()
    if rank is not None:
        serving.serve(*rank)


class _Host:
    def __init__(self, control: Connection, parent: int, interrupt: Any) -> None:
        self._control = control
        self._parent = parent
        self._interrupt = interrupt
        self._ends: dict[int, Connection] = {}

    def work(self) -> tuple[int, int] | None:
        """None at the end; in a fork, the descriptor of its socket and its parent."""
        signal.signal(signal.SIGCHLD, lambda *_: self._reap(os.WNOHANG))
        with suppress(EOFError, ConnectionError):
            while self._is_asked():
                wish = pickle.loads(self._control.recv_bytes())
                if isinstance(wish, Signal):
                    self._send(wish.process, wish.number)
                    continue
                rank = self._start(wish)
                if rank is not None:
                    return rank
        for process in list(self._ends):
            self._send(process, signal.SIGKILL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._reap(0)
        return None

    def _is_asked(self) -> bool:
        """Waits for a wish, or for the end of a parent whose socket some other process of its still holds."""
        while not self._control.poll(_POLL_S):
            if os.getppid() != self._parent:
                return False
        return True

    def _send(self, process: int, number: int) -> None:
        if process in self._ends:  # else it was reaped, and another may have its number
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def _reap(self, options: int) -> None:
        for process in list(self._ends):  # and none of those that some import has started
            try:
                ended, status = os.waitpid(process, options)
            except ChildProcessError:  # a signal that came in between was answered first
                continue
            if ended:
                with self._ends.pop(process) as end, suppress(OSError):  # whoever asked for it may have gone
                    end.send(os.waitstatus_to_exitcode(status))

    def _start(self, wish: Start) -> tuple[int, int] | None:
        handles = self._handles()
        sys.path[:] = wish.path
        _import(wish.modules)
        host_id = os.getpid()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # until it is known whose end to tell
        try:
            answer: int | str = os.fork()
        except OSError as error:
            answer = str(error)
        if answer == 0:
            self._leave()
        elif isinstance(answer, int):
            self._ends[answer] = Connection(os.dup(handles[1]), readable=False)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if answer == 0:
            _settle(wish, handles)
            return handles[0], host_id
        for each in handles:
            os.close(each)
        self._control.send(answer)
        return None

    def _handles(self) -> list[int]:
        with socket.fromfd(self._control.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as line:
            _, handles, _, _ = socket.recv_fds(line, 1, NUM_HANDLES, socket.MSG_CMSG_CLOEXEC)
        if len(handles) != NUM_HANDLES:
            raise EOFError("the parent ended while it asked")
        return handles

    def _leave(self) -> None:
        """Lets go, in a fork, of what is its parent's."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, self._interrupt)
        for each in (self._control, *self._ends.values()):
            each.close()


def _import(names: Sequence[str]) -> None:
    missing = [name for name in names if name not in sys.modules]
    if missing:
        invalidate_caches()
        import_all(missing)  # whoever needs what fails will be told


def _settle(wish: Start, handles: Sequence[int]) -> None:
    """Makes a fork what an executed process would be."""
    _, end, output, log, folder = handles
    os.dup2(output, 1)
    os.dup2(log, 2)
    os.fchdir(folder)
    for each in (end, output, log, folder):
        os.close(each)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    os.sched_setaffinity(0, wish.cores)
    for name in os.environ.keys() - wish.variables.keys():
        del os.environ[name]
    os.environ.update(wish.variables)
    tempfile.tempdir = None
    draw_anew()


def draw_anew() -> None:
    """Gives a fork random numbers of its own in torch and numpy, as at a start; Python sees to its own."""
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None:
        torch.default_generator.seed()
    if numpy is not None:
        numpy.random.seed()
