"""Nodes of Ray, as a doctor reaches them: an actor with a probe on each, in a placement group as that of a run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from meshwright.clusters.evidence import Reach
from meshwright.clusters.probe import PROBE_ARGV
from meshwright.clusters.ray_line import RayLine, agent_class, answered
from meshwright.clusters.reaching import Line, Reached

__all__ = ["actors_in", "asked_for", "give_back", "ids_of", "node_name", "reached_in_actors", "through_actors"]

_END_S = 30.0
"""Each end of a probe is a call of its actor; a run needs the actor afterwards."""


def asked_for(bundle: Mapping[str, float], count: int, banned: Sequence[str]) -> Any:
    """A placement group of so many nodes, which Ray may not have placed yet.

    Args:
        bundle: what is asked of each.
        count: of nodes.
        banned: ids of nodes that are not used.
    """
    from ray.util.placement_group import placement_group

    others = [{"ray.io/node-id": f"!in({','.join(banned)})"}] * count if banned else None
    return placement_group([dict(bundle)] * count, strategy="STRICT_SPREAD", bundle_label_selector=others)


def ids_of(group: Any) -> list[str]:
    """Ids of the nodes that a placement group has."""
    from ray.util.placement_group import placement_group_table

    return list(placement_group_table(group)["bundles_to_node_id"].values())


def actors_in(ray: Any, group: Any, bundle: Mapping[str, float]) -> list[Any]:
    """An actor in each bundle of a placement group.

    Args:
        ray: the module.
        group: that is placed.
        bundle: what each of its nodes has for it.
    """
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    made = ray.remote(agent_class())
    return [
        made.options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            max_concurrency=4,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        ).remote()
        for index in range(len(group.bundle_specs))
    ]


def give_back(*groups: Any) -> None:
    """Ends the actors of placement groups, and lets others have what they held; a head that is gone has done so."""
    from ray.util.placement_group import remove_placement_group

    for group in groups:
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
def reached_in_actors(placed: Callable[[], tuple[Sequence[Any], Sequence[Any]]]) -> Iterator[Reached]:
    """Nodes with an actor each, until this is left.

    Args:
        placed: makes placement groups and an actor in each of their bundles.

    Raises:
        UnavailableError: when Ray does not place them.
    """
    groups, actors = placed()
    try:
        yield through_actors(actors)
    finally:
        give_back(*groups)


def _line(actor: Any) -> Line:
    line = RayLine(actor, PROBE_ARGV)
    return Line(line, complaint=lambda: line.why, ends=[line.end, line.kill], end_s=_END_S)
