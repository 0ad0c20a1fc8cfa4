import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.parallel.errors import MeshError
from meshwright.parallel.mesh import AXES, Mesh

meshes = st.builds(Mesh, **{axis: st.integers(1, 3) for axis in AXES})


@given(meshes)
def test_rank_and_coordinates_are_inverse(mesh: Mesh) -> None:
    assert [mesh.rank(mesh.coordinates(rank)) for rank in range(mesh.world_size)] == list(range(mesh.world_size))


@given(meshes, st.sets(st.sampled_from(AXES)))
def test_groups_part_the_ranks_and_contain_their_members(mesh: Mesh, axes: set[str]) -> None:
    groups = mesh.groups(axes)
    assert sorted(rank for group in groups for rank in group) == list(range(mesh.world_size))
    assert all(mesh.group(rank, axes) == group for group in groups for rank in group)


@given(meshes)
def test_data_rank_counts_shares_without_gaps(mesh: Mesh) -> None:
    shares = {mesh.data_rank(rank) for rank in range(mesh.world_size)}
    assert shares == set(range(mesh.data_degree))


def test_tp_ranks_are_neighbours_and_pp_ranks_are_far() -> None:
    mesh = Mesh(pp=2, dp=2, tp=2)
    assert mesh.group(0, "tp") == (0, 1)
    assert mesh.group(0, "pp") == (0, 4)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Mesh(dp=0), "mesh axis dp=0: a degree is an integer of at least 1"),
        (lambda: Mesh(dp=True), "mesh axis dp=True"),
        (lambda: Mesh(dp=2, ep=3), "ep=3 does not divide the 2 ranks of one stage"),
        (lambda: Mesh(dp=4, ep=4, ep_node=3), "ep_node=3 does not divide ep=4"),
        (lambda: Mesh.of({"fdsp": 2}), "did you mean 'fsdp'?"),
        (lambda: Mesh(dp=2).coordinates(2), "rank 2 lies outside this mesh of 2 ranks (dp=2)"),
        (lambda: Mesh(dp=2).rank({"dp": 2}), "coordinate dp=2 lies outside axis dp=2"),
        (lambda: Mesh(dp=2).groups("ep"), "mesh axis 'ep' owns no ranks"),
        (lambda: Mesh().degree("xx"), "mesh axis 'xx' does not exist"),
    ],
)
def test_wrong_meshes_are_refused_with_values(make, text: str) -> None:
    with pytest.raises(MeshError) as caught:
        make()
    assert text in str(caught.value)


def test_ep_folds_over_a_stage_without_owning_ranks() -> None:
    mesh = Mesh(pp=2, dp=2, tp=2, ep=4, ep_node=2)
    assert (mesh.world_size, mesh.ep_local) == (8, 2)
