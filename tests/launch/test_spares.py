"""A job without some of its nodes is the same job on others that it names, or a clear refusal."""

from pathlib import Path

import pytest

from meshwright.clusters.local import Machine, plan_local
from meshwright.launch.load import LoadedJob, load_job
from meshwright.launch.request import limits_of, request_of
from meshwright.launch.spares import SpareError, names_of, spares_of, without
from meshwright.launch.spec.local import LocalCluster

HEAD = "name: j\ncommand: [python, -c, pass]\nnodes: 2\nnproc_per_node: 1\n"
SSH = "cluster: {type: ssh, hosts: [{name: a}, {name: b}, {name: c}]}\n"
LOCAL = "cluster: {simulate_nodes: 4, exclude: [node1]}\n"


def job(folder: Path, cluster: str, more: str = "") -> LoadedJob:
    path = folder / "job.yaml"
    path.write_text(HEAD + cluster + more)
    return load_job(path)


@pytest.mark.parametrize(("cluster", "names"), [(SSH, ("a", "b", "c")), (LOCAL, ("node0", "node2", "node3"))])
def test_nodes_beyond_those_that_are_needed_are_spare(tmp_path: Path, cluster: str, names: tuple[str, ...]) -> None:
    loaded = job(tmp_path, cluster)
    assert names_of(loaded.job) == names
    assert spares_of(loaded.job) == names[2:]
    one = without(loaded, names[:1])
    assert names_of(one.job) == names[1:]
    assert spares_of(one.job) == ()
    assert one.job.model_copy(update={"cluster": None}) == loaded.job.model_copy(update={"cluster": None})
    with pytest.raises(SpareError, match=f"{names[1]} cannot be left out: the job wants 2 nodes, and 1 of the 2 hosts"):
        without(one, names[1:2])


def test_a_cluster_that_chooses_nodes_itself_names_no_spares(tmp_path: Path) -> None:
    loaded = job(tmp_path, "cluster: {type: slurm}\n")
    assert names_of(loaded.job) == spares_of(loaded.job) == ()
    with pytest.raises(SpareError, match=r"n1 cannot be left out: .* it names no other hosts"):
        without(loaded, ("n1",))
    assert without(loaded, ()) is loaded


def test_ray_finds_another_node_itself(tmp_path: Path) -> None:
    loaded = job(tmp_path, "cluster: {type: ray, exclude: [10.0.0.9]}\n", "failure: {exclude_bad_nodes: 2}\n")
    found = without(loaded, ("10.0.0.2-6f1c6f1c",))
    assert found.job.as_dict()["cluster"]["exclude"] == ["10.0.0.9", "10.0.0.2-6f1c6f1c"]
    assert limits_of(found).retry.exclude_after == 2


def test_a_host_file_names_hosts_of_which_some_may_be_spare(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("a slots=2\n# none\nb:2 # two\n\nc\nb slots=1\n")
    loaded = job(tmp_path, f"cluster: {{type: mpi, hostfile: {file}}}\n", "failure: {exclude_bad_nodes: 2}\n")
    assert (names_of(loaded.job), spares_of(loaded.job)) == (("a", "b", "c"), ("c",))
    one = without(loaded, ("a",))
    assert names_of(one.job) == ("b", "c")
    assert (limits_of(loaded).retry.exclude_after, limits_of(one).retry.exclude_after) == (2, None)
    with pytest.raises(SpareError, match="b cannot be left out: the job wants 2 nodes, and 1 of the 2 hosts it names"):
        without(one, ("b",))
    file.write_text("+n0\n+n1\n")
    assert names_of(loaded.job) == ()


def test_pretended_nodes_keep_their_names_when_one_is_left_out(tmp_path: Path) -> None:
    loaded = job(tmp_path, LOCAL)
    request = request_of(loaded, "r1", base=tmp_path)
    plan = plan_local(request, Machine("box", 2), names_of(loaded.job))
    assert [(node.name, node.index, node.ranks) for node in plan.nodes] == [("node0", 0, (0,)), ("node2", 1, (1,))]


@pytest.mark.parametrize("left_out", [("node2",), ("node0", "node1")])
def test_pretended_nodes_that_are_not_there_or_all_of_them_cannot_be_left_out(left_out: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="exclude"):
        LocalCluster(simulate_nodes=2, exclude=left_out)


def test_faults_are_only_counted_while_there_is_a_node_to_take_the_place(tmp_path: Path) -> None:
    loaded = job(tmp_path, SSH, "failure: {exclude_bad_nodes: 2}\n")
    assert limits_of(loaded).retry.exclude_after == 2
    assert limits_of(without(loaded, ("b",))).retry.exclude_after is None
    queued = job(tmp_path, "cluster: {type: slurm}\n", "failure: {exclude_bad_nodes: 2}\n")
    assert limits_of(queued).retry.exclude_after == 2
