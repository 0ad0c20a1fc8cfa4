"""Experts folded over ranks: every rank once in each group, and neighbours on one node."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as some

from meshwright.moe.errors import DispatchError
from meshwright.moe.folding import Fold, expert_groups, own_experts
from meshwright.parallel.mesh import Mesh

FOLDS: tuple[Fold, ...] = ("ep", "ep_node", "ep_local", "edp")


def test_a_mesh_by_hand() -> None:
    mesh = Mesh(pp=2, dp=2, tp=4, ep=4, ep_node=2)
    assert expert_groups(mesh, "ep") == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)]
    assert expert_groups(mesh, "ep_local") == [(rank, rank + 1) for rank in range(0, 16, 2)]
    assert expert_groups(mesh, "ep_node")[:4] == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert expert_groups(mesh, "edp") == [(first, first + 4) for first in (0, 1, 2, 3, 8, 9, 10, 11)]


@given(some.integers(1, 2), some.integers(1, 3), some.integers(1, 3), some.integers(1, 3))
def test_groups_part_the_ranks(pp: int, edp: int, nodes: int, local: int) -> None:
    mesh = Mesh(pp=pp, dp=edp * nodes, tp=local, ep=nodes * local, ep_node=nodes)
    sizes = {"ep": nodes * local, "ep_node": nodes, "ep_local": local, "edp": edp}
    for fold in FOLDS:
        groups = expert_groups(mesh, fold)
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.world_size))
        assert {len(group) for group in groups} == {sizes[fold]}
        stage = mesh.world_size // pp
        assert all(len({rank // stage for rank in group}) == 1 for group in groups)
    for group in expert_groups(mesh, "edp"):  # the same experts
        assert len({rank % mesh.ep for rank in group}) == 1


def test_experts_lie_in_order_and_evenly() -> None:
    assert [own_experts(6, ranks=3, rank=rank) for rank in range(3)] == [range(0, 2), range(2, 4), range(4, 6)]
    with pytest.raises(DispatchError, match=re.escape("6 experts do not lie evenly on ep=4 ranks; choose ep from: 1,")):
        own_experts(6, ranks=4, rank=0)
    with pytest.raises(DispatchError, match="experts are not folded over 'ep_locl'; did you mean 'ep_local'"):
        expert_groups(Mesh(), "ep_locl")  # type: ignore[arg-type]
