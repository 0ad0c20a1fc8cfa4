"""Ranks as forks of their agent: what they need is imported once per node, not once per rank and start.

It is done where nobody can tell the difference: the command is `python -m MODULE` of the agent's own interpreter, and
the variables of ranks are those under which the agent started and imported, but for some that are read later. CUDA
does not survive a fork: a rank that finds it begun executes its command like any other.

Whoever plans the command names the modules in a variable of its own; without it, every rank is executed.
"""

import gc
import os
import runpy
import signal
import stat
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module, invalidate_caches
from threading import Thread
from typing import NoReturn

from meshwright.clusters import bootstrap
from meshwright.clusters.carrying import show

__all__ = ["IMPORTS", "Imports", "begin", "differing", "module_of"]

IMPORTS = "MESHWRIGHT_IMPORTS"
"""Variable of ranks: the modules, divided by spaces."""

_AT_START = ("GLIBC_", "LANG", "LC_", "LD_", "MALLOC_", "PYTHON")
_COMMUNICATION = ("GLOO_", "MASTER_", "NCCL_", "TORCH_NCCL_")
_THREADS = "OMP_NUM_THREADS"
_LATER = ("CUDA_VISIBLE_DEVICES", "MESHWRIGHT_", _THREADS, "TORCHELASTIC_", *_COMMUNICATION)
_LOOK_S = 0.05
_SHOWN = ("MESHWRIGHT_RUN_ID", "MESHWRIGHT_NODE", "RANK")


def module_of(argv: Sequence[str]) -> tuple[str, tuple[str, ...]] | None:
    """The module that a command runs with this interpreter, and its arguments; None for other commands.

    >>> module_of([sys.executable, "-u", "-m", "train", "--fast"]), module_of(["sh", "-c", "ls"])
    (('train', ('--fast',)), None)
    """
    if list(argv[:3]) != [sys.executable, "-u", "-m"] or len(argv) < 4:
        return None
    return argv[3], tuple(argv[4:])


def differing(wanted: Mapping[str, str], *, born: Mapping[str, str], under: Mapping[str, str]) -> list[str]:
    """Variables of a rank that a fork would not heed; pure.

    Args:
        wanted: of the rank.
        born: those with which the agent was executed: the loader, C and Python read some before anything else.
        under: those under which it imported.

    >>> differing({"LD_PRELOAD": "x", "NCCL_DEBUG": "INFO", "HF_HOME": "a"}, born={}, under={"HF_HOME": "a"})
    ['LD_PRELOAD']
    """
    names = {*wanted, *born, *under}
    early = {name for name in names if name.startswith(_AT_START) and wanted.get(name) != born.get(name)}
    if not _can_have_threads(wanted.get(_THREADS), born.get(_THREADS)):
        early.add(_THREADS)
    others = {name for name in names if not name.startswith((*_AT_START, *_LATER))}
    return sorted(early | {name for name in others if wanted.get(name) != under.get(name)})


def _can_have_threads(wanted: str | None, born: str | None) -> bool:
    """OpenMP has read its number long ago; a process that started without one can still be given fewer threads."""
    return wanted == born or (born is None and wanted is not None and wanted.isdecimal())


class Imports:
    """Modules that are imported in a thread meanwhile: torch's agent first, then what ranks will need."""

    def __init__(self) -> None:
        self._born = dict(os.environ)
        self._under: Mapping[str, str] = {}
        self._first: Thread | None = None
        self._rest: Thread | None = None

    def begin(self) -> None:
        """Starts with torch, under the variables that there are now; a second call does nothing."""
        if self._first is None:
            self._under = dict(os.environ)
            self._first = Thread(target=_import, args=(["meshwright.clusters.elastic"],), name="torch", daemon=True)
            self._first.start()

    def go_on(self, argv: Sequence[str]) -> None:
        """Imports what ranks of a command need after that; what cannot be imported is theirs to report."""
        if not self.why_not(argv):
            self._rest = Thread(target=self._go_on, args=(os.environ[IMPORTS].split(),), name="imports", daemon=True)
            self._rest.start()

    def _go_on(self, modules: Sequence[str]) -> None:
        self.await_torch()
        _import(modules)

    def await_torch(self) -> None:
        """Until torch's agent is there, or cannot be imported."""
        assert self._first is not None, "begin comes first"
        self._first.join()

    def await_all(self, stopped: Callable[[], bool]) -> None:
        """Until all is there, or this node is told to stop."""
        while self._rest is not None and self._rest.is_alive() and not stopped():
            self._rest.join(_LOOK_S)
        gc.freeze()  # pages that a collection writes to would not stay shared

    def why_not(self, argv: Sequence[str]) -> str:
        """Why ranks of a command cannot be forked, in words; empty if they can."""
        if sys.platform != "linux" or module_of(argv) is None or not os.environ.get(IMPORTS):
            return f"nothing is imported for {' '.join(argv[:4])}"
        names = differing(os.environ, born=self._born, under=self._under)
        return f"{', '.join(names)} would come too late" if names else ""


def _import(modules: Sequence[str]) -> None:
    for name in modules:
        with suppress(Exception):  # who needs it then is told why
            import_module(name)


def begin(agent: str, run_dir: str, workdir: str, *command: str) -> NoReturn:
    """Becomes a rank, in the fork.

    Args:
        agent: process id of the parent.
        run_dir: of the run.
        workdir: working directory.
        command: of the rank, see `module_of`.
    """
    os.setsid()
    _drop_handlers()
    _drop_sockets()
    bootstrap.settle(int(agent), run_dir=run_dir, workdir=workdir, command=list(command))
    shown = show({name: os.environ[name] for name in _SHOWN if name in os.environ})
    if not shown or _cuda_is_lost():
        bootstrap.become(list(command))
    code = _run(command)
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)


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


def _cuda_is_lost() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda._is_in_bad_fork()


def _run(command: Sequence[str]) -> int:
    found = module_of(command)
    assert found is not None, command
    module, arguments = found
    _limit_threads()
    if not sys.flags.safe_path:
        sys.path[0] = os.getcwd()
        invalidate_caches()
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        return _code_of(error)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _limit_threads() -> None:
    """MKL reads the number at its first use, so in the rank; other libraries have read it in the agent."""
    torch, wanted = sys.modules.get("torch"), os.environ.get(_THREADS)
    if torch is not None and wanted is not None and torch.get_num_threads() > int(wanted):
        torch.set_num_threads(int(wanted))


def _code_of(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    sys.stderr.write(f"{error.code}\n")
    return 1
