"""Every router by every transport: the numbers of one process, and two hops the bits of one."""

from typing import get_args

import pytest
import torch

from meshwright.moe.axes import ExpertAxes, expert_axes
from meshwright.moe.errors import DispatchError
from meshwright.moe.transports import TransportKind, transport
from meshwright.parallel.collectives import Groups
from meshwright.parallel.mesh import Mesh
from meshwright.testing import run_ranks
from tests.moe.real import CASES, Found, carried, carried_by_all, expected, mesh_of
from tests.moe.simulated import GRIDS
from tests.moe.threads import on_threads
from tests.parallel.cells import tiered

KINDS: tuple[TransportKind, ...] = get_args(TransportKind)


def check(found: list[list[dict[str, Found]]], grid: tuple[int, int]) -> None:
    """Compares what ranks found in each case with one process, and two hops with one."""
    for number, case in enumerate(CASES):
        for rank, wanted in enumerate(expected(case, grid)):
            here = found[rank][number]
            assert len(here) == 2 * len(KINDS)
            for kind, results in here.items():
                for one, other in zip(results, wanted, strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, msg=f"{case} {kind} rank {rank}")
            for kind in ("inter_first", "intra_first"):
                assert all(torch.equal(*pair) for pair in zip(here["one_hop"], here[kind], strict=True)), (case, rank)


@pytest.mark.parametrize("grid", [(1, 1), *GRIDS])
def test_all_transports_give_the_numbers_of_one_process_on_threads(grid: tuple[int, int]) -> None:
    def work(rank: int, axes: ExpertAxes) -> list[dict[str, Found]]:
        return [carried_by_all(case, grid, rank, axes, KINDS) for case in CASES]

    check(on_threads(mesh_of(grid), work), grid)


@pytest.mark.slow
@pytest.mark.parametrize("grid", tiered((grid,) for grid in GRIDS))
def test_all_transports_give_the_numbers_of_one_process_on_ranks(grid: tuple[int, int]) -> None:
    check(run_ranks(carried, mesh_of(grid), grid, KINDS), grid)


def test_an_unknown_transport_is_refused() -> None:
    with pytest.raises(DispatchError, match="no transport is called 'one_hops'; did you mean 'one_hop'"):
        transport("one_hops", expert_axes(Groups(Mesh())))  # type: ignore[arg-type]
