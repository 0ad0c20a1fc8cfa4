"""Ray as a cluster: one actor per node holds that node's agent, placed by a group that Ray spreads strictly.

Ray finds the nodes and gives each actor its CPUs and GPUs; from there on a run is as on any other machines: the agents'
lines go through the actors' calls, and ranks meet by themselves.
"""

import secrets as tokens
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from meshwright.clusters.base import Limits, StartPlan, StartRequest
from meshwright.clusters.descriptors import need_room
from meshwright.clusters.errors import FewerNodesError, UnavailableError
from meshwright.clusters.lost import LOST_CODE, lost_in_ray
from meshwright.clusters.pipes import Event, Far, PipeHandle
from meshwright.clusters.ray_access import attached, is_open
from meshwright.clusters.ray_fit import (
    banned,
    bundle_words,
    called,
    fewer,
    fitting,
    kept_of,
    living,
    usable,
    why_infeasible,
)
from meshwright.clusters.ray_line import RayLine
from meshwright.clusters.ray_nodes import (
    actors_in,
    asked_for,
    give_back,
    ids_of,
    node_name,
    reached_in_actors,
    through_actors,
)
from meshwright.clusters.ray_plan import RayOptions, bundle_of, placed_as, plan_ray, renamed
from meshwright.clusters.reaching import Reached, Visit
from meshwright.clusters.sending import Keeper

__all__ = ["RayCluster", "RayOptions", "plan_ray"]

_LOST_AFTER_S = 30.0
_FEWER_S = 10.0
"""How long Ray may take to place fewer nodes, when it had all its time for more, or more than a run had."""


class RayCluster:
    """A Ray cluster that runs already.

    Args:
        options: what is asked of it.
    """

    def __init__(self, options: RayOptions) -> None:
        self._options = options
        self._bundle: dict[str, float] = {}
        self._told: list[Event] = []
        self._kept: list[Any] = []  # of a start that asked for more
        self.admit: Callable[[Reached], list[dict[str, Any]]] | None = None

    def plan(self, request: StartRequest) -> StartPlan:
        """The exact start plan of a request."""
        self._bundle = bundle_of(request, self._options)
        return plan_ray(request, self._options)

    def count(self, request: StartRequest) -> int:
        """Living nodes that have what is asked of each and are not left out, in use or not."""
        self._bundle = bundle_of(request, self._options)
        return fitting(self._bundle, usable(attached(self._options.address).nodes(), self._options.exclude))

    def back(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of some nodes that Ray has still, or again."""
        there = called(living(attached(self._options.address).nodes())).values()
        return tuple(name for name in names if any(name in each for each in there))

    def reached(self, request: StartRequest, visit: Visit) -> AbstractContextManager[Reached]:
        """Nodes that Ray gives for an examination, with all that the job wants of each."""
        del visit  # Ray has a time of its own for it: cluster.ready_timeout
        self._bundle = bundle_of(request, self._options)

        def placed() -> tuple[list[Any], list[Any]]:
            self._need(attached(self._options.address), request.num_nodes, request.limits.fewest_nodes)
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
        known = called(ray.nodes()).values()
        unknown = ", ".join(name for name in self._options.exclude if not any(name in names for names in known))
        if unknown:
            sys.stderr.write(f"meshwright: cluster.exclude: this Ray cluster has no node {unknown}\n")
        self._need(ray, len(plan.nodes), plan.limits.fewest_nodes)

    def _need(self, ray: Any, count: int, fewest: int | None) -> None:
        """Makes sure that the cluster can ever give so many nodes, or the fewest that an elastic job runs on."""
        why = why_infeasible(self._bundle, fewest or count, usable(ray.nodes(), self._options.exclude))
        if why is not None:
            least = "" if fewest is None else f" on nodes.min = {fewest} nodes"
            raise UnavailableError(f"Ray could never place this run{least}: {why}{self._left_out()}")

    def start(self, plan: StartPlan, secrets: Mapping[str, str]) -> PipeHandle:
        """Executes a plan: an actor per node, each with an agent that is told its part.

        Raises:
            FewerNodesError: when an elastic run may be had on fewer nodes.
            UnavailableError: when Ray has not placed the nodes in time, or they are too many for this process.
        """
        need_room(4 * len(plan.nodes), f"{len(plan.nodes)} nodes")
        groups, begun, others = self._begun(plan)
        try:
            places = [line.place() for line in begun]
        except BaseException:
            give_back(*groups)
            raise
        lines = {node_name(*place): line for place, line in zip(places, begun, strict=True)}
        placed = [placed_as(node, name) for node, name in zip(plan.nodes, lines, strict=True)]
        nodes = tuple(renamed(node, name) for node, name in zip(plan.nodes, lines, strict=True))
        plan = replace(plan, nodes=nodes, meeting=replace(plan.meeting, host=places[0][0]))
        run_dir, probe = Path(plan.run_dir), f"private/probe-{tokens.token_hex(8)}"
        (run_dir / probe).touch(mode=0o600)
        files = {name: (run_dir / name).read_text() for name in ("job.json", "job.yaml")}

        told = {"probe": probe, "passed": {}, "files": files}
        far = Far(told, _LOST_AFTER_S, lambda name, code: _lost(name, lines[name], code), Keeper(run_dir))
        # a line is as much of a process as a handle needs
        agents = cast("Mapping[str, subprocess.Popen[bytes]]", lines)
        handle = _RayHandle(plan, agents, secrets, far=far, groups=groups)
        handle.say([*others, *placed])
        return handle

    def _begun(self, plan: StartPlan) -> tuple[list[Any], list[RayLine], list[Event]]:
        """Placement groups whose nodes passed, their lines to agents, and what is told of others that did not."""
        while True:
            groups, actors = self._placed(len(plan.nodes), plan.limits)
            try:
                out = [] if self.admit is None else self.admit(through_actors(actors))
                if not out:
                    return (
                        groups,
                        [RayLine(*each) for each in zip(actors, (node.agent for node in plan.nodes), strict=True)],
                        self._told,
                    )
            except BaseException:
                give_back(*groups)
                raise
            give_back(*groups)
            self._told += [{**each, "event": "left_out", "attempt": len(plan.limits.past) - 1} for each in out]
            left_out = (*self._options.exclude, *(str(each["node"]) for each in out))
            self._options = replace(self._options, exclude=left_out)

    def _placed(self, count: int, limits: Limits | None = None) -> tuple[list[Any], list[Any]]:
        """Placement groups of so many nodes, and an actor in each of their bundles.

        Args:
            count: of nodes.
            limits: of a run; an elastic one does not wait for nodes that are not there. One that goes on asks for more
                nodes only besides as many as it had, and not for long: others may want these.
        """
        ray, fewest = attached(self._options.address), None if limits is None else limits.fewest_nodes
        fit = fitting(self._bundle, usable(ray.nodes(), self._options.exclude))
        if fewest is not None and fewest <= fit < count:
            raise FewerNodesError(f"of Ray's nodes {fit} can run it{self._left_out()}", fit)
        groups = self._taken(count)
        first = count if limits is None or fewest is None else kept_of(limits, count)
        try:
            if not groups:
                self._ask(ray, first, groups, fewest=fewest)
            if count > _size(groups):
                self._ask(ray, count, groups, fewest=fewest)
            return groups, [actor for each in groups for actor in actors_in(ray, each, self._bundle)]
        except FewerNodesError:
            self._kept = groups
            raise
        except BaseException:
            give_back(*groups)
            raise

    def _taken(self, count: int) -> list[Any]:
        """What a start before kept, where it is not too much for this one."""
        kept, self._kept = self._kept, []
        if _size(kept) <= count:
            return kept
        give_back(*kept)
        return []

    def _ask(self, ray: Any, count: int, groups: list[Any], *, fewest: int | None) -> None:
        """Adds a placement group to those of a run, for the nodes that it has not; waits until it is placed."""
        have = _size(groups)
        out = [*banned(ray.nodes(), self._options.exclude), *(own for each in groups for own in ids_of(each))]
        group = asked_for(self._bundle, count - have, out)
        within_s = self._options.ready_timeout_s if not have else min(self._options.ready_timeout_s, _FEWER_S)
        try:
            if group.wait(timeout_seconds=within_s):
                groups.append(group)
                return
        except BaseException:
            give_back(group)
            raise
        give_back(group)
        if have:
            asked = f"{count - have} nodes with {bundle_words(self._bundle)} besides the {have} it has"
            raise FewerNodesError(f"Ray did not place {asked} within {within_s:g} s{self._left_out()}", have)
        raise self._unplaced(count, fewest, ray.available_resources())

    def _unplaced(self, count: int, fewest: int | None, free: Mapping[str, float]) -> UnavailableError:
        """Why nodes were not to be had in time; of an elastic run fewer are waited for less long."""
        left = ", ".join(f"{name} {free[name]:g}" for name in ("CPU", "GPU") if name in free)
        asked, within_s = f"{count} nodes with {bundle_words(self._bundle)}", self._options.ready_timeout_s
        least = " (nodes.min)" if count == fewest else ""
        why = f"Ray did not place {asked}{least} within {within_s:g} s; free on all nodes together: "
        why += f"{left or 'nothing'}{self._left_out()}"
        if fewest is None or count <= fewest:
            return UnavailableError(f"{why}; wait for other jobs, or ask for less")
        self._options = replace(self._options, ready_timeout_s=min(within_s, _FEWER_S))
        return FewerNodesError(why, fewer(self._bundle, count, fewest=fewest, free=free))

    def _left_out(self) -> str:
        return f"; left out: {', '.join(self._options.exclude)}" if self._options.exclude else ""


def _size(groups: Sequence[Any]) -> int:
    """Nodes of placement groups."""
    return sum(len(each.bundle_specs) for each in groups)


def _lost(name: str, line: RayLine, code: int) -> Mapping[str, Any]:
    """What is told of a node that is gone."""
    words = lost_in_ray(name, line.host, line.why) if line.why else f"the agent of {name} ended with code {code}"
    return {"exit_code": LOST_CODE, "message": words}


class _RayHandle(PipeHandle):
    """A run whose agents are in actors of placement groups, which go back as soon as nothing of the run is left."""

    def __init__(
        self,
        plan: StartPlan,
        agents: "Mapping[str, subprocess.Popen[bytes]]",
        secrets: Mapping[str, str],
        *,
        far: Far,
        groups: Sequence[Any],
    ) -> None:
        self._groups = groups
        super().__init__(plan, agents, secrets, far=far)

    def say(self, events: Iterable[Event]) -> None:
        """Has events come before those of agents."""
        self._late += events

    def kill(self) -> None:
        """Kills everything of this run at once; what was kept free for it is given back."""
        try:
            super().kill()
        finally:
            give_back(*self._groups)
