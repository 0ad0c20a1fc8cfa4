"""Elastic runs in pods from the launch to the end: on those that are there, and on more after a restart."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from meshwright.clusters.sweep import carriers
from tests.launch.own import own
from tests.launch.pods import PROD, clusters_at, pod_job
from tests.launch.test_jobsets import STEPS, losses_of, status_of, training
from tests.launch.typed import begin, meshwright
from tests.launch.waiting import eventually, kill_all
from tests.launch.worker.runs import run_dir, train_here, write_job

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_state")]

WAITS = "this pod has no ranks"


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the namespace in which jobs run."""
    found = clusters_at(tmp_path, monkeypatch) / PROD / "train"
    found.mkdir(exist_ok=True)
    return found


def elastic(path: Path, fewest: int, **keys: dict[str, object]) -> Path:
    """A job on at most three nodes."""
    told = yaml.safe_load(path.read_text())
    told["nodes"] = {"min": fewest, "max": 3}
    for key, value in keys.items():
        told[key] = {**told.get(key, {}), **value}
    path.write_text(yaml.safe_dump(told))
    return path


def alike(path: Path) -> Path:
    """A training of which each of three ranks has as much, without masks, which depend on the mesh."""
    told = yaml.safe_load(path.read_text())
    told["train"]["batch_size"] = 6
    told["model"]["arguments"]["dropout"] = 0.0
    path.write_text(yaml.safe_dump(told))
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the training without a launch, before a test changes PATH, with which ranks would be started anew."""
    job = alike(write_job(tmp_path_factory.mktemp("alone"), steps=STEPS, every=50))
    train_here(job, "alone-elastic")
    found = losses_of(run_dir(job, "alone-elastic") / "metrics.jsonl")
    assert len(found) == STEPS
    return found


def logged(train: Path, index: int) -> str:
    """What pods of an index have printed since the last start of all."""
    return "".join(path.read_text() for path in train.glob(f"*-node-0-{index}-?????.log"))


def mesh_of(folder: Path) -> dict[str, Any]:
    """What a run's directory says of its size."""
    job, plan = (json.loads((folder / name).read_text()) for name in ("job.json", "plan.json"))
    return {"nodes": job["nodes"], "dp": job["parallel"]["dp"], "names": [node["name"] for node in plan["nodes"]]}


def test_a_training_begins_on_the_pods_that_came_and_goes_on_with_more_of_the_same_losses(
    tmp_path: Path, train: Path, alone: dict[int, float]
) -> None:
    run_id = own("k8s-elastic")
    (train / "nodes").write_text("gpu0 gpu1")
    keys = {"parallel": {"dp": 3}, "rendezvous": {"join_timeout": "45s"}}
    path = alike(elastic(training(tmp_path), 1, **keys))
    here = tmp_path / "runs/j" / run_id
    names = [f"j-{run_id}-node-0-{index}" for index in range(3)]
    try:
        watching = begin(tmp_path, "launch", str(path), "--run-id", run_id)
        assert eventually(lambda: len(list(tmp_path.glob("at-*"))) == 2, 240), watching.poll()
        assert eventually(lambda: mesh_of(here) == {"nodes": 2, "dp": 2, "names": names[:2]}, 60)
        (train / "nodes").write_text("gpu0 gpu1 gpu2")
        assert eventually(lambda: WAITS in logged(train, 2), 120), "the third comes late"
        (train / "lose-1").touch()
        out, err = watching.communicate(timeout=400)
    finally:
        kill_all(carriers(run_id))
    assert watching.returncode == 0, out + err
    assert status_of(train, run_id)["restarts"] == 1
    assert mesh_of(here) == {"nodes": 3, "dp": 3, "names": names}
    assert not (tmp_path / "at-2").exists()
    assert "2 of 3 pods came; ranks run on 2 nodes" in out
    assert "3 of 3 pods came; ranks run on 3 nodes" in out
    (metrics,) = (train / "claim-runs").glob("runs/j/*/metrics.jsonl")
    assert losses_of(metrics) == pytest.approx(alone, rel=1e-5)


WHERE = """
import os
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], "on", os.environ["MESHWRIGHT_HOST"])
"""


def test_a_run_ends_though_a_pod_is_pending_and_another_is_not_the_second(tmp_path: Path, train: Path) -> None:
    run_id = own("k8s-pending")
    (train / "nodes").write_text("gpu0 gpu1")
    (train / "hold-1").touch()
    path = elastic(pod_job(tmp_path, WHERE), 2, rendezvous={"join_timeout": "20s"})
    try:
        done = meshwright(tmp_path, "launch", str(path), "--run-id", run_id)
    finally:
        kill_all(carriers(run_id))
    assert done.returncode == 0, done.stdout + done.stderr
    merged = (tmp_path / "runs/j" / run_id / "merged.log").read_text().splitlines()
    assert sorted(line.partition(" | ")[2] for line in merged) == [
        f"rank 0 of 2 on j-{run_id}-node-0-0",
        f"rank 1 of 2 on j-{run_id}-node-0-2",
    ]
    record = json.loads((tmp_path / "runs/j" / run_id / "exit.json").read_text())
    assert (record["state"], record["exit_code"]) == ("succeeded", 0)


def test_too_few_pods_end_the_run_and_say_how_many_came(tmp_path: Path, train: Path) -> None:
    run_id = own("k8s-few")
    (train / "nodes").write_text("gpu0")
    path = elastic(pod_job(tmp_path, WHERE), 2, rendezvous={"join_timeout": "3s"}, failure={"max_restarts": 3})
    try:
        done = meshwright(tmp_path, "launch", str(path), "--run-id", run_id)
    finally:
        kill_all(carriers(run_id))
    assert done.returncode == 76, done.stdout + done.stderr
    record = json.loads((tmp_path / "runs/j" / run_id / "exit.json").read_text())
    assert "1 of 3 pods came within 3 s (rendezvous.join_timeout); the job runs on no fewer than 2" in record["reason"]
    assert status_of(train, run_id)["restarts"] == 0
