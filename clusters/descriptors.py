"""Open files of a process that follows many: a log per rank and two pipes per host come to thousands.

The soft limit is raised as far as is needed and the hard one allows; what is started from then on inherits it.
"""

import errno
import os
import resource
from contextlib import suppress

from meshwright.clusters.errors import UnavailableError

__all__ = ["is_full", "make_room", "need_room"]

_SPARE = 128
"""For all else that is opened now and then."""


def is_full(error: OSError) -> bool:
    """Whether a file could not be opened only since too many are, in this process or on this machine.

    >>> is_full(OSError(errno.EMFILE, "")), is_full(FileNotFoundError(errno.ENOENT, ""))
    (True, False)
    """
    return error.errno in (errno.EMFILE, errno.ENFILE)


def make_room(count: int) -> int:
    """Raises the limit of open files where it is too low; tells how many can now be opened and kept.

    Args:
        count: of files that are to be opened.
    """
    taken = len(os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd")) + _SPARE
    soft, hard = _limits()
    if soft < taken + count:
        with suppress(OSError, ValueError):  # a system may have a limit of its own below the hard one
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(taken + count, hard), _as_told(hard)))
        soft, _ = _limits()
    return max(0, min(count, soft - taken))


def need_room(count: int, what: str) -> None:
    """Makes sure that so many files can be opened and kept.

    Args:
        count: of files.
        what: needs them.

    Raises:
        UnavailableError: when the hard limit is too low.
    """
    room = make_room(count)
    if room < count:
        soft, _ = _limits()
        raise UnavailableError(
            f"{what} take {count} open files; this process may have {soft}, which leaves {room}: raise the hard limit "
            f"(`ulimit -Hn`, or nofile in /etc/security/limits.conf) to {soft + count - room} or more"
        )


_ENDLESS = 1 << 62


def _limits() -> tuple[int, int]:
    soft, hard = (_ENDLESS if each == resource.RLIM_INFINITY else each for each in _told())
    return soft, hard


def _told() -> tuple[int, int]:
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def _as_told(limit: int) -> int:
    return resource.RLIM_INFINITY if limit == _ENDLESS else limit
