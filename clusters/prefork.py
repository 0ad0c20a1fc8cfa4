"""Ranks as forks of their agent: what they need is imported once per node, not once per rank and start.

CUDA does not survive a fork: a rank that finds it begun executes its command like any other.
"""

import atexit
import os
import runpy
import signal
import stat
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import invalidate_caches
from multiprocessing import current_process
from typing import Any, NoReturn

from meshwright.clusters import bootstrap
from meshwright.clusters.carrying import show
from meshwright.clusters.imports import Imports, module_of

__all__ = ["Forks", "escape", "executed"]

_SHOWN = ("MESHWRIGHT_RUN_ID", "MESHWRIGHT_NODE", "RANK")
_THREADS = "OMP_NUM_THREADS"
_EXITS = (("logging", "shutdown"), ("multiprocessing.util", "_exit_function"))
"""What modules of Python register when they are imported, the first first."""


def escape(word: str) -> str:
    """A word that torch's macros turn back into itself.

    >>> escape("${local_rank} costs $5")
    '$${local_rank} costs $$5'
    """
    return word.replace("$", "$$")


def executed(words: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Program and arguments of a rank that is executed, of those of `Forks.begin`."""
    return sys.executable, ("-I", "-S", str(bootstrap.__file__), *words)


class Forks:
    """The ranks of one node.

    Args:
        imports: of the agent, which were begun.
    """

    def __init__(self, imports: Imports) -> None:
        self._imports = imports
        self._main = current_process()
        self._gate: tuple[int, int] | None = None
        self._blocked: Iterable[int] = ()

    def await_imports(self, stopped: Callable[[], bool]) -> None:
        """Until ranks can be forked, or this node is told to stop."""
        self._imports.await_all(stopped)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around the forks of one set of ranks: none runs before the end.

        Whoever starts a process of multiprocessing reaps those that have ended, whose codes would be lost; and a
        handler of the agent must not run in a fork.
        """
        self._blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self._gate = os.pipe()
        try:
            yield
        finally:
            for each in self._gate:
                os.close(each)
            self._gate = None
            signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked)

    def begin(self, agent: str, run_dir: str, workdir: str, *command: str) -> NoReturn:
        """Becomes a rank, in the fork.

        Args:
            agent: process id of the parent.
            run_dir: of the run.
            workdir: working directory.
            command: of the rank, see `module_of`.
        """
        code = 1
        try:
            os.setsid()
            _forget_exits()
            _drop_handlers()
            self._join()
            _drop_sockets()
            bootstrap.settle(int(agent), run_dir=run_dir, workdir=workdir, command=list(command))
            if not show({name: os.environ[name] for name in _SHOWN if name in os.environ}) or self._is_unfit():
                bootstrap.become(list(command))
            _be_a_main_program(self._main)
            code = _run(command)
        except BaseException as error:
            code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else code
            with suppress(Exception):
                sys.excepthook(type(error), error, error.__traceback__)
        _end(code)

    def _join(self) -> None:
        """Waits until all have been forked, or the agent has died; signals come again."""
        if self._gate is not None:
            reading, writing = self._gate
            os.close(writing)
            os.read(reading, 1)
            os.close(reading)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked)

    def _is_unfit(self) -> bool:
        """Whether CUDA was begun before, or an import was broken off that may go well elsewhere."""
        torch = sys.modules.get("torch")
        return bool(self._imports.failed) or (torch is not None and torch.cuda._is_in_bad_fork())


def _drop_handlers() -> None:
    """Those of the agent; a program that starts has Python's own."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _drop_sockets() -> None:
    """The agent's connections end with it. Their numbers stay taken: objects of the agent may still close them."""
    null = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                os.dup2(null, int(name), inheritable=False)
    os.close(null)


def _be_a_main_program(main: object) -> None:
    """Forgets what a process of multiprocessing is told, and draws random numbers of its own, as at a start.

    Args:
        main: what multiprocessing holds for a main program.
    """
    import tempfile
    from multiprocessing import context, process

    from meshwright.parallel.forking import draw_anew

    contexts: Any = context
    processes: Any = process
    contexts._default_context._actual_context = None
    processes._parent_process, processes._current_process = None, main
    tempfile.tempdir = None
    draw_anew()
    _limit_threads()


def _limit_threads() -> None:
    """MKL reads the number at its first use, so in the rank; other libraries have read it in the agent."""
    torch, wanted = sys.modules.get("torch"), os.environ.get(_THREADS, "")
    if torch is not None and wanted.isdecimal() and 0 < int(wanted) < torch.get_num_threads():
        torch.set_num_threads(int(wanted))


def _forget_exits() -> None:
    """What the agent registered for its end is no part of the rank, but for what every program has of Python itself."""
    atexit._clear()
    for module, name in _EXITS:
        if module in sys.modules:
            atexit.register(getattr(sys.modules[module], name))
    finals: Any = weakref.finalize
    for each in finals._registry.values():
        each.atexit = False  # the agent's
    finals._registered_with_atexit = False  # whoever makes one registers them again


def _end(code: int) -> NoReturn:
    """Ends as an interpreter does: threads are waited for, what was registered is called, streams are flushed."""
    threads: Any = threading
    for act in (threads._shutdown, atexit._run_exitfuncs, sys.stdout.flush, sys.stderr.flush):
        with suppress(BaseException):
            act()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _run(command: Sequence[str]) -> int:
    found = module_of(command)
    assert found is not None, command
    module, arguments = found
    if not sys.flags.safe_path:
        sys.path[0] = os.getcwd()
        invalidate_caches()
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        return _code_of(error)
    return 0


def _code_of(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return (error.code or 0) & 0xFF
    sys.stderr.write(f"{error.code}\n")
    return 1
