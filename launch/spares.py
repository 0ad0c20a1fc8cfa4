"""A job without some of its nodes: those that it names besides the ones it needs take their places."""

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import ValidationError

from meshwright.launch.exits import Exit
from meshwright.launch.load import LoadedJob
from meshwright.parallel.errors import MeshwrightError

if TYPE_CHECKING:
    from meshwright.launch.spec.job import Job

__all__ = ["SpareError", "names_of", "spares_of", "without"]


class SpareError(MeshwrightError):
    """Nodes that a job cannot do without."""

    exit_code = int(Exit.UNAVAILABLE)


def names_of(job: "Job") -> tuple[str, ...]:
    """Nodes that a job names, in the order they are used; none where only its cluster knows them."""
    return job.cluster.names if job.cluster.type in ("local", "ssh") else ()


def spares_of(job: "Job") -> tuple[str, ...]:
    """Those of them that it does not need."""
    return names_of(job)[job.num_nodes :]


def without(loaded: LoadedJob, names: tuple[str, ...]) -> LoadedJob:
    """The job on other nodes.

    Args:
        loaded: the job.
        names: of nodes that it is to do without.

    Raises:
        SpareError: when it cannot.
    """
    job, who, known = loaded.job, ", ".join(names), names_of(loaded.job)
    kept = [name for name in known if name not in names]
    if len(kept) < job.num_nodes:
        spare = f"{len(kept)} of the {len(known)} hosts it names are left" if known else "it names no other hosts"
        raise SpareError(f"{who} cannot be left out: the job wants {job.num_nodes} nodes, and {spare}")
    stated = job.as_dict()
    if job.cluster.type == "local":
        stated["cluster"]["exclude"] = [*stated["cluster"]["exclude"], *names]
    else:
        stated["cluster"]["hosts"] = [each for each in stated["cluster"]["hosts"] if each["name"] not in names]
    try:
        return replace(loaded, job=type(job).model_validate(stated))
    except ValidationError as error:
        raise SpareError(f"{who} cannot be left out: {error.errors()[0]['msg']}") from error
