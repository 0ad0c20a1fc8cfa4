"""Hosts of a host file of Open MPI or MPICH: their names, the file with some of them, and which of them this is."""

import re
import socket
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from meshwright.clusters.network import interfaces

__all__ = ["hosts_of", "narrowed", "place_of", "same_host"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def hosts_of(path: Path) -> tuple[str, ...]:
    """Names of the hosts of a file, each once; none where it cannot be read or has others than plain names.

    Args:
        path: a line per host: its name, then what its MPI is told of it (`slots=4`, `:4`).
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return ()
    found = [name for line in lines if (name := _name(line))]
    return tuple(dict.fromkeys(found)) if all(map(_NAME.fullmatch, found)) else ()


def narrowed(text: str, names: Collection[str]) -> str:
    """The lines of a host file that are about some of its hosts.

    >>> narrowed("a slots=2\\n# spare\\nb slots=2\\nc:2\\n", {"a", "c"})
    'a slots=2\\nc:2\\n'
    """
    return "".join(f"{line}\n" for line in text.splitlines() if _name(line) in names)


def _name(line: str) -> str:
    words = line.partition("#")[0].split()
    return words[0].partition(":")[0] if words else ""


def same_host(one: str, other: str) -> bool:
    """Whether two names are one host's: alike, alike up to the domain that only one of them has, or by address.

    >>> same_host("gpu1", "gpu1.cluster"), same_host("gpu1.a", "gpu1.b"), same_host("10.0.0.1", "10")
    (True, False, False)
    """
    return _is_alike(one, other) or other == _address(one) or one == _address(other)


def _is_alike(one: str, other: str) -> bool:
    short, whole = sorted((one, other), key=len)
    return one == other or (not short.isdecimal() and whole.startswith(f"{short}."))


@cache
def _address(name: str) -> str | None:
    """By its name; asked once, since a name server that does not answer takes seconds to say so."""
    with suppress(OSError, UnicodeError):
        return socket.gethostbyname(name)
    return None


def place_of(names: Sequence[str]) -> int | None:
    """Which of some hosts this machine is: by its own name, else by its addresses; None where nothing tells.

    Args:
        names: of hosts, as a host file has them.
    """
    own = socket.gethostname()
    for is_ours in (_is_alike, same_host):  # what needs no name server first
        for index, name in enumerate(names):
            if is_ours(name, own):
                return index
    here = {*interfaces().values()} - {"127.0.0.1"}
    return next((index for index, name in enumerate(names) if _address(name) in here), None)
