"""Which nodes of a Ray cluster a run can have: those that live, have enough, and are not left out by any name."""

from typing import Any

import pytest

from meshwright.clusters.ray_fit import banned, called, fewer, usable, why_infeasible


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


NODES = [alive("aaaaaaaacc", "10.0.0.1"), alive("bbbbbbbbcc", "10.0.0.1"), alive("d", "10.0.0.3", lives=False)]


def test_a_node_is_called_by_its_id_its_address_and_the_name_that_runs_give_it() -> None:
    assert called(NODES)["bbbbbbbbcc"] == {"bbbbbbbbcc", "10.0.0.1", "10.0.0.1-bbbbbbbb"}
    assert banned(NODES, ["10.0.0.1-bbbbbbbb"]) == ["bbbbbbbbcc"]
    assert banned(NODES, ["10.0.0.1", "10.0.0.3"]) == ["aaaaaaaacc", "bbbbbbbbcc"], (
        "of one address all, of dead ones none"
    )
    assert [len(usable(NODES, out)) for out in ([], ["aaaaaaaacc"], ["10.0.0.1"])] == [2, 1, 0]


@pytest.mark.parametrize(("free", "count"), [({"GPU": 99.0, "CPU": 99.0}, 7), ({"GPU": 33.0, "CPU": 99.0}, 4), ({}, 2)])
def test_the_next_number_is_one_less_or_what_is_free_and_never_below_the_fewest(
    free: dict[str, float], count: int
) -> None:
    assert fewer({"CPU": 1.0, "GPU": 8.0}, 8, fewest=2, free=free) == count
