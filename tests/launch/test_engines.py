"""Jobs for Kubernetes, MPI and Ray: from the file to the plan."""

import json
from pathlib import Path

import pytest
import yaml

from meshwright.launch.cli import main
from meshwright.launch.load import load_job
from meshwright.launch.registry import cluster_of

JOB = "name: j\ncommand: [python, train.py]\nnproc_per_node: 2\nnodes: 2\n"


def _dry(folder: Path, text: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    (folder / "job.yaml").write_text(JOB + text)
    code = main(["launch", str(folder / "job.yaml"), "--dry-run", "--run-id", "r1", "--json"])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_a_job_for_kubernetes_becomes_a_manifest_without_a_cluster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        "resources: {gpus_per_node: 2, memory_per_node: 8GiB, cpus_per_rank: 3}\n"
        "cluster: {type: kubernetes, image: x, namespace: train, context: prod, workdir: /app}\n"
    )
    code, out, _ = _dry(tmp_path, text, capsys)
    assert code == 0
    submission = json.loads(out)["submission"]
    assert submission["argv"] == ["kubectl", "--context", "prod", "--namespace", "train", "create", "-f", "-"]
    config, jobset = yaml.safe_load_all(submission["script"])
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    asked = {"cpu": "6", "memory": str(8 << 30), "nvidia.com/gpu": "2"}
    assert pod["containers"][0]["resources"] == {"limits": asked, "requests": asked}
    inside = json.loads(json.loads(config["data"]["files"])["job.json"])
    assert inside["logs"]["dir"] == json.loads(config["data"]["plan"])["run_dir"] == "/meshwright/runs/j/r1"
    assert inside["checkpoint"]["dir"] == "/meshwright/runs/j/checkpoints"


def test_a_job_for_ray_says_what_it_asks_of_each_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _dry(tmp_path, "cluster: {type: ray, cpus_per_node: 4, gpus_per_node: 2}\n", capsys)
    assert code == 0
    assert json.loads(out)["variant"] == "at auto, 2 x {CPU: 4, GPU: 2}, STRICT_SPREAD"


def test_a_job_for_an_mpi_that_is_not_here_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = _dry(tmp_path, "cluster: {type: mpi, mpiexec: mpiexec-of-nobody}\n", capsys)
    assert (code, error.count("\n")) == (69, 1)
    assert "there is no 'mpiexec-of-nobody' here" in error


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("cluster: {type: mpi}\nresources: {gpus_per_node: 2}\n", "resources.gpus_per_node"),
        ("cluster: {type: ray}\nresources: {gpu_type: H100}\n", "resources.gpu_type"),
        ("cluster: {type: kubernetes, image: x}\nrendezvous: {interface: eth0}\n", "rendezvous.interface"),
    ],
)
def test_what_a_cluster_does_not_act_on_is_refused_where_it_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, key: str
) -> None:
    code, _, error = _dry(tmp_path, text, capsys)
    assert code == 65
    assert f"{key}: the " in error


def test_nodes_follow_the_cluster_unless_the_job_says_them(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("name: j\ncommand: [x]\ncluster: {type: ray, nodes: 3}\n")
    loaded = load_job(tmp_path / "job.yaml")
    assert loaded.job.num_nodes == 3
    assert type(cluster_of(loaded)).__name__ == "RayCluster"
