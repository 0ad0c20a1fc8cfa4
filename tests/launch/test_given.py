"""An elastic job starts on as many nodes as its cluster has, and on fewer where they are not all to be had."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from meshwright.clusters.base import StartPlan, StartRequest
from meshwright.clusters.contract import Cluster, Handle
from meshwright.clusters.errors import FewerNodesError, UnavailableError
from meshwright.launch.given import counted, started
from meshwright.launch.load import LoadedJob, load_job
from meshwright.launch.request import request_of
from meshwright.launch.sizes import sized
from meshwright.launch.supervise import Interrupts

JOB = "name: j\ncommand: [python, -c, pass]\nnproc_per_node: 2\nparallel: {tp: 4, dp: 2}\n"
RAY = "nodes: {min: 2, max: 4}\ncluster: {type: ray}\n"


class Knowing:
    """A cluster that has so many nodes, and gives so many.

    Args:
        has: nodes.
        gives: most that it gives.
    """

    def __init__(self, has: int, gives: int | None = None) -> None:
        self._has, self._gives, self.asked = has, has if gives is None else gives, list[int]()

    def count(self, request: StartRequest) -> int:
        assert request.ranks_per_node == 2
        return self._has

    def start(self, plan: int, secrets: Mapping[str, str]) -> Handle:
        assert secrets == {"TOKEN": "hunter22"}
        self.asked.append(plan)
        if plan > self._gives:
            raise FewerNodesError(f"Ray did not place {plan} nodes", plan - 1)
        return cast(Handle, "handle")


def job(folder: Path, more: str) -> LoadedJob:
    path = folder / "job.yaml"
    path.write_text(JOB + more)
    return load_job(path)


def ask(cluster: Knowing, loaded: LoadedJob, folder: Path) -> LoadedJob:
    return counted(cast(Any, cluster), loaded, request_of(loaded, "r1", base=folder))


def start(cluster: Knowing, loaded: LoadedJob, folder: Path) -> tuple[LoadedJob, list[int]]:
    written: list[int] = []

    def planned(each: LoadedJob) -> StartPlan:
        return cast(StartPlan, sized(each).job.num_nodes)

    def write(each: LoadedJob, plan: StartPlan) -> None:
        assert sized(each).job.num_nodes == cast(int, plan)
        written.append(cast(int, plan))

    loaded = ask(cluster, loaded, folder)
    secrets = {"TOKEN": "hunter22"}
    found, plan, handle = started(
        cast(Cluster, cluster), loaded, planned, secrets=secrets, write=write, interrupts=Interrupts()
    )
    assert (plan, handle) == (written[-1], "handle")
    assert written == cluster.asked, "what ranks read is there before they start"
    return found, written


@pytest.mark.parametrize(("has", "nodes"), [(9, 4), (4, 4), (3, 2), (2, 2), (1, 2), (0, 2)])
def test_there_are_as_many_as_the_cluster_says_and_never_fewer_than_the_job_runs_on(
    tmp_path: Path, has: int, nodes: int
) -> None:
    found = ask(Knowing(has), job(tmp_path, RAY), tmp_path)
    assert sized(found).job.num_nodes == nodes, "of 3 nodes 2 are used: a tensor group has two"


def test_a_number_of_nodes_that_is_fixed_or_follows_from_names_is_not_asked(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a\nb\nc\nd\n")
    for text in (
        "nodes: 4\ncluster: {type: ray}\n",
        f"nodes: {{min: 2, max: 4}}\ncluster: {{type: mpi, hostfile: {tmp_path}/hosts}}\n",
    ):
        loaded = job(tmp_path, text)
        assert ask(Knowing(2), loaded, tmp_path) is loaded


def test_fewer_are_tried_down_to_the_fewest_which_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = job(tmp_path, RAY)
    assert start(Knowing(4), loaded, tmp_path)[1] == [4]
    assert capsys.readouterr().err == ""
    found, tried = start(Knowing(4, gives=2), loaded, tmp_path)
    assert (tried, sized(found).job.num_nodes) == ([4, 2], 2)
    said = capsys.readouterr().err
    assert said == (
        "meshwright: Ray did not place 4 nodes; 2 of at most 4 nodes are tried (tp=4, num_microbatches=2)\n"
    )
    with pytest.raises(UnavailableError, match="Ray did not place 2 nodes"):
        start(Knowing(4, gives=1), loaded, tmp_path)


def test_a_number_that_is_fixed_is_not_made_smaller(tmp_path: Path) -> None:
    cluster = Knowing(4, gives=2)
    with pytest.raises(UnavailableError, match="Ray did not place 4 nodes"):
        start(cluster, job(tmp_path, "nodes: 4\ncluster: {type: ray}\n"), tmp_path)
    assert cluster.asked == [4]


def test_after_an_interrupt_no_further_number_of_nodes_is_tried(tmp_path: Path) -> None:
    interrupts = Interrupts()

    class Interrupted(Knowing):
        def start(self, plan: int, secrets: Mapping[str, str]) -> Handle:
            interrupts.numbers.append(2)
            return super().start(plan, secrets)

    cluster, loaded = Interrupted(4, 1), job(tmp_path, RAY)
    with pytest.raises(FewerNodesError):
        started(
            cast(Cluster, cluster),
            ask(cluster, loaded, tmp_path),
            lambda each: cast(StartPlan, sized(each).job.num_nodes),
            secrets={"TOKEN": "hunter22"},
            write=lambda *_: None,
            interrupts=interrupts,
        )
    assert cluster.asked == [4]
