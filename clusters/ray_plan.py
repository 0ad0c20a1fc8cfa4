"""The plan of a run on Ray. Where nodes lie is known when Ray has placed them. Pure."""

from dataclasses import dataclass, replace
from typing import Any

from meshwright.clusters.base import NodePlan, StartPlan, StartRequest, identity, log_name
from meshwright.clusters.dealing import ranks_per_node
from meshwright.clusters.ray_fit import bundle_words
from meshwright.clusters.spawn import AGENT_ARGV

__all__ = ["RayOptions", "bundle_of", "placed_as", "plan_ray", "renamed"]


@dataclass(frozen=True)
class RayOptions:
    """What is asked of a Ray cluster.

    Args:
        address: of its head, or "auto".
        cpus_per_node: that each actor takes.
        ready_timeout_s: how long Ray may take to place them.
        exclude: nodes that are not used: addresses, ids, or names as runs give them.
    """

    address: str = "auto"
    cpus_per_node: int = 1
    ready_timeout_s: float = 60.0
    exclude: tuple[str, ...] = ()


def plan_ray(request: StartRequest, options: RayOptions) -> StartPlan:
    """The exact start plan; pure. Where nodes lie is known when Ray has placed them.

    Raises:
        UnavailableError: where the number of ranks is not said.
    """
    per_node = ranks_per_node(request, "nodes are planned before Ray places them", gpus=request.gpus_per_node)
    each = bundle_words(bundle_of(request, options))
    return StartPlan.of(
        request,
        "ray",
        nodes=[_node(request, index=index, per_node=per_node) for index in range(request.num_nodes)],
        meeting=request.meeting,
        variant=f"at {options.address}, {request.num_nodes} x {each}, STRICT_SPREAD",
    )


def bundle_of(request: StartRequest, options: RayOptions) -> dict[str, float]:
    """What is asked of each node."""
    gpus = {"GPU": float(request.gpus_per_node)} if request.gpus_per_node else {}
    return {"CPU": float(options.cpus_per_node), **gpus}


def _node(request: StartRequest, *, index: int, per_node: int) -> NodePlan:
    ranks = tuple(range(index * per_node, (index + 1) * per_node))
    return NodePlan(
        name=f"node{index}",
        index=index,
        ranks=ranks,
        cwd=str(request.program.workdir),
        env=tuple(sorted(request.program.env)) + identity(request, f"node{index}", index),
        agent=AGENT_ARGV,
        argv=request.program.argv,
        logs=tuple(log_name(rank) for rank in ranks),
    )


def renamed(node: NodePlan, name: str) -> NodePlan:
    """A node by the name of the one that Ray has placed."""
    env = tuple((key, name if key == "MESHWRIGHT_HOST" else value) for key, value in node.env)
    return replace(node, name=name, env=env)


def placed_as(node: NodePlan, name: str) -> dict[str, Any]:
    """The event that tells what a node of the plan is called from now on."""
    return {"event": "placed", "node": node.name, "name": name}
