"""Experts folded over ranks: every rank once in each group, and neighbours on one node."""

import pytest
from hypothesis import given
from hypothesis import strategies as some

from meshwright.parallel.errors import MeshError
from meshwright.parallel.folding import FOLDS, fold_groups
from meshwright.parallel.mesh import Mesh


def test_a_mesh_by_hand() -> None:
    mesh = Mesh(pp=2, dp=2, tp=4, ep=4, ep_node=2)
    assert fold_groups(mesh, "ep") == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)]
    assert fold_groups(mesh, "ep_local") == [(rank, rank + 1) for rank in range(0, 16, 2)]
    assert fold_groups(mesh, "ep_node")[:4] == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert fold_groups(mesh, "edp") == [(first, first + 4) for first in (0, 1, 2, 3, 8, 9, 10, 11)]


@given(some.integers(1, 2), some.integers(1, 3), some.integers(1, 3), some.integers(1, 3))
def test_groups_part_the_ranks(pp: int, edp: int, nodes: int, local: int) -> None:
    mesh = Mesh(pp=pp, dp=edp * nodes, tp=local, ep=nodes * local, ep_node=nodes)
    sizes = {"ep": nodes * local, "ep_node": nodes, "ep_local": local, "edp": edp}
    for fold in FOLDS:
        groups = fold_groups(mesh, fold)
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.world_size))
        assert {len(group) for group in groups} == {sizes[fold]}
        stage = mesh.world_size // pp
        assert all(len({rank // stage for rank in group}) == 1 for group in groups)
    for group in fold_groups(mesh, "edp"):  # the same experts
        assert len({rank % mesh.ep for rank in group}) == 1


def test_other_names_are_refused() -> None:
    with pytest.raises(MeshError, match="experts are not folded over 'ep_locl'; did you mean 'ep_local'"):
        fold_groups(Mesh(), "ep_locl")  # type: ignore[arg-type]
