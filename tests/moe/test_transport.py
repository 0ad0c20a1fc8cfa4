"""Rows in hops: as many messages and bytes as the formulas say."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from meshwright.moe.axes import ExpertAxes
from meshwright.moe.top_k import TopK
from meshwright.moe.transport import Hopping
from meshwright.moe.transports import TransportKind
from meshwright.parallel.ledger import LedgerSummary
from meshwright.testing import run_ranks
from tests.moe.real import EACH, WIDTH, counted, mesh_of
from tests.moe.threads import on_threads
from tests.moe.traffic import GRID, RANKS, rows_between

BYTES = 8 * WIDTH


def places() -> Sequence[tuple[int, int, int]]:
    return [(rank, rank // GRID[1], rank % GRID[1]) for rank in range(RANKS)]


def test_rows_of_the_case_are_uneven() -> None:
    rows = rows_between().reshape(RANKS, RANKS)
    assert rows[2].sum() == 0
    assert len(set(rows.flatten().tolist())) > 4


def check(summary: LedgerSummary, axis: str, out: int, back: int) -> None:
    """Two exchanges over an axis, one each way."""
    assert summary.count("all_to_all", axis) == 2
    assert summary.sent_bytes("all_to_all", axis) == BYTES * (out + back)


@pytest.mark.slow
def test_one_hop_sends_each_row_once_each_way() -> None:
    rows = rows_between().reshape(RANKS, RANKS)
    for rank, (there, back) in enumerate(run_ranks(counted, mesh_of(GRID), GRID, "one_hop")):
        others = [each for each in range(RANKS) if each != rank]
        out, arriving = int(rows[rank, others].sum()), int(rows[others, rank].sum())
        for each in (there, back):
            check(each, "ep", out, arriving)
            assert {call.group_size for call, _ in each.calls} == {RANKS}
        assert there.payload_bytes("all_gather", "ep") == 8 * RANKS * RANKS * EACH  # counts for experts
        assert (there.count(), back.count()) == (3, 2)


def hops(rows: Tensor, node: int, place: int, order: TransportKind) -> dict[str, tuple[int, int]]:
    """Rows that a rank sends over each axis, on the way there and on the way back."""
    away, beside = 1 - node, 1 - place  # of a grid of 2 x 2
    if order == "inter_first":
        return {
            "ep_node": (int(rows[node, place, away].sum()), int(rows[away, place, node].sum())),
            "ep_local": (int(rows[:, place, node, beside].sum()), int(rows[:, beside, node, place].sum())),
        }
    return {
        "ep_local": (int(rows[node, place, :, beside].sum()), int(rows[node, beside, :, place].sum())),
        "ep_node": (int(rows[node, :, away, place].sum()), int(rows[away, :, node, place].sum())),
    }


def test_experts_that_make_nothing_of_nothing_do_not_stop_others() -> None:
    def skipping(rows: Tensor, counts: Tensor) -> Tensor:
        return rows * 2 if len(rows) else torch.zeros_like(rows)  # with nothing to go back through

    def work(rank: int, axes: ExpertAxes) -> Tensor:
        tokens = torch.ones(3, 2, requires_grad=True)
        routing = TopK(num_experts=2, k=1).route(torch.tensor([[9.0, 0.0]]).repeat(3, 1))
        made = Hopping(axes).carry(tokens, routing, skipping)
        return torch.autograd.grad(made.sum(), tokens)[0]

    for found in on_threads(mesh_of((1, 2)), work):
        assert torch.allclose(found, torch.tensor(2.0), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["inter_first", "intra_first"])
def test_two_hops_send_what_crosses_along_each_axis(order: TransportKind) -> None:
    rows = rows_between()
    found = run_ranks(counted, mesh_of(GRID), GRID, order)
    for (rank, node, place), (there, back) in zip(places(), found, strict=True):
        for axis, (out, arriving) in hops(rows, node, place, order).items():
            for each in (there, back):
                check(each, axis, out, arriving)
        assert (there.count(), there.count(axis="ep"), back.count(axis="ep"), rank) == (6, 0, 0, rank)
        for each, exchanges in ((there, 3), (back, 2)):  # counts for experts, and rows each way
            messages = sum((call.group_size - 1) * count for call, count in each.calls)
            assert messages == exchanges * (GRID[0] + GRID[1] - 2)
