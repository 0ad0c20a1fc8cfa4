"""Tokens once to each node: `meshwright.moe.transport_once` sends a row for each (token, node), and sums come back."""

import pytest

from meshwright.moe.axes import ExpertAxes
from meshwright.moe.transport_once import Once
from meshwright.testing import run_ranks
from tests.moe.real import CASES, EACH, WIDTH, carried_once, counted, mesh_of
from tests.moe.threads import on_threads
from tests.moe.traffic import GRID, RANKS, K, rows_between, visits_between

ROW = 8 * WIDTH
WEIGHTS, IDS = 8 * K, 4 * K


@pytest.mark.slow
def test_bytes_between_and_inside_of_nodes() -> None:
    rows, visits = rows_between(), visits_between()
    assert int(visits.sum()) < int(rows.sum())
    found = run_ranks(counted, mesh_of(GRID), GRID, "once")
    for rank, (there, back) in enumerate(found):
        node, place = rank // GRID[1], rank % GRID[1]
        out, arriving = int(visits[node, place, 1 - node]), int(visits[1 - node, place, node])
        assert there.sent_bytes("all_to_all", "ep_node") == (ROW + WEIGHTS + IDS) * out + ROW * arriving
        assert back.sent_bytes("all_to_all", "ep_node") == ROW * out + (ROW + WEIGHTS) * arriving
        leaving, coming = int(rows[:, place, node, 1 - place].sum()), int(rows[:, 1 - place, node, place].sum())
        for each in (there, back):
            assert each.sent_bytes("all_to_all", "ep_local") == ROW * (leaving + coming)
            assert (each.count("all_to_all", "ep_node"), each.count("all_to_all", "ep_local")) == (2, 2)
            assert each.count(axis="ep") == 0
        assert there.payload_bytes("all_gather", "ep_node") == 8 * GRID[0] * (GRID[0] + 1)  # and k
        assert there.payload_bytes("all_gather", "ep_local") == 8 * GRID[1] * EACH * RANKS // GRID[0]


def test_with_one_node_rows_take_one_hop() -> None:
    def work(rank: int, axes: ExpertAxes) -> bool:
        return len(carried_once(CASES[0], (1, 2), rank, Once(axes))) == 2 + EACH + 1

    assert all(on_threads(mesh_of((1, 2)), work))
