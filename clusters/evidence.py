"""What a doctor asks of nodes and what it has found: values, from which verdicts follow without looking again."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from meshwright.clusters.inventory import WRITE_BYTES, NodeFacts

__all__ = ["CHECKS", "Clock", "Dial", "Endpoint", "Evidence", "Reach", "Reduced", "Wishes", "endpoint_of"]

CHECKS = ("ssh", "clock", "versions", "ports", "disk", "gpu", "nvlink", "allreduce")
"""Everything that is checked, in the order of the report."""


@dataclass(frozen=True)
class Reach:
    """How a node is reached.

    Args:
        name: of the node.
        argv: starts the probe there and ties it to our standard streams.
        by: "here" where all nodes are this machine, or what reaches others: "ssh", "slurm", "mpi", "ray", "kubernetes".
    """

    name: str
    argv: tuple[str, ...]
    by: str = "here"


@dataclass(frozen=True)
class Wishes:
    """What a job wants of its nodes.

    Args:
        checks: which of `CHECKS` to make.
        directories: that the run writes to.
        write_bytes: what is written to time a disk.
        interface: of the rendezvous, or "auto".
        ports: first and last that it may take; None is any.
        gpus_per_node: that each node must have; None is whatever there is.
        gpu_type: that must stand in the GPUs' names.
        allreduce_bytes: what is reduced; None chooses by backend.
        min_bus_bytes_per_s: what the job demands; None asks the catalog.
        timeout_s: for one answer of a node.
    """

    checks: tuple[str, ...] = CHECKS
    directories: tuple[str, ...] = (".",)
    write_bytes: int = WRITE_BYTES
    interface: str = "auto"
    ports: tuple[int, int] | None = None
    gpus_per_node: int | None = None
    gpu_type: str | None = None
    allreduce_bytes: int | None = None
    min_bus_bytes_per_s: float | None = None
    timeout_s: float = 60.0


@dataclass(frozen=True)
class Clock:
    """A node's clock against that of the doctor, from the exchange with the shortest round trip.

    Args:
        ahead_s: by how much it is ahead.
        unsure_s: half of the round trip: what the difference may be wrong by.
    """

    ahead_s: float
    unsure_s: float


@dataclass(frozen=True)
class Endpoint:
    """Where a node listened."""

    interface: str
    address: str
    port: int


@dataclass(frozen=True)
class Dial:
    """One node's try to reach another one.

    Args:
        source: who dialled.
        target: who was meant.
        endpoint: of the target.
        seconds: until the greeting; None where there was none.
        error: why.
    """

    source: str
    target: str
    endpoint: Endpoint
    seconds: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Reduced:
    """A timed all-reduce.

    Args:
        nodes: that took part.
        backend: "gloo" or "nccl".
        ranks: number of them.
        num_bytes: what was reduced.
        bus_bytes_per_s: None where it failed.
        error: why, and on which node.
    """

    nodes: tuple[str, ...]
    backend: str
    ranks: int
    num_bytes: int
    bus_bytes_per_s: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Evidence:
    """What was found on all nodes.

    Args:
        reaches: the nodes that were asked for.
        silent: node -> why it gave no answer.
        facts: node -> what it told of itself.
        clocks: node -> its clock.
        listening: node -> where it listened.
        deaf: node -> interfaces on which it could not listen, and why.
        dials: every try.
        reduced: over all nodes.
        pairs: between each two, where all together were too slow.
    """

    reaches: tuple[Reach, ...]
    silent: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, NodeFacts] = field(default_factory=dict)
    clocks: Mapping[str, Clock] = field(default_factory=dict)
    listening: Mapping[str, tuple[Endpoint, ...]] = field(default_factory=dict)
    deaf: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dials: tuple[Dial, ...] = ()
    reduced: Reduced | None = None
    pairs: tuple[Reduced, ...] = ()

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of all nodes that were asked for."""
        return tuple(reach.name for reach in self.reaches)


def endpoint_of(node: str, evidence: Evidence) -> Endpoint | None:
    """Where others can meet a node: the first of its interfaces that every node which dialled it got through to.

    >>> eth, lo = Endpoint("eth0", "10.0.0.1", 1), Endpoint("lo", "127.0.0.1", 1)
    >>> dials = (Dial("b", "a", eth, 0.1), Dial("b", "a", lo, error="another machine answers there"))
    >>> endpoint_of("a", Evidence((), listening={"a": (lo, eth)}, dials=dials)).interface
    'eth0'
    """
    for endpoint in evidence.listening.get(node, ()):
        tries = [dial for dial in evidence.dials if dial.target == node and dial.endpoint == endpoint]
        if tries and all(dial.seconds is not None for dial in tries):
            return endpoint
    return None
