"""A key that the cluster cannot act on is refused where it was written, and only where it asks for something."""

from pathlib import Path

import pytest

from meshwright.launch.capabilities import check_capabilities
from meshwright.launch.errors import JobError
from meshwright.launch.load import LoadedJob, load_job

HEAD = "name: j\ncommand: [true]\n".replace("true", "'true'")


def load(folder: Path, text: str, *overrides: str) -> LoadedJob:
    path = folder / "job.yaml"
    path.write_text(HEAD + text)
    return load_job(path, overrides)


@pytest.mark.parametrize(
    ("text", "place", "key"),
    [
        ("binding: numa", "3:1", "binding"),
        ("health: {watch: {on_fault: restart}}", "3:18", "health.watch.on_fault"),
        ("failure:\n  exclude_bad_nodes: 2", "4:3", "failure.exclude_bad_nodes"),
        ("rendezvous: {bind: any}", "3:14", "rendezvous.bind"),
        ("resources: {gpus_per_node: 8}", "3:13", "resources.gpus_per_node"),
    ],
)
def test_what_local_cannot_do_is_refused_with_its_place(tmp_path: Path, text: str, place: str, key: str) -> None:
    with pytest.raises(JobError) as caught:
        check_capabilities(load(tmp_path, text))
    problem = caught.value.problems[0]
    assert problem.key.startswith(key.split(".", maxsplit=1)[0])
    assert problem.where.startswith(f"{tmp_path}/job.yaml:")
    assert problem.where.split(":")[-2] == place.split(":", maxsplit=1)[0]
    assert caught.value.exit_code == 65


@pytest.mark.parametrize(
    "text",
    [
        "",
        "binding: none",
        "after: [other, {run: third, when: any}]",
        "health: {preflight: []}",
        "logs: {merge: true}",
        "failure: {hang: {no_progress_for: 10m, action: warn}}",
        "failure: {backoff: {initial: 9s}, retry_on: [signal], no_retry_on: ['exit:3'], stop_after_no_progress: 2}",
        "failure: {exclude_bad_nodes: null, max_restarts: 3, shutdown_grace: 5s}",
        "nodes: 2\ncluster: {simulate_nodes: 3}\nfailure: {exclude_bad_nodes: 2}",
        "rendezvous: {backend: c10d, interface: auto, bind: interface, port: 29500}",
    ],
)
def test_a_key_that_asks_for_nothing_is_accepted(tmp_path: Path, text: str) -> None:
    check_capabilities(load(tmp_path, text))


def test_an_override_is_refused_as_one(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"--set binding=numa: binding: the local cluster does not act on binding yet"):
        check_capabilities(load(tmp_path, "", "binding=numa"))


RANGE = "nodes: {min: 2, max: 3}\nnproc_per_node: 1\n"


@pytest.mark.parametrize("hosts", [None, "+n0\n+n1\n"])
def test_an_elastic_job_on_mpi_names_its_hosts(tmp_path: Path, hosts: str | None) -> None:
    file = tmp_path / "hosts"
    file.write_text(hosts or "")
    cluster = "cluster: {type: mpi}\n" if hosts is None else f"cluster: {{type: mpi, hostfile: {file}}}\n"
    with pytest.raises(JobError, match=r"4:9: nodes.min: only mpiexec knows its hosts: name them in cluster.hostfile"):
        check_capabilities(load(tmp_path, cluster + RANGE))
    named = f"cluster: {{type: mpi, hostfile: {file}, exclude: [b]}}\n"
    file.write_text("a slots=2\nc slots=2\n")
    check_capabilities(load(tmp_path, named + RANGE))
    file.write_text("a slots=2\nb slots=2\n")
    with pytest.raises(JobError, match=r"nodes.min: nodes.min=2, but the cluster names 1 hosts that may be used; add"):
        check_capabilities(load(tmp_path, named + RANGE))


def test_an_elastic_job_on_ray_names_none(tmp_path: Path) -> None:
    check_capabilities(load(tmp_path, f"cluster: {{type: ray}}\n{RANGE}"))


def test_a_range_of_nodes_is_for_jobsets_and_refused_of_a_trainjob(tmp_path: Path) -> None:
    text = "nodes: {min: 1, max: 2}\nnproc_per_node: 1\ncluster: {type: kubernetes, image: i, kind: KIND}\n"
    check_capabilities(load(tmp_path, text.replace("KIND", "jobset")))
    with pytest.raises(JobError, match=r"nodes.min: a TrainJob ends only once all of its pods have.*kind: jobset"):
        check_capabilities(load(tmp_path, text.replace("KIND", "trainjob")))


def test_the_fewest_nodes_must_be_able_to_run_the_job(tmp_path: Path) -> None:
    text = "nodes: {min: 1, max: 2}\ncluster: {simulate_nodes: 2}\nparallel: {tp: 2}\n"
    with pytest.raises(JobError, match=r"job.yaml:3:9: nodes.min: 1 node cannot run this job: pp x cp x tp = 2 ranks"):
        check_capabilities(load(tmp_path, text))


def test_a_host_is_left_out_on_mpi_only_where_the_host_file_has_another(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a\nb\n")
    keys = f"cluster: {{type: mpi, hostfile: {tmp_path / 'hosts'}}}\nfailure: {{exclude_bad_nodes: 1}}\n"
    check_capabilities(load(tmp_path, keys + "nodes: 1\n"))
    with pytest.raises(JobError, match="no node is there to take a place"):
        check_capabilities(load(tmp_path, keys + "nodes: 2\n"))


@pytest.mark.parametrize("key", ["signal: TERM", "lead: 30s"])
def test_ranks_of_a_pod_that_has_to_go_are_warned_as_the_job_says(tmp_path: Path, key: str) -> None:
    check_capabilities(load(tmp_path, f"cluster: {{type: kubernetes, image: i}}\ncheckpoint: {{{key}}}\n"))


def test_nodes_are_examined_before_a_jobset_but_not_before_a_trainjob(tmp_path: Path) -> None:
    text = "health: {preflight: [gpu], on_fail: exclude_node}\ncluster: {type: kubernetes, image: i, kind: KIND}\n"
    check_capabilities(load(tmp_path, text.replace("KIND", "jobset")))
    with pytest.raises(JobError, match=r"health.preflight: a TrainJob takes its nodes from its runtime.*kind: jobset"):
        check_capabilities(load(tmp_path, text.replace("KIND", "trainjob")))
