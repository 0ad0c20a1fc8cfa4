"""What every cluster shares: the start plan that is made from a request.

A plan is a value that prints and serialises; `dry-run` shows it and `start` executes the same one. Secrets are
names in a plan; their values travel beside it, on the agent's standard input.
"""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from meshwright.clusters.request import Limits, Meeting, Pairs, Program, Secret, StartRequest

__all__ = [
    "RUN_FILES",
    "Limits",
    "Meeting",
    "NodePlan",
    "Program",
    "Secret",
    "StartPlan",
    "StartRequest",
    "Submission",
    "identity",
    "log_name",
    "under_names",
]

RUN_FILES = ("job.yaml", "job.json", "plan.json", "merged.log", "exit.json")
"""What the launcher writes into the run directory, besides the logs of ranks."""


@dataclass(frozen=True)
class NodePlan:
    """What is started on one node: one agent, which starts these ranks.

    Args:
        name: of the node; a queue tells the real one later.
        index: from 0.
        ranks: global ranks.
        cwd: current directory of ranks.
        env: variables of ranks.
        agent: exact words of the command that starts the agent.
        argv: exact words of every rank's command.
        logs: files of the ranks' output, relative to the run directory.
    """

    name: str
    index: int
    ranks: tuple[int, ...]
    cwd: str
    env: Pairs
    agent: tuple[str, ...]
    argv: tuple[str, ...]
    logs: tuple[str, ...]


@dataclass(frozen=True)
class Submission:
    """What hands a run to a queue.

    Args:
        argv: exact words.
        script: what they read on standard input.
        step: exact words by which the run starts its agents, once it has its nodes; none where the queue starts them.
    """

    argv: tuple[str, ...]
    script: str
    step: tuple[str, ...]


@dataclass(frozen=True)
class StartPlan:
    """Exactly what is started where; printable and comparable. `variant` says more of the cluster's type, in words."""

    cluster: str
    name: str
    run_id: str
    run_dir: str
    inherit: tuple[str, ...]
    secrets: Pairs
    setup: str | None
    meeting: Meeting
    limits: Limits
    nodes: tuple[NodePlan, ...]
    submission: Submission | None = None
    variant: str = ""

    @classmethod
    def of(
        cls, request: StartRequest, cluster: str, *, nodes: Sequence[NodePlan], meeting: Meeting, variant: str = ""
    ) -> "StartPlan":
        """What every cluster's plan takes from its request; of secrets, names and sources only."""
        return cls(
            cluster=cluster,
            name=request.name,
            run_id=request.run_id,
            run_dir=str(request.run_dir),
            inherit=request.program.inherit,
            secrets=tuple((secret.name, secret.source) for secret in request.program.secrets),
            setup=request.program.setup,
            meeting=meeting,
            limits=request.limits,
            nodes=tuple(nodes),
            variant=variant,
        )

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
        counts = ((self.world_size, "rank"), (len(self.nodes), "node"))
        size = " on ".join(f"{number} {noun}{'s'[: number != 1]}" for number, noun in counts)
        head = [
            f"run {self.name}/{self.run_id} on {f'{self.cluster} {self.variant}'.rstrip()}: {size}",
            f"directory  {self.run_dir}",
            f"writes     {' '.join(RUN_FILES)}",
            *_limits(self.limits),
            f"store      {self.meeting}",
            f"inherits   {' '.join(self.inherit)}",
        ]
        head += [f"secret     {name}=*** ({source})" for name, source in self.secrets]
        if self.setup is not None:
            head += ["setup      once per node:", *(f"           | {line}" for line in self.setup.splitlines())]
        if self.submission is not None:
            script = [f"           | {line}" for line in self.submission.script.split("\n")[:-1]]
            head += [f"submit     {shlex.join(self.submission.argv)}", "script     on its standard input:", *script]
            head += [f"step       {shlex.join(self.submission.step)}"] if self.submission.step else []
        return "\n".join([*head, *(line for node in self.nodes for line in _lines(node))]) + "\n"


def _lines(node: NodePlan) -> list[str]:
    return [
        f"node {node.name}: ranks {', '.join(map(str, node.ranks))}",
        f"  cwd      {node.cwd}",
        *(f"  env      {shlex.quote(f'{name}={value}')}" for name, value in node.env),
        f"  agent    {shlex.join(node.agent)}",
        f"  argv     {shlex.join(node.argv)}",
        *(f"  log      {log}" for log in node.logs),
    ]


def log_name(rank: int, attempt: int = 0) -> str:
    """File of one rank's output, relative to the run directory.

    >>> log_name(3), log_name(3, attempt=1)
    ('logs/rank-3.log', 'logs/rank-3.attempt-1.log')
    """
    return f"logs/rank-{rank}.log" if attempt == 0 else f"logs/rank-{rank}.attempt-{attempt}.log"


def identity(request: StartRequest, name: str, index: int) -> Pairs:
    """Variables that tell a node's ranks where they are, in which run."""
    hang = {"MESHWRIGHT_HANG_ACTION": request.limits.hang_action, "MESHWRIGHT_HANG_S": f"{request.limits.hang_s}"}
    return (
        *(hang.items() if request.limits.hang_s is not None else ()),
        ("MESHWRIGHT_HOST", name),
        ("MESHWRIGHT_NODE", str(index)),
        ("MESHWRIGHT_RUN_DIR", str(request.run_dir)),
        ("MESHWRIGHT_RUN_ID", request.run_id),
    )


def under_names(nodes: Sequence[NodePlan], names: Sequence[str]) -> tuple[NodePlan, ...]:
    """Nodes of a plan by the names that they have, once somebody has chosen them.

    Args:
        nodes: of a plan.
        names: at least as many.
    """

    def env(node: NodePlan, name: str) -> Pairs:
        return tuple((key, name if key == "MESHWRIGHT_HOST" else value) for key, value in node.env)

    return tuple(replace(node, name=name, env=env(node, name)) for node, name in zip(nodes, names, strict=False))


def _limits(limits: Limits) -> list[str]:
    hang = f"hang       after {limits.hang_s or 0:g} s in which no rank moves: {limits.hang_action.replace('_', ' ')}"
    return [
        *(f"{'' if index else 'nodes':<11}{line}" for index, line in enumerate(limits.sizes)),
        *(f"after      {each}" for each in limits.after),
        f"restarts   at most {limits.max_restarts}; TERM, then KILL after {limits.shutdown_grace_s:g} s",
        *([f"           {limits.retry}"] if limits.max_restarts else []),
        *([] if limits.hang_s is None else [hang]),
        *([] if limits.watch is None else [f"health     {limits.watch}"]),
    ]
