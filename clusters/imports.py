"""What an agent imports for its ranks, and whether a fork of it would be like a rank that is executed.

It is where the command is `python -m MODULE` of the agent's own interpreter, the variables of ranks are those under
which the agent started and imported, but for some that are read later, and the modules are those that a rank would
find. Whoever plans the command names them in a variable of its own; without it, every rank is executed.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import invalidate_caches
from pathlib import Path
from threading import Thread

from meshwright.parallel.importing import import_all

__all__ = ["IMPORTS", "Imports", "differing", "module_of", "shadowed"]

IMPORTS = "MESHWRIGHT_IMPORTS"
"""Variable of ranks: the modules, divided by spaces."""

_AT_START = ("GLIBC_", "LANG", "LC_", "LD_", "MALLOC_", "PYTHON")
_COMMUNICATION = ("GLOO_", "MASTER_", "NCCL_", "TORCH_NCCL_")
_THREADS = "OMP_NUM_THREADS"
_LATER = ("CUDA_VISIBLE_DEVICES", "MESHWRIGHT_", _THREADS, "TORCHELASTIC_", *_COMMUNICATION)
_LOOK_S = 0.05


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


def shadowed(folder: Path, names: Iterable[str]) -> list[str]:
    """Top-level modules that an interpreter started in a folder would find there instead of where they are."""
    found = {path.name.partition(".")[0] for path in folder.iterdir()} if folder.is_dir() else set[str]()
    return sorted(found & {name.partition(".")[0] for name in names})


class Imports:
    """Modules that are imported in a thread meanwhile: torch's agent first, then what ranks will need."""

    def __init__(self) -> None:
        self._born = dict(os.environ)
        self._under: Mapping[str, str] = {}
        self._first: Thread | None = None
        self._rest: Thread | None = None
        self.failed: list[str] = []
        """What could not be imported, though it is there: what it left behind is not for ranks."""

    @property
    def begun(self) -> bool:
        """Whether `begin` was called."""
        return self._first is not None

    def begin(self) -> None:
        """Starts with torch, under the variables that there are now; a second call does nothing."""
        if self._first is None:
            self._under = dict(os.environ)
            self._first = Thread(
                target=self._import, args=(["meshwright.clusters.elastic"],), name="torch", daemon=True
            )
            self._first.start()

    def await_torch(self) -> None:
        """Until torch's agent is there, or cannot be imported: who needs it then is told why."""
        assert self._first is not None, "begin comes first"
        self._first.join()

    def go_on(self, workdir: Path) -> None:
        """Imports what ranks need, as from their directory; see `why_not`, and await torch, before."""
        if not sys.flags.safe_path:
            sys.path[0] = str(workdir)
            invalidate_caches()
        self._rest = Thread(target=self._import, args=(os.environ[IMPORTS].split(),), name="imports", daemon=True)
        self._rest.start()

    def _import(self, modules: Sequence[str]) -> None:
        self.failed += import_all(modules)

    def await_all(self, stopped: Callable[[], bool]) -> None:
        """Until all is there, or this node is told to stop."""
        while self._rest is not None and self._rest.is_alive() and not stopped():
            self._rest.join(_LOOK_S)

    def why_not(self, argv: Sequence[str], workdir: Path) -> str:
        """Why ranks of a command are not to be forked, in words; empty if they can be."""
        if sys.platform != "linux" or module_of(argv) is None or not os.environ.get(IMPORTS):
            return f"nothing is imported for {' '.join(argv[:4])}"
        return next(self._reasons(workdir), "")

    def _reasons(self, workdir: Path) -> Iterator[str]:
        names = differing(os.environ, born=self._born, under=self._under)
        if names:
            yield f"{', '.join(names)} would come too late"
        places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if os.environ.get("PYTHONPATH") and not all(map(os.path.isabs, places)) and Path.cwd() != workdir:
            yield "PYTHONPATH names places in the working directory"
        taken = shadowed(workdir, {*sys.modules, *sys.stdlib_module_names})
        if taken and not sys.flags.safe_path and Path(sys.path[0]) != workdir:
            yield f"{workdir} has modules of its own for {', '.join(taken)}"
        try:
            _use_what_forks_need()
        except OSError as error:
            yield f"{error}"


def _use_what_forks_need() -> None:
    """Files for temporary use and semaphores, which torch's agent takes for each set of forks."""
    import multiprocessing

    multiprocessing.get_context("fork").Event()
    tempfile.TemporaryFile().close()
