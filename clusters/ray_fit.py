"""Which nodes of a Ray cluster a run can have, from what Ray tells of them. Pure.

What Ray tells of a node is its id, its address, whether it lives, and all that it has (`ray.nodes()`).
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from meshwright.clusters.base import Limits
from meshwright.clusters.ray_nodes import node_name

__all__ = ["banned", "bundle_words", "called", "fewer", "fitting", "kept_of", "living", "usable", "why_infeasible"]


def called(nodes: Sequence[Mapping[str, Any]]) -> dict[str, set[str]]:
    """Id of each node -> all that it may be called."""
    places = [(str(each["NodeManagerAddress"]), str(each["NodeID"])) for each in nodes]
    return {own: {own, address, node_name(address, own)} for address, own in places}


def living(nodes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of some nodes that live."""
    return [each for each in nodes if each["Alive"]]


def banned(nodes: Sequence[Mapping[str, Any]], exclude: Collection[str]) -> list[str]:
    """Ids of the living nodes that are not to be used.

    Args:
        nodes: as Ray tells of them.
        exclude: whatever these may be called.
    """
    return [own for own, names in called(living(nodes)).items() if names & set(exclude)]


def usable(nodes: Sequence[Mapping[str, Any]], exclude: Collection[str]) -> list[Mapping[str, float]]:
    """All that each living node has that may be used, in use or not.

    Args:
        nodes: as Ray tells of them.
        exclude: whatever others may be called.
    """
    out = banned(nodes, exclude)
    return [each["Resources"] for each in living(nodes) if each["NodeID"] not in out]


def fitting(bundle: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> int:
    """How many nodes have so much.

    >>> fitting({"CPU": 1, "GPU": 8}, [{"CPU": 64, "GPU": 8}, {"CPU": 64}])
    1
    """
    return sum(all(node.get(name, 0.0) >= wanted for name, wanted in bundle.items()) for node in nodes)


def fewer(bundle: Mapping[str, float], count: int, *, fewest: int, free: Mapping[str, float]) -> int:
    """The number of nodes to try after so many were not to be had.

    Args:
        bundle: what is asked of each.
        count: that were not.
        fewest: to be tried.
        free: on all nodes together.

    >>> fewer({"CPU": 4, "GPU": 8}, 16, fewest=2, free={"CPU": 99, "GPU": 40})
    5
    >>> fewer({"CPU": 4}, 4, fewest=2, free={"CPU": 99}), fewer({"CPU": 4}, 4, fewest=2, free={})
    (3, 2)
    """
    have = min(int(free.get(name, 0.0) // wanted) for name, wanted in bundle.items())
    return max(fewest, min(count - 1, have))


def kept_of(limits: Limits, count: int) -> int:
    """As many of the nodes that an elastic run wants as it had when its last attempt ended, and can use again.

    Args:
        limits: of the run.
        count: that it wants.

    >>> kept_of(Limits(fewest_nodes=1), 3)
    3
    """
    before = limits.past[-1] if limits.past else None
    if before is None or before.nodes is None:  # it wants as many as it had
        return count
    return min(count, max(limits.fewest_nodes or 1, before.nodes[0] - len(before.excludes)))


def bundle_words(bundle: Mapping[str, float]) -> str:
    """What is asked of a node, or what it has, for people."""
    return "{" + ", ".join(f"{name}: {count:g}" for name, count in bundle.items()) + "}"


def why_infeasible(bundle: Mapping[str, float], count: int, nodes: Sequence[Mapping[str, float]]) -> str | None:
    """Why a cluster can never give so many nodes with so much each; None where it can.

    Args:
        bundle: what is asked of each node.
        count: of nodes.
        nodes: everything each living node has, in use or not.

    >>> why_infeasible({"CPU": 1, "GPU": 8}, 2, [{"CPU": 64, "GPU": 8}, {"CPU": 64}])
    'asked for 2 nodes with {CPU: 1, GPU: 8}; of 2 nodes 1 has that much: {CPU: 64, GPU: 8}, {CPU: 64}'
    """
    fit = fitting(bundle, nodes)
    if fit >= count:
        return None
    has = ", ".join(bundle_words({name: each[name] for name in ("CPU", "GPU") if name in each}) for each in nodes)
    return f"asked for {count} nodes with {bundle_words(bundle)}; of {len(nodes)} nodes {fit} has that much: {has}"
