"""What a cluster can act on. A key that it cannot is refused where the user wrote it, never ignored.

The schema of jobs is wider than any one cluster; a key with the value it has anyway asks for nothing and is accepted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meshwright.launch.errors import JobError, Problem
from meshwright.launch.load import LoadedJob
from meshwright.launch.sizes import check_sizes
from meshwright.launch.spares import NAMED, can_shrink, fewest_of, names_of, range_of

if TYPE_CHECKING:
    from meshwright.launch.spec.job import Job

__all__ = ["GAPS", "Gap", "check_capabilities"]


@dataclass(frozen=True)
class Gap:
    """A key that a cluster does not act on.

    Args:
        key: dotted; stands for everything below it as well.
        instead: what to do.
        harmless: values that ask for nothing.
    """

    key: str
    instead: str
    harmless: tuple[Any, ...] = ()


_ALL = (
    Gap("binding", "remove it, or write none", ("none",)),
    Gap("rendezvous.backend", "remove it", ("c10d",)),
    Gap("logs.per_rank", "remove it: one log per rank is always kept", (True,)),
    Gap("logs.merge", "remove it: merged.log is always kept", (True,)),
)
_UNWATCHED = (Gap("health.watch", "remove it: agents there have no line on which they could tell"),)
_UNWARNED = (
    Gap("checkpoint.signal", "remove it: nothing ends such a job early"),
    Gap("checkpoint.lead", "remove it: nothing ends such a job early"),
)
GAPS = {
    "local": (
        *_ALL,
        *_UNWARNED,
        Gap("resources", "remove it; cluster.gpus_per_node says which GPUs a pretended node has"),
        Gap("rendezvous.interface", "remove it: ranks of one machine meet on loopback", ("auto", "lo")),
        Gap("rendezvous.port_range", "remove it: `port: auto` takes any free port; or name one `port`"),
        Gap("rendezvous.bind", "remove it", ("interface",)),
    ),
    "ssh": (
        *_ALL,
        *_UNWARNED,
        Gap("resources", "remove it; the `gpus` of a host say how many its ranks may use"),
    ),
    "slurm": (
        *_ALL,
        Gap("resources.gpu_type", "name the nodes by cluster.constraint"),
    ),
    "kubernetes": (
        *_ALL,
        Gap("after", "launch one job after the other"),
        *_UNWATCHED,
        Gap("sweep", "launch once per value with --set: a name in Kubernetes is too short for a run's values"),
        Gap("resources.gpu_type", "name the nodes by cluster.node_selector"),
        Gap("resources.exclusive", "ask for all of a node by resources"),
        Gap("rendezvous.interface", "remove it: pods have one", ("auto",)),
        Gap("failure.exclude_bad_nodes", "cordon the node: its JobSet starts pods again, and takes no word of a node"),
    ),
    "mpi": (
        *_ALL,
        *_UNWATCHED,
        *_UNWARNED,
        Gap("resources", "remove it; the host file says what nodes have"),
    ),
    "ray": (
        *_ALL,
        *_UNWARNED,
        Gap("resources.gpu_type", "remove it"),
        Gap("resources.exclusive", "ask for all CPUs of a node by cluster.cpus_per_node"),
    ),
}
"""Type of cluster -> what it does not act on."""


def check_capabilities(loaded: LoadedJob) -> None:
    """Refuses a job that asks for what its cluster cannot do.

    Raises:
        JobError: with the place of every such key.
    """
    cluster = loaded.job.cluster.type
    problems = [
        Problem(loaded.where(key), key, f"the {cluster} cluster does not act on {gap.key} yet; {gap.instead}")
        for key, gap in _asked(loaded, GAPS[cluster])
    ]
    problems += [Problem(loaded.where(key), key, text) for key, text in (*_nodes(loaded), *_of_trainjob(loaded))]
    if problems:
        raise JobError(problems)


def _nodes(loaded: LoadedJob) -> Iterator[tuple[str, str]]:
    """What a job asks of numbers of nodes that are not there, or that it cannot run on."""
    job = loaded.job
    if job.cluster.type in NAMED and job.failure.exclude_bad_nodes and not can_shrink(job):
        text = "no node is there to take a place: let the cluster name more than `nodes` needs, or remove it"
        yield "failure.exclude_bad_nodes", text
    if job.health.watch is not None and job.health.watch.on_fault == "restart" and not job.failure.exclude_bad_nodes:
        yield "health.watch.on_fault", "a restart on the same node has the same fault: set failure.exclude_bad_nodes"
    wrong = check_sizes(loaded) or _unnamed(job)
    if wrong is not None:
        yield "nodes.min", wrong


def _unnamed(job: "Job") -> str | None:
    """What is wrong with the nodes of an elastic job whose cluster does not know them, and it does not name enough."""
    have, fewest = len(names_of(job)), fewest_of(job)
    if job.cluster.type not in NAMED or range_of(job) is None or have >= fewest:
        return None
    if have:
        return f"nodes.min={fewest}, but the cluster names {have} hosts that may be used; add hosts, or write fewer"
    return "only mpiexec knows its hosts: name them in cluster.hostfile, plain names a line each, or write a number"


def _of_trainjob(loaded: LoadedJob) -> Iterator[tuple[str, str]]:
    """What a JobSet of ours can do, but none that a runtime makes of a TrainJob."""
    job = loaded.job
    if job.cluster.type != "kubernetes" or job.cluster.kind != "trainjob":
        return
    if range_of(job) is not None:
        text = "a TrainJob ends only once all of its pods have, and has as many as its trainer asks for"
        yield "nodes.min", f"{text}; use cluster.kind: jobset, or write a number of nodes"
    if job.health.preflight:
        text = "a TrainJob takes its nodes from its runtime, and could not be kept to those that are fit"
        yield "health.preflight", f"{text}; use cluster.kind: jobset, or examine them by `meshwright doctor`"


def _asked(loaded: LoadedJob, gaps: tuple[Gap, ...]) -> Iterator[tuple[str, Gap]]:
    for gap in gaps:
        below = [key for key in loaded.keys if key == gap.key or key.startswith(f"{gap.key}.")]
        leaves = [key for key in below if not any(other.startswith(f"{key}.") for other in below)]
        for key in sorted(leaves):
            value = _value(loaded.job, key)
            if value not in (None, False, (), {}) and value not in gap.harmless:
                yield key, gap


def _value(job: Any, key: str) -> Any:
    for part in key.split("."):
        try:
            job = job[int(part)] if part.isdecimal() else job[part] if isinstance(job, dict) else getattr(job, part)
        except (AttributeError, KeyError, IndexError, TypeError):
            return "something"
    return job
