"""This machine as a cluster: one agent, or one per pretended node, each with its share of ranks and GPUs."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from meshwright.clusters.base import NodePlan, StartPlan, StartRequest, identity, log_name
from meshwright.clusters.errors import RendezvousError, UnavailableError
from meshwright.clusters.pipes import PipeHandle, agents_of
from meshwright.clusters.probe import PROBE_ARGV
from meshwright.clusters.reaching import Reached, Visit, reached_by
from meshwright.clusters.spawn import AGENT_ARGV, spawn_agent

__all__ = ["LocalCluster", "Machine", "check_port", "plan_local", "this_machine"]


@dataclass(frozen=True)
class Machine:
    """What a plan needs to know of a machine.

    Args:
        host: its name.
        cores: cores this process may use.
        gpus: ids of the GPUs this process may use.
        omp_num_threads: OMP_NUM_THREADS of this process, None where unset.
    """

    host: str
    cores: int
    gpus: tuple[str, ...] = ()
    omp_num_threads: str | None = None


def this_machine(environment: Mapping[str, str] | None = None) -> Machine:
    """Looks at this machine without a driver: GPUs are NVIDIA device files, less what CUDA_VISIBLE_DEVICES hides."""
    found = os.environ if environment is None else environment
    visible = found.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        gpus = tuple(sorted((path.name[6:] for path in Path("/dev").glob("nvidia[0-9]*")), key=int))
    else:
        gpus = tuple(each.strip() for each in visible.split(",") if each.strip() and each.strip() != "-1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(socket.gethostname(), cores, gpus, found.get("OMP_NUM_THREADS"))


def plan_local(request: StartRequest, machine: Machine, pretended: Sequence[str] = ()) -> StartPlan:
    """The exact start plan on a machine; pure.

    Args:
        request: what is asked.
        machine: where.
        pretended: names of nodes that can be used; by default as many as are asked for.

    Raises:
        UnavailableError: when the machine has fewer GPUs than asked for.
    """
    usual = [machine.host] if request.num_nodes == 1 else [f"node{index}" for index in range(request.num_nodes)]
    names = list(pretended or usual)[: request.num_nodes]
    share = _gpus_of_nodes(request, machine, names if pretended else ())
    per_node = _ranks_per_node(request, machine, share)
    nodes = [
        NodePlan(
            name=name,
            index=index,
            ranks=(ranks := tuple(range(index * per_node, (index + 1) * per_node))),
            cwd=str(request.program.workdir),
            env=_environment(request, machine, num_ranks=per_node * len(names), gpus=share[index] if share else None)
            + identity(request, name, index),
            agent=AGENT_ARGV,
            argv=request.program.argv,
            logs=tuple(log_name(rank) for rank in ranks),
        )
        for index, name in enumerate(names)
    ]
    return StartPlan.of(request, "local", nodes=nodes, meeting=replace(request.meeting, host=None))


def _environment(
    request: StartRequest, machine: Machine, *, num_ranks: int, gpus: tuple[str, ...] | None
) -> tuple[tuple[str, str], ...]:
    """What ranks get besides what they inherit; the job's own words win."""
    env = {"GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0"}
    if machine.omp_num_threads is None or "*" not in request.program.inherit:
        env["OMP_NUM_THREADS"] = str(max(1, machine.cores // num_ranks))
    if gpus is not None:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    return tuple(sorted((env | dict(request.program.env)).items()))


def _gpus_of_nodes(request: StartRequest, machine: Machine, names: Sequence[str]) -> list[tuple[str, ...]] | None:
    """The GPUs of each node; None where one node takes all there are.

    node3 has the fourth share of them, also when others are left out, where there are as many.
    """
    nodes, each, have = request.num_nodes, request.gpus_per_node, len(machine.gpus)
    if each is None:
        if nodes == 1 or not have:
            return None
        each = have // nodes
    if nodes * each > have:
        raise UnavailableError(
            f"asked for {nodes} x {each} GPUs, {machine.host} has {have}; "
            f"set cluster.gpus_per_node to {have // nodes} or less"
        )
    own = [int(name.removeprefix("node")) for name in names if name.removeprefix("node").isdecimal()]
    places = own if len(own) == nodes and (max(own) + 1) * each <= have else range(nodes)
    return [machine.gpus[place * each : (place + 1) * each] for place in places]


def _ranks_per_node(request: StartRequest, machine: Machine, share: Sequence[tuple[str, ...]] | None) -> int:
    asked = request.ranks_per_node
    if asked is None:
        asked = (request.num_ranks or request.num_nodes) // request.num_nodes
    if isinstance(asked, int):
        return asked
    gpus = len(share[0]) if share is not None else len(machine.gpus)
    if asked == "gpu" and not gpus:
        raise UnavailableError(f"nproc_per_node: gpu, but {machine.host} has no GPU for it; write cpu or a number")
    return gpus if gpus and asked != "cpu" else machine.cores


def check_port(port: int) -> None:
    """Makes sure that rank 0 can listen on a port.

    Raises:
        RendezvousError: when something else does, or it is not ours to take.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise RendezvousError(
                f"rendezvous.port: port {port} of this machine cannot be taken: {error.strerror}; "
                "end what listens there, choose another port, or write `port: auto`"
            ) from error


class LocalCluster:
    """This machine.

    Args:
        warm: an agent that was started before the job was read; the first node takes it.
        pretended: names of pretended nodes that can be used.
    """

    def __init__(self, warm: "subprocess.Popen[bytes] | None" = None, pretended: Sequence[str] = ()) -> None:
        self._warm, self._pretended = warm, tuple(pretended)

    def plan(self, request: StartRequest) -> StartPlan:
        """The exact start plan of a request on this machine."""
        return plan_local(request, this_machine(), self._pretended)

    def reached(self, request: StartRequest, visit: Visit) -> AbstractContextManager[Reached]:
        """The pretended nodes, all of them this machine."""
        names = self._pretended or [f"node{index}" for index in range(request.num_nodes)]
        return reached_by(dict.fromkeys(names[: request.num_nodes], PROBE_ARGV), "here", visit)

    def check(self, plan: StartPlan) -> None:
        """Makes sure that the plan can be executed here and now.

        Raises:
            RendezvousError: when it names a port that is taken.
        """
        if plan.meeting.port is not None:
            check_port(plan.meeting.port)

    def start(self, plan: StartPlan, secrets: Mapping[str, str]) -> PipeHandle:
        """Executes a plan: one agent per node, each told its part."""
        return PipeHandle(plan, agents_of(plan.nodes, self._agent), secrets)

    def _agent(self, node: NodePlan) -> "subprocess.Popen[bytes]":
        del node
        warm, self._warm = self._warm, None
        return warm if warm is not None and warm.poll() is None else spawn_agent()
