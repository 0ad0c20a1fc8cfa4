"""Runs in pods from the launch to the end, with the controllers of Job and JobSet pretended as they are documented."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from meshwright.launch.cli import main
from meshwright.launch.doctor import DoctorOptions
from tests.launch.own import own
from tests.launch.pods import PROD, clusters_at, pod_job
from tests.launch.typed import meshwright

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_state")]

WHERE = "import os; print('on', os.environ['MESHWRIGHT_NODE'])"


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the namespace in which jobs run."""
    return clusters_at(tmp_path, monkeypatch) / PROD / "train"


def objects(train: Path, kind: str) -> list[dict[str, Any]]:
    """Objects of a kind that are there."""
    return [json.loads(path.read_text()) for path in sorted(train.glob(f"{kind}-*"))]


def nodes_of(train: Path) -> set[str]:
    """Nodes that the pods of the last start are, or were, on."""
    return {json.loads(path.read_text())["spec"]["nodeName"] for path in train.glob("*.pod")}


def examined(folder: Path, on_fail: str) -> Path:
    return pod_job(folder, WHERE, health={"preflight": ["ssh"], "on_fail": on_fail})


def test_a_sick_node_ends_the_launch_and_nothing_is_submitted(tmp_path: Path, train: Path) -> None:
    (train.parents[2] / "deaf-gpu1").touch()
    done = meshwright(tmp_path, "launch", str(examined(tmp_path, "abort")))
    assert (done.returncode, "gpu1 not fit" in done.stderr) == (78, True), done.stderr
    assert [path for kind in ("jobset", "configmap", "secret", "job") for path in train.glob(f"{kind}-*")] == []


def test_a_run_is_kept_from_sick_nodes_and_its_first_pods_come_to_those_that_were_examined(
    tmp_path: Path, train: Path
) -> None:
    (train.parents[2] / "deaf-gpu1").touch()
    train.mkdir(exist_ok=True)
    (train / "nodes").write_text("gpu0 gpu1 gpu2 gpu3")
    done = meshwright(tmp_path, "launch", str(examined(tmp_path, "exclude_node")), "--run-id", own("k8s-fit"))
    assert done.returncode == 0, done.stderr
    assert "left out: gpu1" in done.stderr
    assert nodes_of(train) == {"gpu0", "gpu2"}
    assert objects(train, "job") == []
    (jobset,) = objects(train, "jobset")
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert set(pod["affinity"]["nodeAffinity"]) == {
        "requiredDuringSchedulingIgnoredDuringExecution",
        "preferredDuringSchedulingIgnoredDuringExecution",
    }


@pytest.mark.parametrize("trouble", ["no nodes", "no answer"])
def test_nodes_that_cannot_be_examined_end_the_launch_and_nothing_stays(
    tmp_path: Path,
    train: Path,
    trouble: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("meshwright.launch.preflight.DoctorOptions", partial(DoctorOptions, wait_s=0.5))
    monkeypatch.chdir(tmp_path)
    train.mkdir(exist_ok=True)
    if trouble == "no nodes":
        (train.parents[2] / "deaf-gpu1").touch()
        (train / "nodes").write_text("gpu0 gpu1")
    else:
        (train.parents[2] / "create-fails").write_text("error: the server is gone")
    assert main(["launch", str(examined(tmp_path, "exclude_node"))]) == 69
    said = capsys.readouterr().err
    assert ("0/2 nodes are available" if trouble == "no nodes" else "the server is gone") in said
    assert [path for kind in ("jobset", "configmap", "secret", "job") for path in train.glob(f"{kind}-*")] == []
