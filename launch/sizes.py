"""A job on another number of nodes than its mesh was written for: `nodes: {min, max}`, whose mesh is that of max nodes.

    nodes 4 -> 3, 8 ranks each     tp=8 stays     dp=4 -> dp=3     num_microbatches 1 -> 2

Only the data axes change: dp first, and fsdp where what is left cannot be divided by it. The samples of a step stay the
same, in the same order; micro-batches become more, so that none holds more samples than before. Losses are weighted by
tokens over all of them, so the step computes the same numbers.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from meshwright.launch.exits import Exit
from meshwright.launch.load import LoadedJob
from meshwright.launch.spares import fewest_of, names_of, range_of
from meshwright.parallel.errors import MeshwrightError
from meshwright.parallel.mesh import AXES, DATA_AXES

if TYPE_CHECKING:
    from meshwright.launch.spec.job import Job

__all__ = [
    "SizeError",
    "check_sizes",
    "data_axes",
    "differing",
    "on_nodes",
    "shape_of",
    "size_lines",
    "size_of",
    "sized",
]

_LINES = 8


class SizeError(MeshwrightError):
    """A number of nodes that a job cannot run on."""

    exit_code = int(Exit.UNAVAILABLE)


def data_axes(degree: int, fsdp: int) -> tuple[int, int]:
    """Degrees of dp and fsdp whose product is `degree`.

    fsdp stays where it divides; else it is the next larger divisor, so that no rank keeps more of the states than was
    planned; with fewer ranks than fsdp had, all of them.

    >>> data_axes(6, 2), data_axes(3, 4), data_axes(6, 4)
    ((3, 2), (1, 3), (1, 6))
    """
    assert degree >= 1, degree
    found = next((each for each in range(fsdp, degree + 1) if degree % each == 0), degree)
    return degree // found, found


def on_nodes(job: "Job", num_nodes: int) -> "Job":
    """The same training on another number of nodes.

    Args:
        job: whose mesh is that of `job.num_nodes` nodes.
        num_nodes: at most those.

    Raises:
        SizeError: when it cannot run on so many, with the key that is in the way.
    """
    from pydantic import ValidationError

    stated = {**job.as_dict(), "nodes": num_nodes}
    if job.model is not None or job.mesh.world_size > 1:
        stated["parallel"] = {**stated["parallel"], **_parallel(job, num_nodes)}
    try:
        return type(job).model_validate(stated)
    except ValidationError as error:
        raise SizeError(f"{_nodes(num_nodes)} cannot run this job: {error.errors()[0]['msg']}") from error


def _parallel(job: "Job", num_nodes: int) -> dict[str, int]:
    """Keys of `parallel:` that follow from the number of nodes."""
    mesh, old = job.mesh, job.parallel.num_microbatches
    ranks = mesh.world_size * num_nodes // job.num_nodes
    each = prod(mesh.degree(axis) for axis in AXES if axis not in DATA_AXES)
    degree, rest = divmod(ranks, each)
    if rest or not degree or mesh.world_size * num_nodes % job.num_nodes:
        raise SizeError(
            f"{_nodes(num_nodes)} cannot run this job: pp x cp x tp = {each} ranks belong together, which do not "
            f"divide the {ranks} ranks there are; make one of these axes of `parallel` smaller"
        )
    dp, fsdp = data_axes(degree, mesh.fsdp)
    grown = -(-old * mesh.data_degree // degree)
    group = mesh.pp if old % mesh.pp == 0 else 1  # which some schedules want
    return {"dp": dp, "fsdp": fsdp, "num_microbatches": -(-grown // group) * group}


def _nodes(number: int) -> str:
    return f"{number} node{'s'[: number != 1]}"


def size_of(job: "Job", have: int) -> "Job":
    """The job on as many of the nodes that there are as it can run on; one that is not elastic as it is.

    Args:
        job: the job.
        have: nodes there are.

    Raises:
        SizeError: when there are too few.
    """
    asked = range_of(job)
    if asked is None:
        return job
    why = f"nodes.min is {asked.min}, and {_nodes(have)} {'are' if have != 1 else 'is'} left"
    for number in range(min(have, asked.max), asked.min - 1, -1):
        try:
            return on_nodes(job, number)
        except SizeError as error:
            why = str(error)
    raise SizeError(why)


def sized(loaded: LoadedJob) -> LoadedJob:
    """A job on as many of the nodes that it names as it can run on; where it names none, of those its cluster has.

    Where that is not known either, it is on the most it takes.

    Raises:
        SizeError: when they are too few.
    """
    have = len(names_of(loaded.job)) or loaded.have or loaded.job.num_nodes
    return replace(loaded, job=size_of(loaded.job, have))


def check_sizes(loaded: LoadedJob) -> str | None:
    """What is wrong with `nodes.min` of an elastic job."""
    if fewest_of(loaded.job) == loaded.job.num_nodes:
        return None
    try:
        on_nodes(loaded.job, fewest_of(loaded.job))
    except SizeError as error:
        return f"{error}; or write a larger number"
    return None


def differing(job: "Job") -> dict[str, dict[str, Any]]:
    """What differs from the job on the most nodes, for each number of nodes on which it can run.

    Args:
        job: the job; one that is not elastic has no other numbers.
    """
    asked, found = range_of(job), {}
    if asked is not None:
        whole = on_nodes(job, asked.max).as_dict()
        for number in range(asked.min, asked.max + 1):
            with suppress(SizeError):
                found[str(number)] = _difference(on_nodes(job, number).as_dict(), whole)
    return found


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of one that the other has with another value, at every depth."""
    pairs = {key: (value, other.get(key)) for key, value in one.items() if value != other.get(key)}
    return {
        key: _difference(mine, theirs) if isinstance(mine, dict) and isinstance(theirs, dict) else mine
        for key, (mine, theirs) in pairs.items()
    }


def size_lines(loaded: LoadedJob) -> tuple[str, ...]:
    """What an elastic job makes of each number of nodes, the largest first; of many some."""
    job, asked = loaded.job, range_of(loaded.job)
    if asked is None:
        return ()
    numbers = list(range(asked.max, asked.min - 1, -1))
    shown = numbers if len(numbers) <= _LINES else [*numbers[: _LINES - 1], numbers[-1]]
    head = f"{asked.min} to {asked.max}, as many as there are when ranks start"
    return (head, *(f"{number}: {_shown(job, number)}" for number in shown))


def _shown(job: "Job", number: int) -> str:
    try:
        found = on_nodes(job, number)
    except SizeError as error:
        return f"not used: {error}"
    return shape_of(found)


def shape_of(job: "Job") -> str:
    """Degrees of a job's mesh and its micro-batches, for people; of a program without a mesh its ranks."""
    if job.model is None and job.mesh.world_size == 1:
        return f"{job.num_ranks} ranks" if job.num_ranks is not None else "all ranks that nodes have"
    return f"{job.mesh}, num_microbatches={job.parallel.num_microbatches}".replace(" x ", ", ")
