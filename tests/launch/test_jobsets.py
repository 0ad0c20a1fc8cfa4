"""Runs in pods from the launch to the end, with the controllers of Job and JobSet pretended as they are documented."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from meshwright.clusters.sweep import carriers
from meshwright.launch.cli import main
from meshwright.launch.doctor import DoctorOptions
from tests.launch.own import own
from tests.launch.pods import PROD, clusters_at, pod_job
from tests.launch.typed import begin, meshwright
from tests.launch.waiting import eventually, kill_all
from tests.launch.worker.runs import MODEL, run_dir, train_here, write_job

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
    (train.parents[2] / "deaf-gpu2").touch()
    train.mkdir(exist_ok=True)
    (train / "nodes").write_text("gpu0 gpu1 gpu2 gpu3")
    (train / "busy").write_text("gpu0")  # free again for the run, which is drawn to others all the same
    done = meshwright(tmp_path, "launch", str(examined(tmp_path, "exclude_node")), "--run-id", own("k8s-fit"))
    assert done.returncode == 0, done.stderr
    assert "left out: gpu2" in done.stderr
    assert nodes_of(train) == {"gpu1", "gpu3"}
    assert objects(train, "job") == []
    (jobset,) = objects(train, "jobset")
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    out = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert [(each["operator"], each["values"]) for each in out[0]["matchFields"]] == [("NotIn", ["gpu2"])]
    drawn = pod["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    fields = [field for each in drawn for field in each["preference"]["matchFields"]]
    assert [(each["operator"], each["values"]) for each in fields] == [("In", ["gpu1"]), ("In", ["gpu3"])]


def test_a_doctor_is_given_other_nodes_than_those_that_are_left_out(
    tmp_path: Path, train: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (train.parents[2] / "deaf-gpu1").touch()
    monkeypatch.chdir(tmp_path)
    words = ["doctor", str(pod_job(tmp_path, WHERE)), "--check", "ssh"]
    assert main(words) == 78
    assert "to go on without: --exclude gpu1" in capsys.readouterr().out
    assert main([*words, "--exclude", "gpu1", "--exclude", "gpu0/x2k9p"]) == 0
    assert "gpu2, gpu3" in capsys.readouterr().out
    assert objects(train, "job") == []


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


HELD = """
import os, time
from pathlib import Path


class Held(Tiny):
    passes = 0

    def forward(self, *args, **named):
        self.passes += 1
        if os.environ["MESHWRIGHT_ATTEMPT"] == "0" and self.passes > 14:
            Path(HERE, "at-" + os.environ["RANK"]).touch()
            if os.environ["RANK"] == "1" and Path(HERE, "crash").exists():
                raise ValueError("as it was told")
            time.sleep(0.5)
        return super().forward(*args, **named)


def build(width=16, dropout=0.1):
    return Held(width, dropout)
"""
STEPS = 60


def training(folder: Path) -> Path:
    """A training of two pods whose checkpoints lie on their claim, and whose first attempt is slow after some steps."""
    path = write_job(folder, steps=STEPS, every=5)
    (folder / "tiny.py").write_text(f"HERE = {str(folder)!r}\n{MODEL}{HELD}")
    told = yaml.safe_load(path.read_text())
    del told["logs"]
    told["checkpoint"] = {"every_steps": 5, "dir": "checkpoints", "lead": "60s"}
    told["failure"] = {"shutdown_grace": "5s", "max_restarts": 3, "backoff": {"initial": "0s"}}
    keys = {"name": "j", "command": None, "secrets": None}
    return pod_job(folder, "", {"claim": "runs", "secret": None}, **{**told, **keys})


def losses_of(path: Path) -> dict[int, float]:
    """The last loss of each step in metrics.jsonl."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {each["step"]: each["loss"] for each in records if "loss" in each}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the training without a launch, before a test changes PATH, with which ranks would be started anew."""
    job = write_job(tmp_path_factory.mktemp("alone"), steps=STEPS, every=50)
    train_here(job, "alone")
    found = losses_of(run_dir(job, "alone") / "metrics.jsonl")
    assert len(found) == STEPS
    return found


def status_of(train: Path, run_id: str) -> dict[str, Any]:
    """What the pretended controller says of a run; nothing before it has seen it."""
    path = train / f"status-j-{run_id}"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


@pytest.mark.parametrize(
    ("trouble", "kind", "restarts"), [("crash", "exit", 0), ("kill-1", "node", 1), ("evict-0", "preempt", 1)]
)
def test_a_training_goes_on_from_the_checkpoint_on_its_claim_with_the_same_losses(
    tmp_path: Path, train: Path, trouble: str, kind: str, restarts: int, alone: dict[int, float]
) -> None:
    run_id = own(f"k8s-{trouble}")
    path = training(tmp_path)
    try:
        watching = begin(tmp_path, "launch", str(path), "--run-id", run_id)
        assert eventually(lambda: len(list(tmp_path.glob("at-*"))) == 2, 240), watching.poll()
        (tmp_path / trouble if trouble == "crash" else train / trouble).touch()
        out, err = watching.communicate(timeout=400)
    finally:
        kill_all(carriers(run_id))
    assert watching.returncode == 0, out + err
    assert status_of(train, run_id)["restarts"] == restarts
    record = json.loads((tmp_path / "runs/j" / run_id / "exit.json").read_text())
    assert [(each["kind"], each["attempt"]) for each in record["restarts"]] == [(kind, 0)]
    claim = train / "claim-runs"
    (metrics,) = claim.glob("runs/j/*/metrics.jsonl")
    assert losses_of(metrics) == pytest.approx(alone, rel=1e-5)
    assert "step 5" in out or "from step" in out, out


def restarting(**failure: object) -> dict[str, object]:
    return {"failure": {"shutdown_grace": "2s", "backoff": {"initial": "0s"}, **failure}}


UP = """
import os, sys, time
from pathlib import Path
rank, attempt = os.environ["RANK"], os.environ["MESHWRIGHT_ATTEMPT"]
print("attempt", attempt, "of", rank, flush=True)
Path(HERE, f"up-{attempt}-{rank}").touch()
while not Path(HERE, f"go-{attempt}").exists():
    time.sleep(0.05)
"""


def up(folder: Path, attempt: int) -> bool:
    """Whether all ranks of an attempt run."""
    return eventually(lambda: len(list(folder.glob(f"up-{attempt}-*"))) == 2, 240)


def said(folder: Path, run_id: str) -> set[str]:
    """Lines of ranks that somebody who looks has fetched."""
    merged = folder / "runs/j" / run_id / "merged.log"
    return {line.partition(" | ")[2] for line in merged.read_text().splitlines()} if merged.exists() else set()


def test_what_agents_gave_up_is_not_started_again_and_everybody_learns_whose_fault_it_was(
    tmp_path: Path, train: Path
) -> None:
    run_id = own("k8s-given-up")
    code = f"HERE = {str(tmp_path)!r}\n{UP}\nif rank == '1': sys.exit(7)\ntime.sleep(600)\n"
    path = pod_job(tmp_path, code, {"claim": "runs"}, **restarting(max_restarts=1))
    for attempt in (0, 1):
        (tmp_path / f"go-{attempt}").touch()
    try:
        done = meshwright(tmp_path, "launch", str(path), "--run-id", run_id, "--detach")
        assert done.returncode == 0, done.stderr
        assert eventually(lambda: "conditions" in status_of(train, run_id), 240)
    finally:
        kill_all(carriers(run_id))
    told = status_of(train, run_id)
    assert (told["restarts"], "PodFailurePolicy" in told["conditions"][0]["message"]) == (0, True), told
    (run,) = json.loads(meshwright(tmp_path, "ps", "--all", "--json").stdout)["runs"]
    assert (run["state"], run["exit_code"]) == ("failed", 7)
    assert run["detail"] == f"rank 1 on j-{run_id}-node-0-1 failed first; not started again: the only restart is used"
    attached = meshwright(tmp_path, "attach", run_id)
    assert (attached.returncode, run["detail"] in attached.stdout + attached.stderr) == (7, True)


def test_restarts_of_ranks_and_of_pods_count_together_and_lines_of_all_attempts_are_found(
    tmp_path: Path, train: Path
) -> None:
    run_id = own("k8s-counted")
    wanted = [f"attempt {attempt} of {rank}" for attempt in (0, 1, 2) for rank in (0, 1)]
    code = f"HERE = {str(tmp_path)!r}\n{UP}\nif (rank, attempt) == ('1', '0'): sys.exit(7)\ntime.sleep(600)\n"
    path = pod_job(tmp_path, code, {"claim": "runs"}, **restarting(max_restarts=2))
    try:
        watching = begin(tmp_path, "launch", str(path), "--run-id", run_id)
        assert up(tmp_path, 0)
        (tmp_path / "go-0").touch()  # then rank 1 fails, and agents start ranks again
        assert up(tmp_path, 1)
        (train / "lose-1").touch()
        assert up(tmp_path, 2)
        assert eventually(lambda: said(tmp_path, run_id) >= set(wanted), 60), "also by pods that nobody had asked"
        (train / "kill-0").touch()
        out, err = watching.communicate(timeout=300)
    finally:
        kill_all(carriers(run_id))
    assert watching.returncode == 69, out + err
    assert status_of(train, run_id)["restarts"] == 2
    assert not list(tmp_path.glob("up-3-*")), "started more often than the job allows"
    record = json.loads((tmp_path / "runs/j" / run_id / "exit.json").read_text())
    told = [(each["attempt"], each["kind"]) for each in record["restarts"]]
    assert told == [(0, "exit"), (1, "node")]
    went = "a pod was killed, evicted, or went with its node"
    assert record["reason"] == f"{went}; not started again: all 2 restarts are used"
    logged = meshwright(tmp_path, "logs", run_id).stdout.splitlines()
    assert sorted(line.partition(" | ")[2] for line in logged if "attempt" in line) == wanted
