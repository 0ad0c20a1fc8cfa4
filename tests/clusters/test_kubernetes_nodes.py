"""Nodes of Kubernetes are examined in pods that wait; they are gone afterwards, and never hold a secret."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.evidence import Wishes
from meshwright.clusters.examine import examine
from meshwright.clusters.health import diagnose
from meshwright.clusters.kubernetes import KubernetesQueue
from meshwright.clusters.kubernetes_nodes import machine_of, probe_job
from meshwright.clusters.reaching import Visit
from tests.clusters.test_kubernetes import OPTIONS, REQUEST
from tests.launch.pretend_kubectl import write_kubectl
from tests.launch.waiting import eventually

WISHES = Wishes(checks=("clock", "ports"), write_bytes=0, timeout_s=60.0)
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pretended kubectl."""
    found = write_kubectl(tmp_path / "kubectl", "prod", "other")
    monkeypatch.setenv("PATH", f"{found}:{os.environ['PATH']}")
    return found


def test_the_pods_are_those_of_the_run_but_wait_and_know_no_secret() -> None:
    jobset = yaml.safe_load((GOLDEN / "jobset.yaml").read_text())
    job = probe_job(jobset, python="python3", most_s=600.0)
    assert job == yaml.safe_load((GOLDEN / "probe-job.yaml").read_text())
    assert "env" in jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]


def test_a_pod_ends_at_once_when_it_is_told_to_also_as_the_first_process_of_its_container() -> None:
    jobset = yaml.safe_load((GOLDEN / "jobset.yaml").read_text())
    job = probe_job(jobset, python=sys.executable, most_s=600.0)
    process = subprocess.Popen(job["spec"]["template"]["spec"]["containers"][0]["command"])
    try:
        assert eventually(lambda: catches(process.pid, signal.SIGTERM)), "else the kernel would not tell it"
        process.terminate()
        assert process.wait(60) == 143
    finally:
        process.kill()
        process.wait()


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    (caught,) = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_the_next_pods_find_the_nodes_free_of_those_that_were_examined(home: Path) -> None:
    (home / "prod/train").mkdir()
    (home / "prod/train/nodes").write_text("gpu0 gpu1")
    for _ in range(2):
        with KubernetesQueue(replace(OPTIONS, claim=None)).reached(REQUEST, Visit(most_s=0.2)) as reached:
            assert [each.name for each in reached.reaches] == ["gpu0", "gpu1"]


def test_pods_that_do_not_go_are_told_of_and_end_nothing(home: Path) -> None:
    told: list[str] = []
    queue = KubernetesQueue(replace(OPTIONS, claim=None))
    (home / "stays").write_text("error: timed out waiting for the condition on jobs/j")
    with queue.reached(REQUEST, Visit(tell=told.append)):
        pass
    assert "not gone after 60 s, and may keep others from their nodes: kubectl delete: error: timed out" in told[-1]
    (home / "stays").write_text("error: the server is gone")
    with pytest.raises(UnavailableError, match="the server is gone"), queue.reached(REQUEST, Visit()):
        pass


@pytest.mark.parametrize("kind", ["JobSet", "TrainJob"])
def test_nodes_are_examined_in_pods_by_their_real_names_and_nothing_stays(home: Path, kind: str) -> None:
    (home / "deaf-gpu1").touch()
    options = replace(OPTIONS, kind=kind, claim=None, context="other")
    with KubernetesQueue(options).reached(REQUEST, Visit()) as reached:
        assert [(each.name, each.by) for each in reached.reaches] == [("gpu0", "kubernetes"), ("gpu1", "kubernetes")]
        found = examine(reached, WISHES)
        assert list((home / "other/train").glob("job-*"))
    assert found.silent == {"gpu1": "error: unable to upgrade connection: container not found"}
    assert diagnose(found, WISHES).sick == ("gpu1",)
    assert not list((home / "other/train").glob("job-*"))
    asked = (home / "asked").read_text()
    assert "hf_verysecret" not in asked
    assert all(line.startswith("--context other --namespace train ") for line in asked.splitlines())


def test_pods_of_one_node_are_told_apart_and_their_node_is_known(home: Path) -> None:
    (home / "same").touch()
    with KubernetesQueue(replace(OPTIONS, claim=None)).reached(REQUEST, Visit()) as reached:
        names = [each.name for each in reached.reaches]
    assert names == ["gpu0/0", "gpu0/1"]
    assert [machine_of(name) for name in names] == ["gpu0", "gpu0"]


def test_pods_that_are_examined_keep_from_the_nodes_that_the_run_keeps_from(home: Path) -> None:
    options = replace(OPTIONS, claim=None, exclude=("gpu0", "gpu2"), prefer=("gpu3",))
    with KubernetesQueue(options).reached(REQUEST, Visit()) as reached:
        assert [each.name for each in reached.reaches] == ["gpu3", "gpu1"]
    (home / "prod/train/nodes").write_text("gpu0 gpu1")
    why = "within 0.2 s: pod .*: 0/2 nodes are available"
    with pytest.raises(UnavailableError, match=why), KubernetesQueue(options).reached(REQUEST, Visit(most_s=0.2)):
        pass
    assert not list((home / "prod/train").glob("job-*"))


def test_pods_that_do_not_start_are_said_why_and_go(home: Path) -> None:
    (home / "pending").touch()
    told: list[str] = []
    wait = Visit(most_s=4.0, tell=told.append)
    queue = KubernetesQueue(replace(OPTIONS, claim=None))
    why = r"within 4 s: pod .*: ImagePullBackOff Back-off.*--wait"
    with pytest.raises(UnavailableError, match=why), queue.reached(REQUEST, wait):
        pass
    assert "ImagePullBackOff" in told[0]
    assert not list((home / "prod/train").glob("job-*"))


@pytest.mark.parametrize(
    ("status", "why"),
    [
        ({"reason": "Evicted", "message": "low on memory"}, "Evicted low on memory"),
        ({"containerStatuses": [{"state": {"terminated": {"exitCode": 127}}}]}, "its container ended with code 127"),
    ],
)
def test_a_pod_that_failed_is_not_waited_for(home: Path, status: dict[str, object], why: str) -> None:
    (home / "failed").write_text(json.dumps({"phase": "Failed", **status}))
    queue = KubernetesQueue(replace(OPTIONS, claim=None))
    with pytest.raises(UnavailableError, match=rf"did not keep pod .*-0-gpu0: {why}"), queue.reached(REQUEST, Visit()):
        pass
    assert not list((home / "prod/train").glob("job-*"))


def test_a_job_that_was_created_though_nobody_heard_of_it_goes_and_another_ones_stays(home: Path) -> None:
    (home / "create-fails").write_text("error: the line broke")
    queue = KubernetesQueue(replace(OPTIONS, claim=None))
    with pytest.raises(UnavailableError, match="the line broke"), queue.reached(REQUEST, Visit()):
        pass
    assert not list((home / "prod/train").glob("job-*"))
    (home / "create-fails").write_text('Error from server (AlreadyExists): jobs.batch "j" already exists')
    with pytest.raises(UnavailableError, match="already exists"), queue.reached(REQUEST, Visit()):
        pass
    assert list((home / "prod/train").glob("job-*"))


def test_the_first_error_is_told_though_the_job_cannot_be_deleted(home: Path) -> None:
    (home / "keeps").touch()
    told: list[str] = []
    queue = KubernetesQueue(replace(OPTIONS, claim=None))
    with pytest.raises(ValueError, match="the first"), queue.reached(REQUEST, Visit(tell=told.append)):
        raise ValueError("the first")
    assert "may still be there until its deadline: kubectl delete: error: the server is gone" in told[-1]


def test_ctrl_c_takes_the_pods_away(home: Path) -> None:
    with pytest.raises(KeyboardInterrupt), KubernetesQueue(replace(OPTIONS, claim=None)).reached(REQUEST, Visit()):
        raise KeyboardInterrupt
    assert not list((home / "prod/train").glob("job-*"))
    assert "delete" in (home / "asked").read_text()


BOTH = (signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def unheeded() -> Iterator[None]:
    """Signals that would end this process as it stands; whoever sends one makes sure that it is caught."""
    before = [signal.signal(number, signal.SIG_DFL) for number in BOTH]
    yield
    for number, handler in zip(BOTH, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize(("first", "second"), [BOTH, BOTH[::-1]])
@pytest.mark.usefixtures("unheeded")
def test_a_signal_takes_the_pods_away_though_another_comes_meanwhile(
    home: Path, first: signal.Signals, second: signal.Signals
) -> None:
    def killed() -> None:
        assert all(catches(os.getpid(), number) for number in BOTH), "else they would end the tests"
        (home / "signals").write_text(str(int(second)))  # which comes while the pods go
        os.kill(os.getpid(), first)

    queue = KubernetesQueue(replace(OPTIONS, claim=None))
    with pytest.raises(SystemExit) as raised, queue.reached(REQUEST, Visit()):
        killed()
    assert raised.value.code == 128 + first, "the second is not heeded"
    assert [signal.getsignal(number) for number in BOTH] == [signal.SIG_DFL, signal.SIG_DFL]
    assert not list((home / "prod/train").glob("job-*"))


@pytest.mark.parametrize("number", BOTH)
@pytest.mark.usefixtures("unheeded")
def test_a_signal_while_the_pods_go_for_another_reason_does_not_keep_them(home: Path, number: signal.Signals) -> None:
    def fails() -> None:
        assert catches(os.getpid(), number), "else it would end the tests"
        (home / "signals").write_text(str(int(number)))
        raise ValueError("a mistake")

    queue = KubernetesQueue(replace(OPTIONS, claim=None))
    with pytest.raises(SystemExit) as raised, queue.reached(REQUEST, Visit()):
        fails()
    assert raised.value.code == 128 + number
    assert not list((home / "prod/train").glob("job-*"))


def test_a_signal_that_is_ignored_stays_so_and_other_threads_take_none(home: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with KubernetesQueue(replace(OPTIONS, claim=None)).reached(REQUEST, Visit()):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)

    def names() -> list[str]:
        with KubernetesQueue(replace(OPTIONS, claim=None)).reached(REQUEST, Visit()) as reached:
            return [each.name for each in reached.reaches]

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(names).result() == ["gpu0", "gpu1"]


def test_the_job_is_valid_json_without_variables(home: Path) -> None:
    with KubernetesQueue(replace(OPTIONS, claim=None)).reached(REQUEST, Visit()):
        (job,) = (json.loads(path.read_text()) for path in (home / "prod/train").glob("job-*"))
    assert job["kind"] == "Job"
    assert "env" not in job["spec"]["template"]["spec"]["containers"][0]
