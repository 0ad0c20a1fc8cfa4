"""MPI as a cluster: one mpiexec starts a program per rank, on this machine or the hosts of a file.

Open MPI and MPICH differ in a few words only. Ranks talk through torch; MPI starts them, says who shares a node, and
ends all when one fails. Nothing of a run outlives a failed rank there: the launcher decides what follows.
"""

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from meshwright.clusters.base import NodePlan, StartPlan, StartRequest, identity, log_name
from meshwright.clusters.dealing import ranks_per_node
from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.mpi_handle import MpiHandle
from meshwright.clusters.mpi_hosts import narrowed
from meshwright.clusters.mpi_nodes import back_of, names_of, probe_words
from meshwright.clusters.reaching import Reached, Visit, reached_by
from meshwright.clusters.spawn import words_for

__all__ = ["MpiCluster", "MpiOptions", "implementation_of", "plan_mpi"]

_HOSTS = "private/hosts"


@dataclass(frozen=True)
class MpiOptions:
    """How mpiexec is called.

    Args:
        implementation: "openmpi" or "mpich".
        mpiexec: its name or path.
        hostfile: in the implementation's own form; None is this machine.
        hosts: those of its hosts that may be used; none where they are not known.
        exclude: hosts that may not.
        python: interpreter on all nodes.
        extra: further words, as they are.
    """

    implementation: str
    mpiexec: str = "mpiexec"
    hostfile: str | None = None
    hosts: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    python: str = sys.executable
    extra: tuple[str, ...] = ()


def implementation_of(mpiexec: str) -> str:
    """Which MPI a program belongs to.

    Raises:
        UnavailableError: when it is not there, or neither Open MPI nor MPICH.
    """
    if shutil.which(mpiexec) is None:
        raise UnavailableError(
            f"cluster.mpiexec: there is no {mpiexec!r} here; install Open MPI or MPICH, or name its path"
        )
    said = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, check=False).stdout
    for sign, name in (("Open MPI", "openmpi"), ("OpenRTE", "openmpi"), ("PRTE", "openmpi"), ("HYDRA", "mpich")):
        if sign.lower() in said.lower():
            return name
    raise UnavailableError(f"cluster.mpiexec: {mpiexec!r} is neither Open MPI nor MPICH: {said.strip()[:80]!r}")


def plan_mpi(request: StartRequest, options: MpiOptions) -> StartPlan:
    """The exact start plan; pure.

    Raises:
        UnavailableError: for what MPI cannot do, or where the number of ranks is not said.
    """
    per_node = ranks_per_node(request, "mpiexec is told how many ranks to start")
    alone = request.num_nodes == 1
    names = options.hosts[: request.num_nodes]
    if len(names) == request.num_nodes:
        options = replace(options, hostfile=str(request.run_dir / _HOSTS))
    elif options.exclude:
        known = ", ".join(options.hosts) or "none that is known by name"
        raise UnavailableError(
            f"cluster.exclude: {request.num_nodes} nodes are wanted, and without {', '.join(options.exclude)} "
            f"cluster.hostfile has {known}; put more hosts into it, or ask for fewer nodes"
        )
    else:
        names = tuple(f"node{index}" for index in range(request.num_nodes))
    return StartPlan.of(
        request,
        "mpi",
        nodes=[_node(request, options, (name, index), per_node=per_node) for index, name in enumerate(names)],
        meeting=replace(request.meeting, host=None if alone else request.meeting.host),
        variant=f"({options.implementation})",
    )


def _node(request: StartRequest, options: MpiOptions, called: tuple[str, int], *, per_node: int) -> NodePlan:
    name, index = called
    ranks = tuple(range(index * per_node, (index + 1) * per_node))
    env = dict(request.program.env)
    if request.num_nodes == 1:
        env.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    return NodePlan(
        name=name,
        index=index,
        ranks=ranks,
        cwd=str(request.program.workdir),
        env=tuple(sorted(env.items())) + identity(request, name, index),
        agent=_words(options, num_ranks=request.num_nodes * per_node, per_node=per_node),
        argv=words_for(options.python, request.program.argv),
        logs=tuple(log_name(rank) for rank in ranks),
    )


def _words(options: MpiOptions, *, num_ranks: int, per_node: int) -> tuple[str, ...]:
    """The words of mpiexec; `-m mpi4py` makes an exception of one process end the job, which would hang without.

    Where both MPIs are installed, mpi4py would else take the library of either.
    """
    hosts = (options.hostfile,) if options.hostfile else ()
    if options.implementation == "openmpi":
        places: tuple[str, ...] = ("--map-by", f"ppr:{per_node}:node:OVERSUBSCRIBE", "--bind-to", "none")
        places += ("-x", "MPI4PY_MPIABI=openmpi")
        found = tuple(word for host in hosts for word in ("--hostfile", host))
    else:
        places = ("-ppn", str(per_node), "-bind-to", "none", "-genv", "MPI4PY_MPIABI", "mpich")
        found = tuple(word for host in hosts for word in ("-f", host))
    program = (options.python, "-u", "-m", "mpi4py", "-m", "meshwright.clusters.mpi_rank")
    return (options.mpiexec, "-n", str(num_ranks), *found, *places, *options.extra, *program)


class MpiCluster:
    """What one mpiexec reaches.

    Args:
        options: how it is called.
    """

    def __init__(self, options: MpiOptions) -> None:
        self._options = options

    def plan(self, request: StartRequest) -> StartPlan:
        """The exact start plan of a request."""
        return plan_mpi(request, self._options)

    def reached(self, request: StartRequest, visit: Visit) -> AbstractContextManager[Reached]:
        """The first nodes of the host file, each by an mpiexec of its own."""
        names = names_of(self._options, request.num_nodes, visit.environment)
        return reached_by({name: probe_words(self._options, name) for name in names}, "mpi", visit)

    def check(self, plan: StartPlan) -> None:
        """Makes sure that there is an mpiexec of the planned kind, and mpi4py.

        Raises:
            UnavailableError: when there is not.
        """
        from importlib.util import find_spec

        found = implementation_of(self._options.mpiexec)
        if found != self._options.implementation:
            raise UnavailableError(f"cluster.mpirun: {self._options.mpiexec!r} is {found}, not what the job says")
        if find_spec("mpi4py") is None:
            raise UnavailableError("mpi4py is not installed; pip install 'meshwright[mpi]'")

    def back(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of some hosts on which an mpiexec of its own can run something."""
        return back_of(self._options, names)

    def start(self, plan: StartPlan, secrets: Mapping[str, str]) -> "MpiHandle":
        """Executes a plan: one mpiexec, whose complaints go to logs/mpiexec.log."""
        file, wanted = self._options.hostfile, {node.name for node in plan.nodes}
        if file is not None and wanted <= set(self._options.hosts):
            Path(plan.run_dir, _HOSTS).write_text(narrowed(Path(file).read_text(), wanted))
        return MpiHandle(plan, secrets)
