"""The life of one process of a pool of ranks: it joins a group, calls what it is sent, and leaves the group again."""

import contextlib
import ctypes
import faulthandler
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle

from meshwright.parallel.collectives import World, start_ranks, stop_ranks
from meshwright.parallel.errors import MeshwrightError

__all__ = ["serve"]

_PR_SET_PDEATHSIG = 1


def serve(descriptor: int, parent: int) -> None:
    """Serves calls on a socket until it closes or the parent is gone.

    For each call it says that it is ready and what it has imported since, receives its place and the group's file, says
    that all ranks have met, receives the function, and answers: pairs of whether it went well and the result, or what
    went wrong.
    """
    faulthandler.register(signal.SIGUSR1)
    faulthandler.enable()  # a crash of native code says where Python was
    _die_with(parent)
    connection = Connection(descriptor)
    known, news = set(sys.modules), list[str]()
    gc.freeze()
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            connection.send(news)
            _serve_one(connection)
            with contextlib.suppress(RuntimeError):
                stop_ranks()
            gc.collect()  # models hold their groups in cycles, and a group that is held keeps its threads and sockets
            news = [name for name in sys.modules if name not in known]
            if news:
                known.update(news)
                gc.freeze()  # what was imported stays: to walk over all of torch each time takes longer than most calls


def _serve_one(connection: Connection) -> None:
    rank, num_ranks, store, sys.path[:] = cloudpickle.loads(connection.recv_bytes())
    met = _answer(lambda: _join(World(rank, num_ranks, rank, num_ranks), store))
    connection.send_bytes(cloudpickle.dumps(met))
    payload = connection.recv_bytes()
    answer = _answer(lambda: _call(payload))
    connection.send_bytes(cloudpickle.dumps(answer))
    if answer[0]:
        connection.recv_bytes()  # a rank that failed leaves at once, so that no other waits for it


def _join(position: World, store: str) -> None:
    names = {
        "RANK": position.rank,
        "WORLD_SIZE": position.world_size,
        "LOCAL_RANK": position.local_rank,
        "LOCAL_WORLD_SIZE": position.local_world_size,
    }
    os.environ.update({name: str(value) for name, value in names.items()})
    start_ranks(f"file://{store}", position=position, hang_s=0)


def _call(payload: bytes) -> Any:
    function, args = cloudpickle.loads(payload)
    return function(*args)


def _answer(work: Callable[[], Any]) -> tuple[bool, Any]:
    try:
        return True, work()
    except Exception as error:
        cause = error if isinstance(error, MeshwrightError) else None
        return False, (cause, traceback.format_exc())


def _die_with(parent: int) -> None:
    """Has the kernel end this process as soon as the one that forked it has ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it ended before the signal was asked for
        os.kill(os.getpid(), signal.SIGKILL)
