"""One run id, one living run: the end of a run ends every process that carries its id, on the whole machine.

Ids that launches make themselves differ; only one that was given by hand can be given twice.
"""

import fcntl
import hashlib
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from meshwright.clusters.sweep import carriers
from meshwright.launch.home import user_folder
from meshwright.launch.runs import RunError, all_runs, read_run, standing

__all__ = ["check_free", "claimed"]

_ENDING_S = 2.0


@contextmanager
def claimed(run_id: str | None) -> Iterator[None]:
    """Holds a run id for this launch, and for what it leaves behind in the background; None needs no holding.

    Raises:
        RunError: when a run of this id goes on.
    """
    if run_id is None:
        yield
        return
    with _file(run_id) as held:
        _take(run_id, held)
        for known in all_runs():
            if known.run_id == run_id:
                check_free(Path(known.run_dir))
        end_s = time.monotonic() + _ENDING_S
        while (living := sorted(carriers(run_id))) and time.monotonic() < end_s:
            time.sleep(_ENDING_S / 20)  # a launcher that was killed is followed by its agents
        if living:
            raise _refused(run_id, f"process {living[0]} of this machine carries it")
        yield


@contextmanager
def _file(run_id: str) -> Iterator[int]:
    """Closed at the end and never unlocked, since a process in the background has the same lock."""
    folder = user_folder("XDG_STATE_HOME", ".local/state") / "meshwright" / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(f"{socket.gethostname()}/{run_id}".encode()).hexdigest()[:32]
    held = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        yield held
    finally:
        os.close(held)


def _take(run_id: str, held: int) -> None:
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _refused(run_id, f"{os.pread(held, 200, 0).decode()} holds it") from None
    except OSError:  # a file system without locks
        return
    with suppress(OSError):
        os.ftruncate(held, 0)
        os.pwrite(held, f"launcher {os.getpid()} on {socket.gethostname()}".encode(), 0)


def check_free(run_dir: Path) -> None:
    """Makes sure that no run goes on in a run directory.

    Raises:
        RunError: with its launcher.
    """
    known = read_run(run_dir)
    if known is None:
        return
    now = standing(known)
    if not now.over:
        where = f"job {known.job}" if known.job is not None else f"launcher {known.pid} on {known.host}"
        raise _refused(known.run_id, f"{where}, in {known.run_dir} ({now.state})")


def _refused(run_id: str, who: str) -> RunError:
    return RunError(
        f"--run-id {run_id}: a run of this id goes on: {who}; the end of one would end the processes of the other. "
        f"Choose another --run-id or leave it out, or end that run first: meshwright cancel {run_id}"
    )
