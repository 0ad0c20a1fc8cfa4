"""Every token to every rank: `meshwright.moe.transport_gather` sends the same whatever the routing."""

import pytest

from meshwright.testing import run_ranks
from tests.moe.real import TRAFFIC, WIDTH, counted, mesh_of
from tests.moe.traffic import GRID, RANKS, K


@pytest.mark.slow
def test_bytes_are_those_of_the_largest_share_for_all() -> None:
    places = RANKS * max(TRAFFIC.shares)
    for there, back in run_ranks(counted, mesh_of(GRID), GRID, "all_gather"):
        tokens, weights, ids, kept = 8 * WIDTH, 8 * K, 8 * K, K
        assert there.payload_bytes("all_gather", "ep") == 8 * RANKS * 2 + places * (tokens + weights + ids + kept)
        assert there.payload_bytes("reduce_scatter", "ep") == places * tokens
        assert back.payload_bytes("all_gather", "ep") == places * tokens
        assert back.payload_bytes("reduce_scatter", "ep") == places * (tokens + weights)
        assert (there.count(), back.count()) == (6, 3)
