"""An elastic job is the same training on any number of nodes that it can have: same samples, same losses."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.clusters.mpi import MpiOptions, plan_mpi
from meshwright.clusters.sweep import carriers
from meshwright.launch.load import LoadedJob, load_job
from meshwright.launch.request import request_of, resolved_job
from meshwright.launch.sizes import SizeError, check_sizes, data_axes, differing, on_nodes, size_lines, size_of, sized
from meshwright.launch.spares import SpareError, can_shrink, without
from tests.launch.own import own
from tests.launch.test_relaunch import agents
from tests.launch.waiting import eventually
from tests.launch.worker.runs import finish, losses, run_dir, start, write_job

DEEP = "{dp: 2, fsdp: 2, pp: 2, schedule: 1f1b, num_microbatches: 4}"
MODEL = """
name: j
model: {architecture: llama, config: {}}
data: {files: [a.txt], sequence_length: 32}
train: {steps: 4, batch_size: 64}
"""
FOUR = "nodes: {min: 1, max: 4}\ncluster: {simulate_nodes: 4}\n"


def job(folder: Path, parallel: str, more: str = FOUR, *overrides: str) -> LoadedJob:
    path = folder / "job.yaml"
    path.write_text(f"{MODEL}parallel: {parallel}\n{more}")
    return load_job(path, overrides)


def test_what_differs_of_a_smaller_job_makes_it_from_the_largest(tmp_path: Path) -> None:
    pods = "cluster: {type: kubernetes, image: i}\nnproc_per_node: 2\n"
    assert differing(job(tmp_path, "{dp: 2, fsdp: 2, tp: 2}", f"nodes: {{min: 1, max: 4}}\n{pods}").job) == {
        "1": {"nodes": 1, "parallel": {"dp": 1, "fsdp": 1, "num_microbatches": 4}},
        "2": {"nodes": 2, "parallel": {"dp": 1, "num_microbatches": 2}},
        "3": {"nodes": 3, "parallel": {"dp": 1, "fsdp": 3, "num_microbatches": 2}},
        "4": {},
    }
    odd = differing(job(tmp_path, "{dp: 2, tp: 4}", f"nodes: {{min: 2, max: 4}}\n{pods}").job)
    assert list(odd) == ["2", "4"]
    assert differing(job(tmp_path, "{dp: 8}", f"nodes: 4\n{pods}").job) == {}


@pytest.mark.parametrize(
    ("degree", "fsdp", "axes"),
    [(4, 2, (2, 2)), (2, 2, (1, 2)), (3, 2, (1, 3)), (3, 4, (1, 3)), (6, 4, (1, 6)), (9, 4, (1, 9)), (12, 4, (3, 4))],
)
def test_dp_gives_way_first_and_no_rank_keeps_more_than_was_planned(
    degree: int, fsdp: int, axes: tuple[int, int]
) -> None:
    assert data_axes(degree, fsdp) == axes


@pytest.mark.parametrize(
    ("parallel", "nodes", "changed"),
    [
        ("{dp: 4}", 3, {"dp": 3, "fsdp": 1, "num_microbatches": 2}),
        ("{dp: 4, num_microbatches: 3}", 3, {"dp": 3, "fsdp": 1, "num_microbatches": 4}),
        ("{fsdp: 4, zero_stage: 3}", 1, {"dp": 1, "fsdp": 1, "num_microbatches": 4}),
        ("{dp: 4, fsdp: 4, tp: 2}", 2, {"dp": 2, "fsdp": 4, "num_microbatches": 2}),
        (
            DEEP,
            3,
            {"dp": 1, "fsdp": 3, "num_microbatches": 6},
        ),
        ("{dp: 4, pp: 2, schedule: 1f1b, num_microbatches: 2}", 3, {"dp": 3, "num_microbatches": 4}),
        ("{dp: 4}", 4, {"dp": 4, "fsdp": 1, "num_microbatches": 1}),
    ],
)
def test_only_the_data_axes_and_micro_batches_follow_the_number_of_nodes(
    tmp_path: Path, parallel: str, nodes: int, changed: dict[str, int]
) -> None:
    asked = job(tmp_path, parallel).job
    found = on_nodes(asked, nodes)
    assert found.num_nodes == nodes
    assert {key: getattr(found.parallel, key) for key in changed} == changed
    same = {"nodes", "parallel"}
    assert found.model_dump(exclude=same) == asked.model_dump(exclude=same)
    assert found.parallel.model_copy(update={key: getattr(asked.parallel, key) for key in changed}) == asked.parallel
    each = -(-asked.train.batch_size // (asked.mesh.data_degree * asked.parallel.num_microbatches))  # type: ignore[union-attr]
    assert asked.train is not None
    assert found.mesh.data_degree * found.parallel.num_microbatches * each >= asked.train.batch_size


def test_a_number_that_does_not_fit_is_passed_over_and_the_key_in_its_way_is_named(tmp_path: Path) -> None:
    whole = job(tmp_path, "{tp: 2, dp: 2}")
    with pytest.raises(SizeError, match=r"3 nodes cannot run this job: pp x cp x tp = 2 ranks belong together"):
        on_nodes(whole.job, 3)
    assert size_of(whole.job, 3).num_nodes == 2
    assert [line.split(":")[0] for line in size_lines(whole)[1:]] == ["4", "3", "2", "1"]
    assert check_sizes(whole) is not None, "one node has half a tensor group"
    small = job(tmp_path, "{dp: 4}", FOUR, "train.batch_size=4")
    with pytest.raises(SizeError, match=r"3 nodes .*: train.batch_size: batch_size=4 gives some rank an empty"):
        on_nodes(small.job, 3)
    assert size_of(small.job, 3).parallel.dp == 2


def test_a_job_starts_on_as_many_nodes_as_there_are(tmp_path: Path) -> None:
    loaded = job(tmp_path, "{dp: 4}", "nodes: {min: 2, max: 4}\ncluster: {simulate_nodes: 3}\n")
    request = request_of(loaded, "r1", base=tmp_path)
    assert (request.num_nodes, request.num_ranks, request.limits.fewest_nodes) == (3, 3, 2)
    resolved = resolved_job(loaded, "r1", tmp_path)
    assert (resolved["nodes"], resolved["parallel"]["dp"]) == (3, 3)  # type: ignore[index]
    assert request.limits.sizes[0] == "2 to 4, as many as there are when ranks start"
    assert request.limits.sizes[3] == "2: dp=2, num_microbatches=2"


def test_hosts_of_a_host_file_that_are_fewer_than_the_most_make_the_mesh_of_as_many(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("a slots=2\nb slots=2\nc slots=2\n")
    cluster = f"cluster: {{type: mpi, hostfile: {file}}}"
    loaded = job(tmp_path, "{dp: 8}", f"nodes: {{min: 2, max: 4}}\nnproc_per_node: 2\n{cluster}\n")
    request = request_of(loaded, "r1", base=tmp_path)
    plan = plan_mpi(request, MpiOptions("mpich", hostfile=str(file), hosts=loaded.job.cluster.names))
    assert [(node.name, node.ranks) for node in plan.nodes] == [("a", (0, 1)), ("b", (2, 3)), ("c", (4, 5))]
    assert plan.nodes[0].agent[:3] == ("mpiexec", "-n", "6")
    two = without(loaded, ("b",))
    assert (sized(two).job.num_nodes, sized(two).job.parallel.dp, sized(two).job.parallel.num_microbatches) == (2, 4, 2)
    with pytest.raises(SpareError, match="c cannot be left out: the job wants at least 2 nodes, and 1 of the 2 hosts"):
        without(two, ("c",))


@pytest.mark.parametrize(("have", "nodes"), [(None, 4), (9, 4), (3, 2), (2, 2)])
def test_where_the_cluster_knows_its_nodes_the_job_is_on_as_many_as_it_said(
    tmp_path: Path, have: int | None, nodes: int
) -> None:
    loaded = replace(job(tmp_path, "{tp: 2, dp: 2}", "nodes: {min: 2, max: 4}\ncluster: {type: ray}\n"), have=have)
    assert sized(loaded).job.num_nodes == nodes, "half a tensor group is no use"
    assert resolved_job(loaded, "r1", tmp_path)["nodes"] == nodes


def test_nodes_can_be_left_out_down_to_the_fewest(tmp_path: Path) -> None:
    loaded = job(tmp_path, "{dp: 4}", "nodes: {min: 3, max: 4}\ncluster: {simulate_nodes: 4}\n")
    assert can_shrink(loaded.job)
    three = without(loaded, ("node1",))
    assert (sized(three).job.num_nodes, can_shrink(three.job)) == (3, False)
    with pytest.raises(SpareError, match="node0 cannot be left out: the job wants at least 3 nodes, and 2 of the 3"):
        without(three, ("node0",))


def test_a_program_of_the_user_only_has_fewer_ranks(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: j\ncommand: [python, -c, pass]\nnodes: {min: 1, max: 2}\nnproc_per_node: 4\n")
    assert request_of(load_job(path), "r1", base=tmp_path).num_ranks == 4
    assert size_lines(load_job(path))[1:] == (
        "2: not used: 2 nodes cannot run this job: nodes: nodes=2, but the local cluster has 1 pretended node; "
        "set cluster.simulate_nodes: 2",
        "1: 4 ranks",
    )


@pytest.mark.slow
@pytest.mark.wide
def test_a_training_that_lost_a_node_for_good_goes_on_with_fewer_and_has_the_same_losses(tmp_path: Path) -> None:
    def three(folder: Path) -> Path:
        path = write_job(folder, parallel="{dp: 3}", steps=30)
        text = path.read_text().replace("width: 16", "width: 16, dropout: 0.0")
        path.write_text(f"{text}nodes: {{min: 2, max: 3}}\nnproc_per_node: 1\ncluster: {{simulate_nodes: 3}}\n")
        return path

    sets = ("failure.max_restarts=2", "failure.backoff.initial=100ms", "train.precision=float64")
    calm, run_id = three(tmp_path / "calm"), f"shrink-{os.getpid()}"
    code, output = finish(calm, "r1", *sets)
    assert code == 0, output
    lost = three(tmp_path / "lost")
    launcher, saved = start(lost, run_id, *sets), lost.parent / "checkpoints"
    try:
        assert eventually(lambda: any(saved.glob("step-*")))
        os.kill(agents(launcher)[1], signal.SIGKILL)
        output, _ = launcher.communicate(timeout=240)
    finally:
        launcher.kill()
    assert launcher.returncode == 0, output
    assert not list(carriers(own(run_id)))
    undisturbed, found = losses(calm, "r1"), losses(lost, run_id)
    assert [step for step, _ in found] == list(range(1, 31)), "every step once"
    assert all(abs(one - other) < 1e-6 for (_, one), (_, other) in zip(found, undisturbed, strict=True))
    folder = run_dir(lost, run_id)
    told, now = (json.loads((folder / name).read_text()) for name in ("exit.json", "job.json"))
    assert [(each["node"], each["lost"]) for each in told["excluded"]] == [("node1", True)]
    assert [each["nodes"] for each in told["restarts"]] == [[3, 2]]
    assert (now["nodes"], now["parallel"]["dp"], now["parallel"]["num_microbatches"]) == (2, 2, 2)
    assert "it shrinks from 3 nodes to 2, without node1 (dp=2, num_microbatches=2)" in output
    assert "started again on 2 nodes instead of 3" in output
    assert "resumed from " in (folder / "logs/rank-0.attempt-1.log").read_text()
