"""What a system call that failed while a run was started or followed means, and what to do about it. Pure."""

import errno
from pathlib import Path

from meshwright.clusters.descriptors import is_full
from meshwright.clusters.errors import UnavailableError
from meshwright.launch.rundir import RunDirError
from meshwright.parallel.errors import MeshwrightError

__all__ = ["trouble"]

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
_ADVICE = {
    errno.EMFILE: "this process has as many files open as it may: raise `ulimit -n`, the hard limit if need be",
    errno.ENFILE: "this machine has as many files open as it may: end other programs, or raise fs.file-max",
    errno.ENOMEM: "this machine has no memory left for it: end other programs, or launch from another machine",
    errno.EAGAIN: "no more processes can be started here: end others, or raise `ulimit -u`",
    errno.ENOENT: "is it installed here, and on PATH?",
    errno.EACCES: "it may not be used by this user",
}


def trouble(run_dir: Path, error: OSError) -> MeshwrightError:
    """The error to tell people: of the run directory, or of this machine.

    Args:
        run_dir: of the run.
        error: what the system said.

    >>> print(trouble(Path("/r"), OSError(errno.ENOSPC, "No space left on device")))
    /r: the run was ended, since its logs cannot be written: No space left on device; free some space, or set logs.dir
    >>> print(trouble(Path("/r"), FileNotFoundError(errno.ENOENT, "No such file or directory", "mpiexec")))
    /r: the run was ended: mpiexec: No such file or directory; is it installed here, and on PATH?
    """
    about, said = str(error.filename or ""), error.strerror or str(error)
    ours = Path(about).is_relative_to(run_dir)
    if error.errno in _DISK or (ours and not is_full(error)):
        where = f"{said} ({about})" if ours else said
        return RunDirError(
            f"{run_dir}: the run was ended, since its logs cannot be written: {where}; free some space, or set logs.dir"
        )
    parts = [f"{about}: {said}" if about else said, _ADVICE.get(error.errno or 0, "")]
    return UnavailableError(f"{run_dir}: the run was ended: {'; '.join(filter(None, parts))}")
