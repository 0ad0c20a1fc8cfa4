"""Real ranks on this machine, kept warm between calls.

Ranks are forked from a process that only imports (to fork one that runs torch hangs, to spawn one needs a guarded main
script), see `forks`; a pool sends them functions by cloudpickle and gives each call its own gloo process group over a
file. A rank that fails ends the call: the first failure is raised, the pool's processes are ended and started anew at
the next call. Only where every rank gave its answer, and each failed only by a refusal of this library's or for want of
its peers, they stay.
"""

import atexit
import logging
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, NoReturn

import cloudpickle

from meshwright.parallel.errors import MeshwrightError, RankError
from meshwright.parallel.forks import Fork, forker, learn
from meshwright.parallel.mesh import Mesh

__all__ = ["RankPool", "default_pool", "run_ranks"]

_LOG = logging.getLogger(__name__)
_POLL_S = 0.5
_START_S = 300.0  # to import torch may take long where the disk is slow
_MEETING_S = 60.0  # a handshake takes milliseconds; processes may wait for a core
_REFUSAL_S = 2.0  # what one rank refuses, others mostly refuse a moment later
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


def run_ranks(function: Callable[..., Any], mesh: Mesh, *args: Any, timeout_s: float = 300.0) -> list[Any]:
    """Calls `function(*args)` on every rank of a mesh, each a process of this machine, and returns their results.

    Inside, the process group is running (gloo) and `meshwright.parallel.collectives.world()` tells the rank.

    Args:
        function: anything cloudpickle takes; functions of scripts and tests travel by value.
        mesh: its `world_size` is the number of ranks.
        args: sent to every rank.
        timeout_s: after it the ranks still running are named, with what they were doing.

    Raises:
        RankError: when a rank fails or hangs; errors of this library are raised as they are.
    """
    return default_pool().run(function, mesh.world_size, args, timeout_s=timeout_s)


@dataclass
class _Rank:
    process: Fork
    connection: Connection
    stderr: Path
    ready: bool = False

    def get_ready(self) -> None:
        """Waits until torch is imported, or until the last call's group is left; neither counts as a call's time."""
        if self.ready:
            return
        try:
            self.ready = self.connection.poll(_START_S)
            if self.ready:
                learn(self.connection.recv())
        except (EOFError, ConnectionError) as error:
            raise RankError(f"a rank died between two calls with {self.death()}") from error
        if not self.ready:
            raise RankError(f"a rank was not ready within {_START_S:g} s\n{_tail(self.stderr, lines=60)}")

    def death(self) -> str:
        """How this process ended, and the end of what it wrote."""
        return f"{self.process.ending()}\n{_tail(self.stderr, lines=60)}"


@dataclass(frozen=True)
class _Failure:
    text: str
    cause: MeshwrightError | None = None

    @property
    def lost_peer(self) -> bool:
        """Whether this rank only noticed that another one was gone."""
        return any(words in self.text for words in _LOST_PEER)

    def throw(self) -> NoReturn:
        failed = RankError(self.text)
        if self.cause is not None:
            raise self.cause from failed
        raise failed


@cache
def default_pool() -> "RankPool":
    """The pool that `run_ranks` and `verify` share; it ends with this process."""
    pool = RankPool()
    atexit.register(pool.close)
    return pool


class RankPool:
    """Processes that wait for functions; as many as the largest call asked for."""

    def __init__(self) -> None:
        self._ranks: list[_Rank] = []
        self._folder: Path | None = None
        self._calls = 0

    def run(self, function: Callable[..., Any], num_ranks: int, args: Sequence[Any], *, timeout_s: float) -> list[Any]:
        """Calls a function on the first `num_ranks` processes; see `run_ranks`."""
        payload = _dumps(function, tuple(args))
        ranks, store = self._meet(num_ranks)
        try:
            for each in ranks:
                each.connection.send_bytes(payload)
            results = _collect(ranks, timeout_s)
            for each, result in zip(ranks, results, strict=True):  # one that left earlier would have cut others off
                if not isinstance(result, _Failure):
                    each.connection.send_bytes(b"done")
        except BaseException:
            self.close()
            raise
        finally:
            store.unlink(missing_ok=True)
        failures = [each for each in results if isinstance(each, _Failure)]
        if failures:
            _culprit(failures).throw()
        return results

    def close(self) -> None:
        """Ends all processes."""
        for each in self._ranks:
            each.connection.close()
            each.process.send_signal(signal.SIGKILL)
        for each in self._ranks:
            each.process.wait()
        self._ranks.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _meet(self, num_ranks: int) -> tuple[list[_Rank], Path]:
        """Ranks in a process group of their own, and the file that it keeps.

        Seldom, gloo's handshake never ends or a process dies while it leaves the group before. Nothing of the caller's
        has run then, so they are started anew, once, and it is said.
        """
        try:
            return self._met(num_ranks)
        except (RankError, ConnectionError) as error:
            _LOG.warning("%d ranks are started anew, since these did not meet: %s", num_ranks, error)
            return self._met(num_ranks)

    def _met(self, num_ranks: int) -> tuple[list[_Rank], Path]:
        try:
            ranks, folder = self._warm(num_ranks)
            self._calls += 1
            store = folder / f"store-{self._calls}"
            for rank, each in enumerate(ranks):
                each.ready = False
                each.connection.send_bytes(cloudpickle.dumps((rank, num_ranks, str(store), sys.path)))
            failures = [each for each in _collect(ranks, _MEETING_S) if isinstance(each, _Failure)]
            if failures:
                _culprit(failures).throw()
        except BaseException:
            self.close()
            raise
        return ranks, store

    def _warm(self, num_ranks: int) -> tuple[list[_Rank], Path]:
        if any(each.process.has_ended() for each in self._ranks):
            self.close()
        self._folder = self._folder or Path(tempfile.mkdtemp(prefix="meshwright-ranks-"))
        for each in self._ranks[:num_ranks]:
            each.get_ready()  # with what they have imported others come to be
        while len(self._ranks) < num_ranks:
            self._ranks.append(_start(self._folder / f"stderr-{self._calls}-{len(self._ranks)}"))
        for each in self._ranks[:num_ranks]:
            each.get_ready()
        return self._ranks[:num_ranks], self._folder


def _collect(ranks: list[_Rank], timeout_s: float) -> list[Any]:
    """The answers of all ranks; failures are among them where every rank can go on after them."""
    results: dict[int, Any] = {}
    patience_s = deadline_s = time.monotonic() + timeout_s
    while len(results) < len(ranks):
        waiting = {id(each.connection): rank for rank, each in enumerate(ranks) if rank not in results}
        arrived = wait([ranks[rank].connection for rank in waiting.values()], timeout=_POLL_S)
        for ready in arrived:
            rank = waiting[id(ready)]
            results[rank] = _receive(rank, ranks[rank])
        failures = [each for each in results.values() if isinstance(each, _Failure)]
        if failures:
            patience_s = min(patience_s, time.monotonic() + _REFUSAL_S)
            whole = len(results) == len(ranks)
            _throw_what_ends_ranks(failures, final=whole or not arrived, late=time.monotonic() > patience_s)
        elif len(results) < len(ranks) and time.monotonic() > deadline_s:
            raise RankError(_hang_text(set(range(len(ranks))) - set(results), ranks, timeout_s))
    return [results[rank] for rank in range(len(ranks))]


def _throw_what_ends_ranks(failures: list[_Failure], *, final: bool, late: bool) -> None:
    """Raises the failure to blame, unless ranks only refused, or lost one that did: then they are as they were.

    Args:
        failures: seen so far.
        final: whether no other is expected.
        late: whether some ranks did not notice for a while that another one refused.
    """
    known = all(each.cause is not None or each.lost_peer for each in failures)
    if known and any(each.cause is not None for each in failures) and not late:
        return
    if final or any(not each.lost_peer for each in failures):
        _culprit(failures).throw()


def _culprit(failures: list[_Failure]) -> _Failure:
    return min(failures, key=lambda each: each.lost_peer)


def _receive(rank: int, each: _Rank) -> Any:
    try:
        good, value = cloudpickle.loads(each.connection.recv_bytes())
    except (EOFError, ConnectionError):
        return _Failure(f"rank {rank} died with {each.death()}")
    if good:
        return value
    cause, text = value
    return _Failure(f"rank {rank} failed\n{text}", cause)


def _dumps(function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """Pickles by value what the ranks could not import: modules of scripts and tests."""
    modules = {getattr(each, "__module__", None) for each in (function, *args)}
    foreign = [import_module(name) for name in modules if name and _travels_by_value(name)]
    for module in foreign:
        cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps((function, args)))
    finally:
        for module in foreign:
            cloudpickle.unregister_pickle_by_value(module)


def _travels_by_value(module_name: str) -> bool:
    file = getattr(sys.modules.get(module_name), "__file__", None)
    installed = file is None or "site-packages" in file or file.startswith(sys.base_prefix)
    return not installed and not module_name.startswith("meshwright.") and module_name != "__main__"


def _start(stderr: Path) -> _Rank:
    here, there = Pipe()
    with there, stderr.open("wb") as log:
        process = forker().start(rank=there.fileno(), log=log.fileno())
    return _Rank(process, here, stderr)


def _hang_text(stuck: set[int], ranks: list[_Rank], timeout_s: float) -> str:
    for rank in stuck:
        ranks[rank].process.send_signal(signal.SIGUSR1)  # each writes its Python stacks
    time.sleep(_POLL_S)
    doing = "\n".join(f"rank {rank} is in:\n{_tail(ranks[rank].stderr)}" for rank in stuck)
    return f"ranks {sorted(stuck)} of {len(ranks)} did not finish within {timeout_s:g} s\n{doing}"


def _tail(path: Path, lines: int = 15) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""
