"""Nodes of MPI, as a doctor reaches them: one mpiexec per node, which starts the probe there instead of a rank.

Their names stand in the host file. Where there is none, or it has others than plain names, mpiexec is asked once, by a
program that prints them: it may know them from its options or from a queue.
"""

import re
import subprocess
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.probe import PROBE_ARGV
from meshwright.clusters.reaching import answering
from meshwright.clusters.telling import telling

if TYPE_CHECKING:
    from meshwright.clusters.mpi import MpiOptions

__all__ = ["asked_names", "back_of", "names_of", "probe_words"]

_ASK_S = 60.0
_ANSWER_S = 15.0
_SAY_NAME = ("-c", "import socket; print('meshwright-node', socket.gethostname())")


def probe_words(options: "MpiOptions", node: str) -> tuple[str, ...]:
    """The exact words that run a probe on one node; pure.

    Args:
        options: of the job's mpiexec.
        node: its name in the host file.
    """
    return _words_on(options, node, PROBE_ARGV[1:])


def back_of(options: "MpiOptions", names: Sequence[str]) -> tuple[str, ...]:
    """Those of some hosts on which mpiexec can run a Python.

    Args:
        options: of the job's mpiexec.
        names: in the host file.
    """
    return answering({name: _words_on(options, name, ("-c", "pass")) for name in names}, _ANSWER_S)


def _words_on(options: "MpiOptions", node: str, program: Sequence[str]) -> tuple[str, ...]:
    if options.implementation == "openmpi":
        hosts = ("--hostfile", options.hostfile) if options.hostfile else ()
        place: tuple[str, ...] = (*hosts, *options.extra, "--host", node, "--bind-to", "none")
    else:  # which takes a host file or names
        place = (*options.extra, "-hosts", node, "-bind-to", "none")
    return (options.mpiexec, "-n", "1", *place, options.python, *program)


def asked_names(options: "MpiOptions", num_nodes: int, environment: Mapping[str, str]) -> list[str]:
    """Names of so many nodes, as mpiexec deals one process to each.

    Args:
        options: of the job's mpiexec.
        num_nodes: how many.
        environment: of mpiexec.

    Raises:
        UnavailableError: when it has fewer, or does not say.
    """
    words = (options.mpiexec, "-n", str(num_nodes), *_deal(options), *options.extra, options.python, *_SAY_NAME)
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_ASK_S,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UnavailableError(
            f"{options.mpiexec} did not start {num_nodes} processes within {_ASK_S:g} s; write cluster.hostfile, so "
            "that each host is tried by itself"
        ) from None
    names = list(dict.fromkeys(re.findall(r"^meshwright-node (\S+)", done.stdout, re.MULTILINE)))
    if len(names) < num_nodes:
        why = f": {said}" if (said := telling(done.stderr)) else ""
        raise UnavailableError(
            f"{options.mpiexec} gives {len(names)} nodes, the job wants {num_nodes}{why}; write cluster.hostfile"
        )
    return names


def _deal(options: "MpiOptions") -> tuple[str, ...]:
    """Words for one process per node."""
    opens = options.implementation == "openmpi"
    deal, flag = (("--map-by", "ppr:1:node"), "--hostfile") if opens else (("-ppn", "1"), "-f")
    return (flag, options.hostfile, *deal) if options.hostfile else deal


def names_of(options: "MpiOptions", num_nodes: int, environment: Mapping[str, str]) -> list[str]:
    """Names of the nodes that a run of so many would get: the first of those that may be used.

    Raises:
        UnavailableError: when there are fewer.
    """
    if not options.hosts:
        return asked_names(options, num_nodes, environment)
    if len(options.hosts) < num_nodes:
        raise UnavailableError(
            f"cluster.hostfile: {options.hostfile} has {len(options.hosts)} hosts that may be used, the job wants "
            f"{num_nodes}"
        )
    return list(options.hosts[:num_nodes])
