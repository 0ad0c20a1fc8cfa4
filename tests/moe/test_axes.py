"""Axes of real ranks: who is on them, and what waiting on them is called."""

from typing import Any

import pytest
import torch

from meshwright.moe.axes import RowAxis, expert_axes
from meshwright.parallel.collectives import Groups
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.progress import told
from meshwright.testing import run_ranks


def exchanged(axis: RowAxis) -> list[int]:
    """Rank r sends r + to rows to each."""
    sizes = [axis.rank + to for to in range(axis.size)]
    rows = torch.tensor([100 * axis.rank + to for to, size in enumerate(sizes) for _ in range(size)])
    found: list[int] = axis.exchange(rows, sizes, sizes).tolist()
    return found


def met(mesh: Mesh) -> list[Any]:
    """What a rank gets on each axis, and what it says while it waits."""
    import torch.distributed as dist

    from meshwright.parallel.progress import HERE  # this process's own

    axes, said = expert_axes(Groups(mesh)), []
    real = dist.all_to_all_single

    def noted(*args: Any, **kwargs: Any) -> Any:
        said.append(told(HERE.at))
        return real(*args, **kwargs)

    dist.all_to_all_single = noted
    try:
        found = [exchanged(axis) for axis in (axes.ep, axes.node, axes.local)]
    finally:
        dist.all_to_all_single = real
    gathered = [axis.gather_each(torch.tensor([dist.get_rank()])).flatten().tolist() for axis in (axes.ep, axes.node)]
    return [found, gathered, [each.call for each in said], [each.waits_for for each in said]]


def rows(place: int, size: int) -> list[int]:
    return [100 * source + place for source in range(size) for _ in range(source + place)]


@pytest.mark.slow
def test_rows_reach_their_rank_and_waiting_has_a_name() -> None:
    mesh = Mesh(dp=4, ep=4, ep_node=2)
    for rank, (found, gathered, calls, waits) in enumerate(run_ranks(met, mesh, mesh)):
        assert found == [rows(rank, 4), rows(rank // 2, 2), rows(rank % 2, 2)]
        assert gathered == [[0, 1, 2, 3], [rank % 2, rank % 2 + 2]]
        assert calls == [f"an exchange over {name} (number 1)" for name in ("ep", "ep_node", "ep_local")]
        assert waits == [tuple(each for each in range(4) if each != rank), ((rank + 2) % 4,), (rank ^ 1,)]


def test_one_rank_exchanges_nothing() -> None:
    axes = expert_axes(Groups(Mesh()))
    assert (axes.ep.size, axes.num_nodes, axes.local.size, axes.inside.ep.size) == (1, 1, 1, 1)
    given = torch.ones(3, 2)
    assert axes.ep.exchange(given, [3], [3]) is given
    assert axes.ep.gather_each(given).shape == (1, 3, 2)
