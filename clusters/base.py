"""What every cluster shares: a request, the start plan made from it, and the events of a started run.

A plan is a value that prints and serialises; `dry-run` shows it and `start` executes the same one. Secrets are
names in a plan; their values travel beside it, on the agent's standard input.
"""

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

__all__ = [
    "RUN_FILES",
    "Cluster",
    "Handle",
    "Limits",
    "NodePlan",
    "Program",
    "Secret",
    "StartPlan",
    "StartRequest",
    "log_name",
]

RUN_FILES = ("job.yaml", "job.json", "plan.json", "merged.log", "exit.json")
"""What the launcher writes into the run directory, besides the logs of ranks."""

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Secret:
    """A variable whose value is known to the launcher and the ranks only.

    Args:
        name: the variable.
        source: where the value was read, for people: "from_env HF_TOKEN".
        value: never printed, compared or written.
    """

    name: str
    source: str
    value: str = field(repr=False, compare=False)


@dataclass(frozen=True)
class Program:
    """What every rank runs.

    Args:
        argv: words of the command; no shell reads them.
        workdir: current directory of ranks.
        setup: shell script that runs once per node before the ranks.
        env: variables that are added.
        inherit: names (exact, or a start and `*`) of the launcher's variables that ranks get.
        secrets: further variables, with values that are not shown.
    """

    argv: tuple[str, ...]
    workdir: Path
    setup: str | None = None
    env: Pairs = ()
    inherit: tuple[str, ...] = ("*",)
    secrets: tuple[Secret, ...] = ()


@dataclass(frozen=True)
class Limits:
    """How long things may take, and how often they are tried.

    Args:
        max_restarts: of all ranks together.
        shutdown_grace_s: between TERM and KILL.
        join_timeout_s: for nodes to meet.
        hang_s: how long ranks may stand still; None is for ever.
        hang_action: "dump_and_restart", "dump_and_stop" or "warn".
    """

    max_restarts: int = 0
    shutdown_grace_s: float = 30.0
    join_timeout_s: float = 600.0
    hang_s: float | None = None
    hang_action: str = "dump_and_restart"


@dataclass(frozen=True)
class StartRequest:
    """What a launch asks of a cluster.

    Args:
        name: of the job.
        run_id: of this run.
        run_dir: absolute run directory.
        program: what every rank runs.
        num_nodes: nodes, pretended ones on the local cluster.
        ranks_per_node: a number, or "gpu", "cpu", "auto" for as many as a node has.
        gpus_per_node: GPUs that each node may use; None is all.
        port: port of the ranks' store; None is any free one.
        limits: times and restarts.
    """

    name: str
    run_id: str
    run_dir: Path
    program: Program
    num_nodes: int = 1
    ranks_per_node: int | str = 1
    gpus_per_node: int | None = None
    port: int | None = None
    limits: Limits = Limits()


@dataclass(frozen=True)
class NodePlan:
    """What is started on one node: one agent, which starts these ranks."""

    name: str
    index: int
    ranks: tuple[int, ...]
    cwd: str
    env: Pairs
    argv: tuple[str, ...]
    logs: tuple[str, ...]


@dataclass(frozen=True)
class StartPlan:
    """Exactly what is started where; printable and comparable."""

    cluster: str
    name: str
    run_id: str
    run_dir: str
    agent_argv: tuple[str, ...]
    inherit: tuple[str, ...]
    secrets: Pairs
    setup: str | None
    port: int | None
    limits: Limits
    nodes: tuple[NodePlan, ...]

    @property
    def world_size(self) -> int:
        """Number of ranks on all nodes."""
        return sum(len(node.ranks) for node in self.nodes)

    def host_of(self, rank: int) -> str:
        """Name of the node that runs a rank."""
        return next(node.name for node in self.nodes if rank in node.ranks)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON-able values; of secrets, names and sources only."""
        return {**asdict(self), "world_size": self.world_size}

    def __str__(self) -> str:
        ranks, nodes = self.world_size, len(self.nodes)
        head = [
            f"run {self.name}/{self.run_id} on {self.cluster}: {_count(ranks, 'rank')} on {_count(nodes, 'node')}",
            f"directory  {self.run_dir}",
            f"writes     {' '.join(RUN_FILES)}",
            f"restarts   at most {self.limits.max_restarts}; TERM, then KILL after {self.limits.shutdown_grace_s:g} s",
            *([] if self.limits.hang_s is None else [f"hang       {_hang(self.limits)}"]),
            f"store      {'port ' + str(self.port) if self.port else 'any free port'} on the loopback interface",
            f"inherits   {' '.join(self.inherit)}",
        ]
        head += [f"secret     {name}=*** ({source})" for name, source in self.secrets]
        if self.setup is not None:
            head += ["setup      once per node:", *(f"           | {line}" for line in self.setup.splitlines())]
        return "\n".join([*head, *(line for node in self.nodes for line in self._lines(node))]) + "\n"

    def _lines(self, node: NodePlan) -> list[str]:
        return [
            f"node {node.name}: ranks {', '.join(map(str, node.ranks))}",
            f"  cwd      {node.cwd}",
            *(f"  env      {shlex.quote(f'{name}={value}')}" for name, value in node.env),
            f"  agent    {shlex.join(self.agent_argv)}",
            f"  argv     {shlex.join(node.argv)}",
            *(f"  log      {log}" for log in node.logs),
        ]


class Handle(Protocol):
    """A started run, as a launcher sees it."""

    def poll(self, timeout_s: float) -> list[dict[str, Any]]:
        """Events since the last call, waiting for one at most so long."""

    def stop(self) -> None:
        """Asks all ranks to end: TERM, and KILL after the grace of the plan."""

    def kill(self) -> None:
        """Ends everything of this run at once, also what its ranks left behind."""

    @property
    def done(self) -> bool:
        """Whether no agent is left."""


class Cluster(Protocol):
    """Where ranks can be started."""

    def plan(self, request: StartRequest) -> StartPlan:
        """The exact start plan of a request; starts nothing."""

    def check(self, plan: StartPlan) -> None:
        """Raises where the plan could not be executed here and now."""

    def start(self, plan: StartPlan, secrets: Mapping[str, str]) -> Handle:
        """Executes a plan."""


def log_name(rank: int, attempt: int = 0) -> str:
    """File of one rank's output, relative to the run directory.

    >>> log_name(3), log_name(3, attempt=1)
    ('logs/rank-3.log', 'logs/rank-3.attempt-1.log')
    """
    return f"logs/rank-{rank}.log" if attempt == 0 else f"logs/rank-{rank}.attempt-{attempt}.log"


def _hang(limits: Limits) -> str:
    return f"after {limits.hang_s:g} s in which no rank moves: {limits.hang_action.replace('_', ' ')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
