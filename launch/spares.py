"""A job without some of its nodes: those that it names besides the ones it needs take their places.

An elastic job (`nodes: {min, max}`) may also go on with fewer.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import ValidationError

from meshwright.launch.exits import Exit
from meshwright.launch.load import LoadedJob
from meshwright.parallel.errors import MeshwrightError

if TYPE_CHECKING:
    from meshwright.launch.spec.job import Job
    from meshwright.launch.spec.machines import NodeRange

__all__ = ["NAMED", "SpareError", "can_shrink", "fewest_of", "names_of", "range_of", "spares_of", "without"]


NAMED = ("local", "ssh", "mpi")
"""Clusters whose jobs name their nodes; in the others it is the cluster that knows them."""


_FIND = ("ray", "kubernetes")
"""Clusters that find nodes themselves in place of those that are left out, and say so where there are none."""


class SpareError(MeshwrightError):
    """Nodes that a job cannot do without."""

    exit_code = int(Exit.UNAVAILABLE)


def names_of(job: "Job") -> tuple[str, ...]:
    """Nodes that a job names, in the order they are used; none where only its cluster knows them."""
    return job.cluster.names


def spares_of(job: "Job") -> tuple[str, ...]:
    """Those of them that it does not need."""
    return names_of(job)[job.num_nodes :]


def range_of(job: "Job") -> "NodeRange | None":
    """Numbers of nodes that an elastic job runs on; None of one that is not."""
    return None if isinstance(job.nodes, int) else job.nodes


def fewest_of(job: "Job") -> int:
    """Fewest nodes that a job runs on."""
    found = range_of(job)
    return job.num_nodes if found is None else found.min


def can_shrink(job: "Job") -> bool:
    """Whether a job can do without one of the nodes that it names."""
    return len(names_of(job)) > fewest_of(job)


def without(loaded: LoadedJob, names: tuple[str, ...]) -> LoadedJob:
    """The job on other nodes.

    Args:
        loaded: the job.
        names: of nodes that it is to do without.

    Raises:
        SpareError: when it cannot.
    """
    if not names:
        return loaded
    job, who, known = loaded.job, ", ".join(names), names_of(loaded.job)
    kept = [name for name in known if name not in names]
    if job.cluster.type not in _FIND and len(kept) < fewest_of(job):
        least = "" if fewest_of(job) == job.num_nodes else "at least "
        spare = f"{len(kept)} of the {len(known)} hosts it names are left" if known else "it names no other hosts"
        raise SpareError(f"{who} cannot be left out: the job wants {least}{fewest_of(job)} nodes, and {spare}")
    stated = job.as_dict()
    if job.cluster.type == "ssh":
        stated["cluster"]["hosts"] = [each for each in stated["cluster"]["hosts"] if each["name"] not in names]
    else:
        stated["cluster"]["exclude"] = list(dict.fromkeys((*stated["cluster"]["exclude"], *names)))
    try:
        return replace(loaded, job=type(job).model_validate(stated))
    except ValidationError as error:
        raise SpareError(f"{who} cannot be left out: {error.errors()[0]['msg']}") from error
