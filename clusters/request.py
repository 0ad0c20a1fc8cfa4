"""What a launch asks of a cluster: which program, on how many nodes, for how long, and how nodes find each other."""

from dataclasses import dataclass, field
from pathlib import Path

from meshwright.clusters.retry import Decision, RetryPolicy
from meshwright.clusters.watching import Watch

__all__ = ["Earlier", "Limits", "Meeting", "Pairs", "Program", "Secret", "StartRequest"]

Pairs = tuple[tuple[str, str], ...]
"""Names and values, in order."""


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
class Earlier:
    """A run that must have ended before another starts.

    Args:
        run_id: of it.
        run_dir: of it.
        when: "ok" where it must have succeeded, or "any".
        job: the queue's id of it, where the queue waits; None where it is over, or the launcher waits.
    """

    run_id: str
    run_dir: str
    when: str = "ok"
    job: str | None = None

    def __str__(self) -> str:
        how = "has succeeded" if self.when == "ok" else "has ended"
        return f"run {self.run_id} {how}" + ("" if self.job is None else f" (job {self.job})")


@dataclass(frozen=True)
class Limits:
    """How long things may take, how often they are tried, and on how few nodes.

    Args:
        max_restarts: of all ranks together.
        shutdown_grace_s: between TERM and KILL.
        join_timeout_s: for nodes to meet.
        hang_s: how long ranks may stand still; None is for ever.
        hang_action: "dump_and_restart", "dump_and_stop" or "warn".
        retry: after which failures ranks start again, and when.
        past: what followed from attempts before, that other agents ran; oldest first.
        regroup: whether agents end at a restart, so that the launcher starts others on the nodes that are there then.
        fewest_nodes: of an elastic job; None where their number is fixed.
        watch: how GPUs are looked at while ranks run; None is not at all.
        after: runs that must have ended before.
        sizes: what becomes of an elastic job on which number of nodes, for people.
    """

    max_restarts: int = 0
    shutdown_grace_s: float = 30.0
    join_timeout_s: float = 600.0
    hang_s: float | None = None
    hang_action: str = "dump_and_restart"
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    past: tuple[Decision, ...] = ()
    regroup: bool = False
    fewest_nodes: int | None = None
    sizes: tuple[str, ...] = ()
    watch: Watch | None = None
    after: tuple[Earlier, ...] = ()


@dataclass(frozen=True)
class Meeting:
    """Where the nodes of a run, and then its ranks, find each other.

    Args:
        host: name or address of the first node, as the others reach it; None on one machine, where a file and the
            loopback interface do, and "first" where the cluster tells only later.
        interface: of the first node that is listened on; "auto" is the one with that address.
        port: nodes meet at; None is a free one of `ports`, on one machine any.
        ports: first and last port that may be taken.
        everywhere: listen on all interfaces.
    """

    host: str | None = None
    interface: str = "auto"
    port: int | None = None
    ports: tuple[int, int] = (29400, 29999)
    everywhere: bool = False

    def __str__(self) -> str:
        if self.host is None:
            return f"{f'port {self.port}' if self.port else 'any free port'} on the loopback interface"
        port = f"port {self.port}" if self.port else f"a free port of {self.ports[0]}-{self.ports[1]}"
        where = f"interface {self.interface}" if self.interface != "auto" else "the interface with that address"
        return f"{port} on {'the first node' if self.host == 'first' else self.host}, {self.warning or where}"

    @property
    def warning(self) -> str:
        """What is dangerous about it, in words; empty where nothing is."""
        anybody = self.host is not None and self.everywhere
        return "every interface (whoever reaches the port can join)" if anybody else ""


@dataclass(frozen=True)
class StartRequest:
    """What a launch asks of a cluster.

    Args:
        name: of the job.
        run_id: of this run.
        run_dir: absolute run directory.
        program: what every rank runs.
        num_nodes: nodes, pretended ones on the local cluster.
        ranks_per_node: a number, or "gpu", "cpu", "auto" for as many as a node has; None deals `num_ranks` by what
            each node takes.
        num_ranks: of all nodes; None where only the machine can tell.
        gpus_per_node: GPUs that each node may use; None is all.
        meeting: how nodes find each other, as far as the job says.
        limits: times and restarts.
        warning: signal that ranks get some time before a queue ends them, and how long before in seconds.
    """

    name: str
    run_id: str
    run_dir: Path
    program: Program
    num_nodes: int = 1
    ranks_per_node: int | str | None = 1
    num_ranks: int | None = None
    gpus_per_node: int | None = None
    meeting: Meeting = Meeting()
    limits: Limits = Limits()
    warning: tuple[str, float] = ("USR2", 180.0)
