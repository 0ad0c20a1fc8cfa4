"""Kubernetes: plans and manifests as values, kubectl as a program that writes down what it is asked."""

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from meshwright.clusters.base import Limits, Meeting, Program, Secret, StartRequest
from meshwright.clusters.contract import Said
from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.kubernetes import KubernetesQueue, plan_kubernetes
from meshwright.clusters.kubernetes_manifest import KubernetesOptions

TRICKY = ("python", "train.py", "--text", "a b $(HOME) 'c'\n", "{x}: #")
REQUEST = StartRequest(
    name="llama",
    run_id="20261126T090000Z-a1b2c3",
    run_dir=Path("/home/me/runs/llama/20261126T090000Z-a1b2c3"),
    program=Program(
        argv=TRICKY,
        workdir=Path("/home/me/llama"),
        env=(("NCCL_DEBUG", "WARN"),),
        secrets=(Secret("HF_TOKEN", "from_env HF_TOKEN", "hf_verysecret"),),
    ),
    num_nodes=2,
    num_ranks=16,
    ranks_per_node=None,
    gpus_per_node=8,
    meeting=Meeting("first"),
    limits=Limits(shutdown_grace_s=60.0),
)
OPTIONS = KubernetesOptions(
    "registry.example/train:1", namespace="train", secret="tokens", claim="runs", workdir="/app"
)


def _objects(options: KubernetesOptions = OPTIONS, request: StartRequest = REQUEST) -> list[dict[str, object]]:
    submission = plan_kubernetes(request, options).submission
    assert submission is not None
    return list(yaml.safe_load_all(submission.script))


def test_a_jobset_is_written_exactly_so() -> None:
    golden = Path(__file__).parent / "golden" / "jobset.yaml"
    _, jobset = _objects()
    assert jobset == yaml.safe_load(golden.read_text())


def test_a_trainjob_is_written_exactly_so() -> None:
    golden = Path(__file__).parent / "golden" / "trainjob.yaml"
    _, trainjob = _objects(replace(OPTIONS, kind="TrainJob", claim=None))
    assert trainjob == yaml.safe_load(golden.read_text())


def test_pods_read_the_plan_from_the_config_map_word_for_word() -> None:
    config, _ = _objects(replace(OPTIONS, files={"job.json": "{}"}))
    data = config["data"]
    assert isinstance(data, dict)
    inside = json.loads(data["plan"])
    assert tuple(inside["nodes"][1]["argv"]) == TRICKY
    assert inside["nodes"][1]["ranks"] == list(range(8, 16))
    assert inside["run_dir"] == "/meshwright/runs/llama/20261126T090000Z-a1b2c3"
    name = "llama-20261126t090000z-a1b2c3"
    assert (inside["meeting"]["host"], inside["meeting"]["port"]) == (f"{name}-node-0-0.{name}", 29400)
    assert json.loads(data["files"]) == {"job.json": "{}"}


def test_no_value_of_a_secret_stands_anywhere_and_one_without_a_place_is_refused() -> None:
    plan = plan_kubernetes(REQUEST, OPTIONS)
    assert "hf_verysecret" not in str(plan) + json.dumps(plan.as_dict())
    assert "secretKeyRef" in str(plan)
    with pytest.raises(UnavailableError, match="name the Secret that has them"):
        plan_kubernetes(REQUEST, replace(OPTIONS, secret=None))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (replace(OPTIONS, namespace="Train_1"), "metadata.namespace: 'Train_1' does not match"),
        (replace(OPTIONS, resources={"memory": "900 GB"}), "resources.limits.memory: '900 GB' does not match"),
        (replace(OPTIONS, kind="TrainJob"), "use kind: jobset for claim"),
        (replace(OPTIONS, files={"job.json": "x" * 200_000}), "of which a pod takes 100000"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused_before(options: KubernetesOptions, error: str) -> None:
    with pytest.raises(UnavailableError, match=error):
        plan_kubernetes(REQUEST, options)


def test_as_many_ranks_as_a_node_has_can_only_be_said_of_gpus() -> None:
    assert plan_kubernetes(replace(REQUEST, ranks_per_node="gpu"), OPTIONS).world_size == 16
    with pytest.raises(UnavailableError, match="write a number"):
        plan_kubernetes(replace(REQUEST, ranks_per_node="auto"), OPTIONS)


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kubectl that writes down its words and input, and answers and fails as it is told."""
    program = tmp_path / "kubectl"
    program.write_text(
        '#!/bin/sh\necho "$@" >> "$0.words"\ncat >> "$0.input"\n'
        '[ ! -f "$0.answer" ] || cat "$0.answer"\n[ ! -f "$0.fail" ] || { grep -q "$(cat $0.fail)" '
        '"$0.words" && echo "error: You must be logged in" >&2 && exit 1; }\nexit 0\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return program


def _words(kubectl: Path) -> list[str]:
    return (tmp.read_text().splitlines()) if (tmp := kubectl.with_name("kubectl.words")).exists() else []


def test_a_run_is_handed_over_with_its_key_on_standard_input(kubectl: Path) -> None:
    queue = KubernetesQueue(replace(OPTIONS, context="prod"))
    plan = queue.plan(REQUEST)
    queue.check(plan)
    assert _words(kubectl) == []
    job = queue.submit(plan, {"HF_TOKEN": "hf_verysecret"})
    assert job == "prod/train/jobset/llama-20261126t090000z-a1b2c3"
    start = "--context prod --namespace train create"
    key = f"{start} secret generic llama-20261126t090000z-a1b2c3-key --from-file=key=/dev/stdin"
    assert _words(kubectl) == [key, f"{start} -f -"]
    said = kubectl.with_name("kubectl.input").read_text()
    assert plan.submission is not None
    assert said[64:] == plan.submission.script
    assert "hf_verysecret" not in said


def test_a_run_that_is_refused_leaves_nothing_behind_and_says_why(kubectl: Path) -> None:
    kubectl.with_name("kubectl.fail").write_text("create -f -")
    queue = KubernetesQueue(OPTIONS)
    with pytest.raises(UnavailableError, match="You must be logged in"):
        queue.submit(queue.plan(REQUEST), {})
    assert "delete --ignore-not-found" in _words(kubectl)[-1]


@pytest.mark.parametrize(
    ("answer", "state", "detail"),
    [
        ("", "gone", "there is no jobset x in namespace train"),
        ('{"status": {}}', "pending", ""),
        ('{"status": {"replicatedJobsStatus": [{"name": "node", "active": 1, "ready": 0}]}}', "running", "1 jobs"),
        ('{"status": {"conditions": [{"type": "Completed", "status": "True"}]}}', "gone", "Completed"),
        ('{"status": {"conditions": [{"type": "Failed", "status": "True", "message": "m"}]}}', "gone", "Failed: m"),
    ],
)
def test_what_the_cluster_says_of_a_run_is_read(kubectl: Path, answer: str, state: str, detail: str) -> None:
    kubectl.with_name("kubectl.answer").write_text(answer)
    found = KubernetesQueue(OPTIONS).status("train/jobset/x")
    assert (found.state, detail in found.detail) == (state, True)


def test_a_cluster_that_does_not_answer_leaves_the_state_unknown(kubectl: Path) -> None:
    kubectl.with_name("kubectl.fail").write_text("get")
    assert KubernetesQueue(OPTIONS).status("train/jobset/x").state == "unknown"


def test_the_context_that_is_current_at_submission_is_the_one_that_is_asked_ever_after(kubectl: Path) -> None:
    kubectl.with_name("kubectl.answer").write_text("arn:aws:eks:eu:1:cluster/prod\n")
    queue = KubernetesQueue(OPTIONS)
    job = queue.submit(queue.plan(REQUEST), {})
    assert job == "arn:aws:eks:eu:1:cluster/prod/train/jobset/llama-20261126t090000z-a1b2c3"
    later = KubernetesQueue.of(job)
    later.cancel(job)
    assert _words(kubectl)[-1].startswith("--context arn:aws:eks:eu:1:cluster/prod --namespace train delete ")
    kubectl.with_name("kubectl.answer").write_text("")
    assert later.status(job).detail.endswith("in namespace train of context arn:aws:eks:eu:1:cluster/prod")
    alone = KubernetesQueue.of("train/jobset/x")
    alone.status("train/jobset/x")
    assert _words(kubectl)[-1] == "--namespace train get jobset x --ignore-not-found -o json"


def test_cancelling_deletes_every_object_and_tells_a_run_that_is_not_there_from_one_that_it_ended(
    kubectl: Path,
) -> None:
    queue = KubernetesQueue(OPTIONS)
    kubectl.with_name("kubectl.answer").write_text("jobset.jobset.x-k8s.io/x\n")
    queue.cancel("train/jobset/x")
    deleted = [line.partition("--output=name ")[2] for line in _words(kubectl)]
    pods = "pods --selector jobset.sigs.k8s.io/jobset-name=x --grace-period=1"
    assert deleted == ["jobset/x", "configmap/x secret/x-key", pods], "pods are not given the time to save"
    kubectl.with_name("kubectl.answer").write_text("")
    with pytest.raises(UnavailableError, match="nothing was cancelled: there is no jobset x in namespace train"):
        queue.cancel("train/jobset/x")


def test_lines_of_pods_are_read_with_their_nodes_and_times_and_other_words_are_passed_over(kubectl: Path) -> None:
    said = """\
[pod/x-node-0-1-x7k2p/node] 2026-11-27T20:12:52.5Z x-node-0-1:1 [pod/a-b/node] \u00e9
error: container "node" in pod "x-node-0-2-abcde" is waiting to start: ContainerCreating
[pod/x-node-0-0-qqqqq/node] 2026-11-27T21:12:52.000000001+01:00 x-node-0-0:0 \u0020
[pod/x-node-0-0-qqqqq/node] 2026-11-27T20:12:53Z \u0020
"""
    kubectl.with_name("kubectl.answer").write_text(said)
    first = 1795810372 * 10**9
    assert KubernetesQueue(OPTIONS).said("train/jobset/x", 2.5) == [
        Said("x-node-0-1", first + 500_000_000, "x-node-0-1:1 [pod/a-b/node] \u00e9"),
        Said("x-node-0-0", first + 1, "x-node-0-0:0  "),
        Said("x-node-0-0", first + 10**9, " "),
    ]
    assert _words(kubectl)[-1] == (
        "--namespace train logs --selector jobset.sigs.k8s.io/jobset-name=x --prefix --timestamps --ignore-errors "
        "--tail=-1 --since=3s"
    )
