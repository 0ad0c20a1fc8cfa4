"""Ray as a cluster: one actor per node holds that node's agent, placed by a group that Ray spreads strictly.

Ray finds the nodes and gives each actor its CPUs and GPUs; from there on a run is as on any other machines: the agents'
lines go through the actors' calls, and ranks meet by themselves.
"""

import secrets as tokens
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from meshwright.clusters.base import NodePlan, StartPlan, StartRequest, identity, log_name
from meshwright.clusters.dealing import ranks_per_node
from meshwright.clusters.descriptors import need_room
from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.lost import LOST_CODE, lost_in_ray
from meshwright.clusters.pipes import Event, Far, PipeHandle
from meshwright.clusters.ray_access import attached, is_open
from meshwright.clusters.ray_line import RayLine, agent_class
from meshwright.clusters.ray_nodes import give_back, node_name, reached_in_actors, through_actors
from meshwright.clusters.reaching import Reached, Visit
from meshwright.clusters.sending import Keeper
from meshwright.clusters.spawn import AGENT_ARGV

__all__ = ["RayCluster", "RayOptions", "plan_ray", "why_infeasible"]

_LOST_AFTER_S = 30.0


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
    return StartPlan.of(
        request,
        "ray",
        nodes=[_node(request, index=index, per_node=per_node) for index in range(request.num_nodes)],
        meeting=request.meeting,
        variant=f"at {options.address}, {request.num_nodes} x {_words(_bundle(request, options))}, STRICT_SPREAD",
    )


def _bundle(request: StartRequest, options: RayOptions) -> dict[str, float]:
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


def _called(nodes: Sequence[Mapping[str, Any]]) -> dict[str, set[str]]:
    """Id of each node -> all that it may be called."""
    places = [(str(each["NodeManagerAddress"]), str(each["NodeID"])) for each in nodes]
    return {own: {own, address, node_name(address, own)} for address, own in places}


def _banned(nodes: Sequence[Mapping[str, Any]], exclude: Collection[str]) -> list[str]:
    """Ids of the living nodes that are not to be used."""
    living = [each for each in nodes if each["Alive"]]
    return [own for own, names in _called(living).items() if names & set(exclude)]


def _renamed(node: NodePlan, name: str) -> NodePlan:
    env = tuple((key, name if key == "MESHWRIGHT_HOST" else value) for key, value in node.env)
    return replace(node, name=name, env=env)


def _placed_as(node: NodePlan, name: str) -> Event:
    return {"event": "placed", "node": node.name, "name": name}


def _words(bundle: Mapping[str, float]) -> str:
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
    fit = sum(all(node.get(name, 0.0) >= wanted for name, wanted in bundle.items()) for node in nodes)
    if fit >= count:
        return None
    has = ", ".join(_words({name: each[name] for name in ("CPU", "GPU") if name in each}) for each in nodes)
    return f"asked for {count} nodes with {_words(bundle)}; of {len(nodes)} nodes {fit} has that much: {has}"


class RayCluster:
    """A Ray cluster that runs already.

    Args:
        options: what is asked of it.
    """

    def __init__(self, options: RayOptions) -> None:
        self._options = options
        self._bundle: dict[str, float] = {}
        self.admit: Callable[[Reached], list[dict[str, Any]]] | None = None

    def plan(self, request: StartRequest) -> StartPlan:
        """The exact start plan of a request."""
        self._bundle = _bundle(request, self._options)
        return plan_ray(request, self._options)

    def reached(self, request: StartRequest, visit: Visit) -> AbstractContextManager[Reached]:
        """Nodes that Ray gives for an examination, with all that the job wants of each."""
        del visit  # Ray has a time of its own for it: cluster.ready_timeout
        self._bundle = _bundle(request, self._options)

        def placed() -> tuple[Any, list[Any]]:
            self._need(attached(self._options.address), request.num_nodes)
            return self._placed(request.num_nodes)

        return reached_in_actors(placed)

    def check(self, plan: StartPlan) -> None:
        """Attaches, and makes sure that the cluster can ever give what is asked.

        Raises:
            UnavailableError: when there is no such cluster, or it is too small.
        """
        lets_anybody_in = is_open(self._options.address)
        ray = attached(self._options.address)
        if lets_anybody_in:
            sys.stderr.write(
                "meshwright: this Ray cluster asks for no token: whoever reaches its ports can run programs there; "
                "start it with RAY_AUTH_MODE=token\n"
            )
        known = _called(ray.nodes()).values()
        unknown = ", ".join(name for name in self._options.exclude if not any(name in names for names in known))
        if unknown:
            sys.stderr.write(f"meshwright: cluster.exclude: this Ray cluster has no node {unknown}\n")
        self._need(ray, len(plan.nodes))

    def _need(self, ray: Any, count: int) -> None:
        """Makes sure that the cluster can ever give so many nodes."""
        nodes, banned = ray.nodes(), _banned(ray.nodes(), self._options.exclude)
        has = [node["Resources"] for node in nodes if node["Alive"] and node["NodeID"] not in banned]
        why = why_infeasible(self._bundle, count, has)
        if why is not None:
            raise UnavailableError(f"Ray could never place this run: {why}{self._left_out()}")

    def start(self, plan: StartPlan, secrets: Mapping[str, str]) -> PipeHandle:
        """Executes a plan: an actor per node, each with an agent that is told its part.

        Raises:
            UnavailableError: when Ray has not placed the nodes in time, or they are too many for this process.
        """
        need_room(4 * len(plan.nodes), f"{len(plan.nodes)} nodes")
        group, begun, others = self._begun(plan)
        try:
            places = [line.place() for line in begun]
        except BaseException:
            give_back(group)
            raise
        lines = {node_name(*place): line for place, line in zip(places, begun, strict=True)}
        placed = [_placed_as(node, name) for node, name in zip(plan.nodes, lines, strict=True)]
        nodes = tuple(_renamed(node, name) for node, name in zip(plan.nodes, lines, strict=True))
        plan = replace(plan, nodes=nodes, meeting=replace(plan.meeting, host=places[0][0]))
        run_dir, probe = Path(plan.run_dir), f"private/probe-{tokens.token_hex(8)}"
        (run_dir / probe).touch(mode=0o600)
        files = {name: (run_dir / name).read_text() for name in ("job.json", "job.yaml")}

        told = {"probe": probe, "passed": {}, "files": files}
        far = Far(told, _LOST_AFTER_S, lambda name, code: _lost(name, lines[name], code), Keeper(run_dir))
        # a line is as much of a process as a handle needs
        agents = cast("Mapping[str, subprocess.Popen[bytes]]", lines)
        handle = _RayHandle(plan, agents, secrets, far=far, group=group)
        handle.say([*others, *placed])
        return handle

    def _begun(self, plan: StartPlan) -> tuple[Any, list[RayLine], list[Event]]:
        """A placement group whose nodes passed, their lines to agents, and what is told of others that did not."""
        told: list[Event] = []
        while True:
            group, actors = self._placed(len(plan.nodes))
            try:
                out = [] if self.admit is None else self.admit(through_actors(actors))
                if not out:
                    return (
                        group,
                        [RayLine(*each) for each in zip(actors, (node.agent for node in plan.nodes), strict=True)],
                        told,
                    )
            except BaseException:
                give_back(group)
                raise
            give_back(group)
            told += [{**each, "event": "left_out", "attempt": len(plan.limits.past) - 1} for each in out]
            left_out = (*self._options.exclude, *(str(each["node"]) for each in out))
            self._options = replace(self._options, exclude=left_out)

    def _placed(self, count: int) -> tuple[Any, list[Any]]:
        """The placement group, and an actor in each of its bundles."""
        ray = attached(self._options.address)
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        banned = _banned(ray.nodes(), self._options.exclude)
        others = [{"ray.io/node-id": f"!in({','.join(banned)})"}] * count if banned else None
        group = placement_group([self._bundle] * count, strategy="STRICT_SPREAD", bundle_label_selector=others)
        if not group.wait(timeout_seconds=self._options.ready_timeout_s):
            give_back(group)
            free = ray.available_resources()
            left = ", ".join(f"{name} {free[name]:g}" for name in ("CPU", "GPU") if name in free)
            asked = f"{count} nodes with {_words(self._bundle)}"
            raise UnavailableError(
                f"Ray did not place {asked} within {self._options.ready_timeout_s:g} s; free on all nodes "
                f"together: {left or 'nothing'}{self._left_out()}; wait for other jobs, or ask for less"
            )
        made = ray.remote(agent_class())
        return group, [
            made.options(
                num_cpus=self._bundle["CPU"],
                num_gpus=self._bundle.get("GPU", 0),
                max_concurrency=4,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
            ).remote()
            for index in range(count)
        ]

    def _left_out(self) -> str:
        return f"; left out: {', '.join(self._options.exclude)}" if self._options.exclude else ""


def _lost(name: str, line: RayLine, code: int) -> Mapping[str, Any]:
    """What is told of a node that is gone."""
    words = lost_in_ray(name, line.host, line.why) if line.why else f"the agent of {name} ended with code {code}"
    return {"exit_code": LOST_CODE, "message": words}


class _RayHandle(PipeHandle):
    """A run whose agents are in actors of a placement group, which goes back as soon as nothing of the run is left."""

    def __init__(
        self,
        plan: StartPlan,
        agents: "Mapping[str, subprocess.Popen[bytes]]",
        secrets: Mapping[str, str],
        *,
        far: Far,
        group: Any,
    ) -> None:
        self._group = group
        super().__init__(plan, agents, secrets, far=far)

    def say(self, events: Iterable[Event]) -> None:
        """Has events come before those of agents."""
        self._late += events

    def kill(self) -> None:
        """Kills everything of this run at once; what was kept free for it is given back."""
        try:
            super().kill()
        finally:
            give_back(self._group)
