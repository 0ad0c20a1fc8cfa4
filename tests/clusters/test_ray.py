"""Ray: the plan, and what can never be placed."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from meshwright.clusters import ray as module
from meshwright.clusters.base import Program, StartRequest
from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.ray import RayCluster, RayOptions, plan_ray, why_infeasible

REQUEST = StartRequest("j", "r", Path("/runs/r"), Program(("x",), Path("/w")), 2, None, 16, 8)


def test_a_plan_says_what_is_asked_of_each_node() -> None:
    plan = plan_ray(REQUEST, RayOptions("10.0.0.1:6379", 12))
    assert (plan.cluster, plan.variant) == ("ray", "at 10.0.0.1:6379, 2 x {CPU: 12, GPU: 8}, STRICT_SPREAD")
    assert [node.ranks for node in plan.nodes] == [tuple(range(8)), tuple(range(8, 16))]
    assert plan_ray(replace(REQUEST, ranks_per_node="gpu"), RayOptions()).world_size == 16
    with pytest.raises(UnavailableError, match="write a number"):
        plan_ray(replace(REQUEST, ranks_per_node="auto"), RayOptions())


@pytest.mark.parametrize(
    ("nodes", "feasible"),
    [
        ([{"CPU": 8, "GPU": 8}] * 2, True),
        ([{"CPU": 8, "GPU": 8}] * 3, True),
        ([{"CPU": 16, "GPU": 16}], False),
        ([{"CPU": 8, "GPU": 8}, {"CPU": 8, "GPU": 4}], False),
        ([], False),
    ],
)
def test_a_spread_needs_as_many_nodes_that_each_have_enough(nodes: list[dict[str, float]], feasible: bool) -> None:
    assert (why_infeasible({"CPU": 1, "GPU": 8}, 2, nodes) is None) == feasible


def alive(node: str, address: str, *, lives: bool = True) -> dict[str, Any]:
    return {"NodeID": node, "NodeManagerAddress": address, "Alive": lives, "Resources": {"CPU": 16.0, "GPU": 8.0}}


@pytest.mark.parametrize("exclude", ["10.0.0.2", "bbbbbbbbcc", "10.0.0.2-bbbbbbbb"])
def test_nodes_that_are_left_out_do_not_count_by_whatever_name(monkeypatch: pytest.MonkeyPatch, exclude: str) -> None:
    nodes = [alive("aaaaaaaacc", "10.0.0.1"), alive("bbbbbbbbcc", "10.0.0.2"), alive("d", "10.0.0.3", lives=False)]
    monkeypatch.setattr(module, "attached", lambda address: SimpleNamespace(nodes=lambda: nodes))
    monkeypatch.setattr(module, "is_open", lambda address: False)
    whole = RayCluster(RayOptions("a:1"))
    whole.check(whole.plan(REQUEST))
    cluster = RayCluster(RayOptions("a:1", exclude=("10.0.0.9", exclude)))
    plan = cluster.plan(REQUEST)
    with pytest.raises(UnavailableError, match=f"of 1 nodes 1 has that much: .*; left out: 10.0.0.9, {exclude}$"):
        cluster.check(plan)
