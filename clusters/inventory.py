"""What one node is and has: `python -m meshwright.clusters.inventory` prints it as one JSON object.

The values are pure; `read_node` looks at this machine. Nothing here needs torch, a GPU or a network.
"""

import json
import os
import platform
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from meshwright.clusters.gpus import GpuReport
from meshwright.clusters.interfaces import Interface, read_interfaces

__all__ = ["Directory", "NodeFacts", "facts_from", "main", "read_directory", "read_node"]

WRITE_BYTES = 64 << 20
"""What is written to time a disk."""

_CHUNK_BYTES = 4 << 20
_COMPARED = ("torch", "nccl", "python", "meshwright")


@dataclass(frozen=True)
class Directory:
    """A directory that a run writes to.

    Args:
        path: as it was asked for; it may not exist yet.
        free_bytes: that this user may still write; None where nothing can be written.
        write_bytes_per_s: to the disk, not to its cache; None where nothing was written.
        error: why nothing can be written.
    """

    path: str
    free_bytes: int | None = None
    write_bytes_per_s: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class NodeFacts:
    """One node at one moment.

    Args:
        host: its own name for itself.
        time_unix_s: its clock when it looked.
        python: path of the interpreter.
        versions: of what must be equal on all nodes; None for what is not installed.
        cores: that ranks may use.
        memory_bytes: of the host; None where the system does not tell.
        interfaces: of its network.
        directories: that a run would write to.
        gpus: of its driver.
    """

    host: str
    time_unix_s: float
    python: str
    versions: Mapping[str, str | None]
    cores: int
    memory_bytes: int | None
    interfaces: tuple[Interface, ...]
    directories: tuple[Directory, ...]
    gpus: GpuReport

    def as_dict(self) -> dict[str, Any]:
        """JSON-able values; `facts_from` is the inverse."""
        return asdict(self)


def facts_from(told: object) -> NodeFacts:
    """The facts that a node told as JSON.

    Raises:
        ValueError: when a node of another version tells something else.
    """
    from pydantic import TypeAdapter

    return TypeAdapter(NodeFacts).validate_python(told)


def read_node(directories: Iterable[str] = (), write_bytes: int = WRITE_BYTES) -> NodeFacts:
    """Looks at this machine.

    Args:
        directories: that a run would write to.
        write_bytes: what is written to each, to time it, and removed again; 0 writes one byte.

    >>> facts = read_node()
    >>> facts_from(json.loads(json.dumps(facts.as_dict()))) == facts
    True
    """
    from meshwright.clusters.nvml import read_gpus

    gpus = read_gpus()
    return NodeFacts(
        host=socket.gethostname(),
        time_unix_s=time.time(),
        python=sys.executable,
        versions={**{name: _version(name) for name in _COMPARED}, "driver": gpus.driver},
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=_memory_bytes(),
        interfaces=read_interfaces(),
        directories=tuple(read_directory(each, write_bytes) for each in directories),
        gpus=gpus,
    )


def _version(name: str) -> str | None:
    """Of an installed package, without importing it; NCCL comes as a package per version of CUDA."""
    if name == "python":
        return platform.python_version()
    if name == "meshwright":
        import meshwright

        return meshwright.__version__
    for package in ("nvidia-nccl-cu13", "nvidia-nccl-cu12") if name == "nccl" else (name,):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(package)
    return None


def _memory_bytes() -> int | None:
    with suppress(OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def read_directory(path: str, write_bytes: int = WRITE_BYTES) -> Directory:
    """Writes to a directory, or to what lies above one that does not exist yet, and times it.

    >>> read_directory("/proc/nowhere", 0).error is None
    False
    """
    home = Path(path).absolute()
    while not home.exists() and home != home.parent:
        home = home.parent
    try:
        space = os.statvfs(home)
        free_bytes = space.f_bavail * space.f_frsize
        asked = min(write_bytes, free_bytes // 2)
        with tempfile.TemporaryFile(dir=home, prefix=".meshwright-doctor-") as file:
            chunk = memoryview(os.urandom(_CHUNK_BYTES))  # zeros would be written to some disks in no time
            start_s = time.monotonic()
            for first in range(asked // _CHUNK_BYTES):  # from another byte each time: no block is there before
                file.write(chunk[first:])
                file.write(chunk[:first])
            file.write(b"\n")
            file.flush()
            os.fsync(file.fileno())
            spent_s = time.monotonic() - start_s
    except OSError as error:
        return Directory(path, error=f"{error.strerror} ({home})")
    written = asked // _CHUNK_BYTES * _CHUNK_BYTES
    return Directory(path, free_bytes, written / spent_s if written else None)


def main(words: Iterable[str] = ()) -> int:
    """Prints the facts of this node, with the directories that are named."""
    directories = [each for each in words if each != "--json"]
    sys.stdout.write(json.dumps(read_node(directories).as_dict()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
