"""Nodes of Ray, as a doctor reaches them: an actor with a probe on each, in a placement group as that of a run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from meshwright.clusters.evidence import Reach
from meshwright.clusters.probe import PROBE_ARGV
from meshwright.clusters.ray_line import RayLine, answered
from meshwright.clusters.reaching import Line, Reached

__all__ = ["give_back", "node_name", "reached_in_actors", "through_actors"]

_END_S = 30.0
"""Each end of a probe is a call of its actor; a run needs the actor afterwards."""


def give_back(group: Any) -> None:
    """Ends the actors of a placement group, and lets others have what it held; a head that is gone has done so."""
    from ray.util.placement_group import remove_placement_group

    with suppress(Exception):
        remove_placement_group(group)


def node_name(address: str, node_id: str) -> str:
    """What a run calls a node of Ray: of one machine there may be several, and of one address another one later.

    >>> node_name("10.0.0.2", "6f1c09ab4711")
    '10.0.0.2-6f1c09ab'
    """
    return f"{address}-{node_id[:8]}"


def through_actors(actors: Sequence[Any]) -> Reached:
    """Nodes with an actor each, which can have a probe until it is given an agent.

    Raises:
        UnavailableError: when one of them is lost.
    """

    def place(held: object) -> tuple[str, str]:
        import ray

        del held
        find: Any = ray.util.get_node_ip_address
        return str(find()), str(ray.get_runtime_context().get_node_id())

    names = [node_name(*each) for each in answered([actor.__ray_call__.remote(place) for actor in actors])]
    by_name: Mapping[str, Any] = dict(zip(names, actors, strict=True))
    reaches = tuple(Reach(name, PROBE_ARGV, by="ray") for name in names)
    return Reached(reaches, lambda reach: _line(by_name[reach.name]))


@contextmanager
def reached_in_actors(placed: Callable[[], tuple[Any, Sequence[Any]]]) -> Iterator[Reached]:
    """Nodes with an actor each, until this is left.

    Args:
        placed: makes a placement group and an actor in each of its bundles.

    Raises:
        UnavailableError: when Ray does not place them.
    """
    group, actors = placed()
    try:
        yield through_actors(actors)
    finally:
        give_back(group)


def _line(actor: Any) -> Line:
    line = RayLine(actor, PROBE_ARGV)
    return Line(line, complaint=lambda: line.why, ends=[line.end, line.kill], end_s=_END_S)
