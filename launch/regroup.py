"""Which nodes a run goes on with: who takes whose place, whether it shrinks or grows, and who is back."""

from collections.abc import Sequence
from contextlib import suppress

from meshwright.clusters.contract import Cluster, Queue, Returning
from meshwright.clusters.errors import UnavailableError
from meshwright.launch.load import LoadedJob
from meshwright.launch.registry import cluster_of
from meshwright.launch.sizes import sized
from meshwright.launch.spares import names_of, range_of

__all__ = ["can_return", "change_words", "nodes_back", "used_names"]


def used_names(loaded: LoadedJob) -> tuple[str, ...]:
    """Names of the nodes that a job runs on."""
    job = sized(loaded).job
    return names_of(job)[: job.num_nodes]


def change_words(before: Sequence[str], now: Sequence[str] | int, excludes: Sequence[str]) -> str:
    """What becomes of the nodes of a run, for people.

    Args:
        before: their names.
        now: their names from now on, or their number where the cluster chooses them.
        excludes: those that are left out.

    >>> change_words(("a", "b"), ("a", "c"), ("b",))
    'c in place of b'
    >>> change_words(("a", "b", "c"), ("a", "c"), ("b",))
    'it shrinks from 3 nodes to 2, without b'
    >>> change_words(("a", "c"), ("a", "b", "c"), ())
    'it grows from 2 nodes to 3, with b'
    >>> change_words(("10.0.0.2-6f1c", "10.0.0.3-21aa"), 2, ("10.0.0.2-6f1c",))
    'on other nodes than 10.0.0.2-6f1c'
    >>> change_words(("10.0.0.2-6f1c", "10.0.0.3-21aa"), 1, ("10.0.0.2-6f1c",))
    'it shrinks from 2 nodes to 1, without 10.0.0.2-6f1c'
    >>> change_words(("10.0.0.2-6f1c",), 3, ())
    'it grows from 1 node to 3'
    """
    known = () if isinstance(now, int) else now
    new, lost = ", ".join(name for name in known if name not in before), ", ".join(excludes)
    count = now if isinstance(now, int) else len(now)
    if count != len(before):
        return _resized(len(before), count, new=new, lost=lost)
    if lost and not known:
        return f"on other nodes than {lost}"
    return f"{new} in place of {lost}" if new else "on the same nodes"


def _resized(before: int, now: int, *, new: str, lost: str) -> str:
    sides = [f"without {lost}" if lost else "", f"with {new}" if new else ""]
    verb, noun = "shrinks" if now < before else "grows", "node" if before == 1 else "nodes"
    return ", ".join([f"it {verb} from {before} {noun} to {now}", *filter(None, sides)])


def can_return(cluster: Cluster | Queue, loaded: LoadedJob) -> bool:
    """Whether an elastic job has fewer nodes than it takes, and its cluster nodes that may come back."""
    return isinstance(cluster, Returning) and sized(loaded).job.num_nodes < loaded.job.num_nodes


def nodes_back(loaded: LoadedJob, names: Sequence[str]) -> tuple[str, ...]:
    """Those of some nodes of an elastic job that are there again; pretended nodes never come back.

    Args:
        loaded: as asked for.
        names: of nodes that were lost.
    """
    if range_of(loaded.job) is None or not names:
        return ()
    with suppress(UnavailableError):  # the new start will say so
        cluster = cluster_of(loaded)
        return cluster.back(names) if isinstance(cluster, Returning) else ()
    return ()
