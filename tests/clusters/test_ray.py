"""Ray: the plan, and what can never be placed."""

from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.clusters.base import Program, StartRequest
from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.ray import RayOptions, plan_ray, why_infeasible

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
