"""`python -m meshwright.launch.worker`: one rank of a job's built-in training program.

Reads job.json in $MESHWRIGHT_RUN_DIR. A rank that fails writes errors/rank-N.json before anything is torn down, so that
the launcher can tell it from the ranks that only lost their connection to it.
"""

import errno
import json
import os
import re
import socket
import sys
import time
import traceback
from pathlib import Path

from meshwright.clusters.imports import IMPORTS
from meshwright.parallel.errors import MeshwrightError
from meshwright.parallel.flight_recorder import save
from meshwright.parallel.importing import import_all
from meshwright.parallel.progress import HERE

__all__ = ["exit_code_of", "main"]

_TIMED_OUT = re.compile("[Tt]imed? ?out")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def main() -> int:
    """Trains; returns the exit code."""
    run_dir = Path(os.environ.get("MESHWRIGHT_RUN_DIR", "."))
    try:
        return _train(run_dir)
    except BaseException as error:
        _record(run_dir, error)
        if isinstance(error, MeshwrightError):
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        else:
            traceback.print_exc()
        return exit_code_of(error)


def exit_code_of(error: BaseException) -> int:
    """65 for what the job's author can mend, 74 for files and full disks, 1 for the rest.

    >>> exit_code_of(OSError(errno.ENOSPC, "No space left on device")), exit_code_of(ValueError())
    (74, 1)
    """
    if isinstance(error, MeshwrightError):
        return int(getattr(error, "exit_code", 65))
    return 74 if isinstance(error, OSError) and error.errno in _FULL else 1


def _train(run_dir: Path) -> int:
    job = json.loads((run_dir / "job.json").read_text())
    import_all(os.environ.get(IMPORTS, "").split())  # a fork has them
    from meshwright.launch.spec.job import Job
    from meshwright.launch.worker.leave import LEFT
    from meshwright.launch.worker.train import build_training
    from meshwright.parallel.collectives import gather_integers, start_ranks, stop_ranks, world

    loaded = Job.model_validate(job)
    import torch

    device = torch.device("cuda", world().local_rank) if torch.cuda.is_available() else torch.device("cpu")
    start_ranks(_meeting_place(run_dir), device=device.type)
    training = build_training(loaded, run_dir, device=device, say=_say)
    training.run()
    if training.checkpoints.leave.decided:
        gather_integers(0)  # the first rank to leave ends the others: all have saved by now
    stop_ranks()
    return (
        LEFT
        if training.checkpoints.leave.decided and training.step < (loaded.train.steps if loaded.train else 0)
        else 0
    )


def _meeting_place(run_dir: Path) -> str | None:
    """A file where all ranks share this machine's disk (none of them listens), else torchrun's address."""
    if "MESHWRIGHT_RUN_ID" not in os.environ or os.environ.get("MASTER_ADDR") not in ("127.0.0.1", "localhost"):
        return None
    folder = run_dir / "private"
    folder.mkdir(mode=0o700, exist_ok=True)
    return f"file://{folder.absolute()}/ranks-{os.environ.get('MESHWRIGHT_ATTEMPT', '0')}"


def _record(run_dir: Path, error: BaseException) -> None:
    """Writes what happened, when and where; must not fail itself."""
    rank = int(os.environ.get("RANK", "0"))
    record = {
        "rank": rank,
        "host": os.environ.get("MESHWRIGHT_HOST", socket.gethostname()),
        "time_unix_s": time.time(),
        "type": type(error).__name__,
        "message": str(error),
        "at": HERE.words,
        "traceback": "".join(traceback.format_exception(error)),
        "exit_code": exit_code_of(error),
    }
    try:
        folder = run_dir / "errors"
        folder.mkdir(exist_ok=True)
        (folder / f"rank-{rank}.json").write_text(json.dumps(record))
    except OSError as failed:
        sys.stderr.write(f"no error record: {failed}\n")
    if isinstance(error, RuntimeError) and _TIMED_OUT.search(str(error)):
        save(run_dir, rank)  # as torch saw what this rank waited in


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # destructors of a torn-down process group may hang or print
