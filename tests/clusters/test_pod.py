"""Two pods of a run as two programs of this machine: they meet by address, talk, and end as their ranks do."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from meshwright.clusters.base import Limits, Meeting, Program, Secret, StartRequest
from meshwright.clusters.kubernetes import plan_kubernetes
from meshwright.clusters.kubernetes_manifest import KubernetesOptions
from meshwright.clusters.network import bind_free, interfaces
from meshwright.clusters.pod import code_of, goes_on
from meshwright.clusters.pod_given import Given
from meshwright.clusters.retry import RetryPolicy
from tests.launch.waiting import eventually

pytestmark = pytest.mark.slow

SUM = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
x = torch.tensor([1.0 + dist.get_rank()])
dist.all_reduce(x)
print("sum", x.item(), "of", dist.get_world_size(), os.environ["TOKEN"], flush=True)
dist.destroy_process_group()
"""
FAIL = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(7)\ntime.sleep(60)\n"


def _address() -> str:
    found = [address for address in interfaces().values() if not address.startswith("127.")]
    if not found:
        pytest.skip("this machine has no address besides loopback, at which pods could meet")
    return found[0]


def _pods(
    folder: Path,
    code: str,
    max_restarts: int = 0,
    *,
    token: str = "tok-123",
    shared: bool = False,
    times: int = 0,
    told: bool = True,
) -> list["subprocess.Popen[str]"]:
    """Starts what Kubernetes would, from the objects it would get; each pod has its own disk unless they share one."""
    address = _address()
    with bind_free(address, None, (29400, 29999)) as free:
        port = free.getsockname()[1]
    request = StartRequest(
        name="pods",
        run_id=f"r{os.getpid()}",
        run_dir=folder,
        program=Program((sys.executable, "-c", code), folder, secrets=(Secret("TOKEN", "from_env TOKEN", ""),)),
        num_nodes=2,
        meeting=Meeting("first", port=port),
        limits=Limits(max_restarts, shutdown_grace_s=2.0, join_timeout_s=60.0, retry=RetryPolicy(initial_s=0.1)),
        warning=("USR2", 60.0),
    )
    submission = plan_kubernetes(request, KubernetesOptions("x", python=sys.executable, secret="tokens")).submission
    assert submission is not None
    config = next(iter(yaml.safe_load_all(submission.script)))
    plan: dict[str, Any] = json.loads(config["data"]["plan"])
    plan["meeting"]["host"] = address  # there is no DNS of a cluster here
    pods = []
    for index in range(2):
        plan["run_dir"] = str(folder / ("shared" if shared else f"pod{index}") / "run")
        variables = {
            "MESHWRIGHT_PLAN": json.dumps(plan),
            "MESHWRIGHT_FILES": config["data"]["files"],
            "MESHWRIGHT_KEY": "ab" * 32,
            "JOB_COMPLETION_INDEX": str(index),
            "MESHWRIGHT_RESTARTS": str(times) if max_restarts and told else "",
            "TOKEN": token,
        }
        pods.append(
            subprocess.Popen(
                plan["nodes"][index]["agent"], env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True
            )
        )
    return pods


def test_pods_meet_at_the_first_one_and_their_ranks_talk(tmp_path: Path) -> None:
    pods = _pods(tmp_path, SUM)
    said = [pod.communicate(timeout=120)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], said
    for index, text in enumerate(said):
        assert f"pods-r{os.getpid()}-node-0-{index}:{index} sum 3.0 of 2 ***" in text


def test_the_pod_whose_rank_fails_ends_with_its_code_and_the_other_does_not_stay(tmp_path: Path) -> None:
    pods = _pods(tmp_path, FAIL)
    said = pods[1].communicate(timeout=240)[0]
    assert pods[1].returncode == 7, said
    pods[0].terminate()  # as the JobSet does once one of its pods has failed
    pods[0].communicate(timeout=240)
    assert pods[0].returncode in (143, 1)
    assert json.loads(said.splitlines()[-1])["meshwright"]["exit_code"] == 7


def test_pods_agree_what_follows_a_failure_that_only_one_of_them_can_explain(tmp_path: Path) -> None:
    code = (
        "import os, signal, time\n"
        "rank, attempt = os.environ['RANK'], os.environ['MESHWRIGHT_ATTEMPT']\n"
        "if (rank, attempt) == ('1', '0'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "if (rank, attempt) == ('0', '1'): import no_such_module\n"
        "time.sleep(600)\n"
    )
    pods = _pods(tmp_path, code, max_restarts=5)
    said = [pod.communicate(timeout=120)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [1, 143], said
    for text in said:
        events = json.loads(text.splitlines()[-1])["meshwright"]["events"]
        told = [(each["kind"], each["rank"], each["again"]) for each in events if each["event"] == "decided"]
        assert told == [("signal", 1, True), ("import_error", 0, False)]


def test_no_secret_leaves_a_pod_not_in_a_line_that_was_never_ended_and_not_in_its_record(tmp_path: Path) -> None:
    code = (
        "import json, os, sys, time\n"
        f"rank, run_dir = os.environ['RANK'], {str(tmp_path)!r} + '/pod' + os.environ['RANK'] + '/run'\n"
        "why = {'rank': int(rank), 'time_unix_s': time.time(), 'traceback': 'refused ' + os.environ['TOKEN']}\n"
        "open(run_dir + f'/errors/rank-{rank}.json', 'w').write(json.dumps(why))\n"
        "sys.stdout.write(chr(27) + '[31m' + os.environ['TOKEN'] + ' \u00e9'); sys.exit(3)\n"
    )
    pods = _pods(tmp_path, code, token='to"k\u00e9n')
    said = [pod.communicate(timeout=120)[0] for pod in pods]
    assert "k\u00e9n" not in "".join(said).encode().decode("unicode-escape"), said
    assert "k\u00e9n" not in "".join(said), said
    for index, text in enumerate(said):
        if pods[index].returncode == 3:
            line, record = text.splitlines()
            assert line == f"pods-r{os.getpid()}-node-0-{index}:{index} *** \u00e9"
            files = json.loads(record)["meshwright"]["files"]
            assert files[f"errors/rank-{index}.json"]["traceback"] == "refused ***"
    assert 3 in [pod.returncode for pod in pods]


COUNTED = """
import os, time
from pathlib import Path
while len(list(Path(os.environ["MESHWRIGHT_RUN_DIR"], "nodes").glob("*.jsonl"))) < 2:
    time.sleep(0.1)
"""


def test_a_pod_prints_its_own_ranks_and_counters_only_where_pods_share_their_directory(tmp_path: Path) -> None:
    run_dir = tmp_path / "shared" / "run"
    pods = _pods(tmp_path, f"import os; os.environ['MESHWRIGHT_RUN_DIR'] = {str(run_dir)!r}{COUNTED}{SUM}", shared=True)
    said = [pod.communicate(timeout=120)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], said
    assert [text.count(" sum 3.0") for text in said] == [1, 1]
    for index, text in enumerate(said):
        files = json.loads(text.splitlines()[-1])["meshwright"]["files"]
        (counted,) = [name for name in files if name.startswith("nodes/")]
        assert counted == f"nodes/pods-r{os.getpid()}-node-0-{index}.jsonl"
        assert files[counted][0]["counted_s"] > 0


SAVES = """
import os, pathlib, signal, sys, time
rank, attempt = os.environ["RANK"], os.environ["MESHWRIGHT_ATTEMPT"]
here = pathlib.Path(sys.argv[1])
def save(*_):
    (here / "saved").write_text(attempt)
if "saves" in sys.argv:
    signal.signal(signal.Signals["SIG" + os.environ["MESHWRIGHT_SAVE_SIGNAL"]], save)
(here / f"up-{attempt}-{rank}").touch()
print("attempt", attempt, "from", (here / "saved").read_text() if (here / "saved").exists() else "nothing", flush=True)
while not (here / "saved").exists():
    time.sleep(0.05)
sys.exit(75 if attempt == "0" else 0)
"""


def _program(folder: Path, *words: str) -> str:
    """As a rank runs it, told by its words."""
    return f"import sys; sys.argv = {['x', str(folder), *words]!r}\n{SAVES}"


def _record(said: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(said.splitlines()[-1])["meshwright"]
    return found


@pytest.mark.parametrize("shared", [True, False])
def test_a_pod_that_has_to_go_lets_ranks_save_and_the_next_pods_count_on(tmp_path: Path, shared: bool) -> None:
    code = _program(tmp_path, "saves")
    pods = _pods(tmp_path, code, 2, shared=shared)
    assert eventually(lambda: len(list(tmp_path.glob("up-0-*"))) == 2, 120)
    pods[1].terminate()
    said = [pod.communicate(timeout=120)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [75, 75], said
    assert (tmp_path / "saved").read_text() == "0"
    told = [each for each in _record(said[0])["events"] if each["event"] == "decided"]
    assert [(each["kind"], each["again"]) for each in told] == [("preempt", True)]
    if not shared:  # without a claim, new pods have new disks
        for index in range(2):
            shutil.rmtree(tmp_path / f"pod{index}")
    pods = _pods(tmp_path, code, 2, shared=shared, times=1)
    said = [pod.communicate(timeout=120)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], said
    assert [text.count("attempt 1 from 0") for text in said] == [1, 1], said
    assert ":0 attempt 0" not in said[0], "what pods before them printed are no lines of theirs"
    records = [[json.loads(line)["meshwright"] for line in text.splitlines() if line[0] == "{"] for text in said]
    assert [found[0].get("left") == ["attempt 0 from nothing"] for found in records] == [shared, shared]
    first = [found[int(shared)]["events"] for found in records]
    assert [any(each["event"] == "result" for each in events) for events in first] == [False, False], "not the end yet"
    for text in said:
        events = _record(text)["events"]
        told = [(each["attempt"], each["kind"], each["again"]) for each in events if each["event"] == "decided"]
        assert told == [(0, "preempt" if shared else "node", True)]
        assert max(each["attempt"] for each in events if each["event"] == "started") == 1


def test_a_pod_that_nobody_would_start_again_does_not_say_that_it_will_be(tmp_path: Path) -> None:
    pods = _pods(tmp_path, _program(tmp_path, "saves"), 2, told=False)  # as in a TrainJob
    assert eventually(lambda: len(list(tmp_path.glob("up-0-*"))) == 2, 120)
    pods[1].terminate()
    said = [pod.communicate(timeout=120)[0] for pod in pods]
    told = [each for each in _record(said[0])["events"] if each["event"] == "decided"]
    assert [each["again"] for each in told] == [False]


def test_ranks_that_do_not_heed_the_signal_are_ended_at_once(tmp_path: Path) -> None:
    pods = _pods(tmp_path, _program(tmp_path), 2)
    assert eventually(lambda: len(list(tmp_path.glob("up-0-*"))) == 2, 120)
    for pod in pods:
        pod.terminate()
    said = [pod.communicate(timeout=45)[0] for pod in pods]  # less than they would have to save
    assert [pod.returncode for pod in pods] == [75, 75], said


def test_pods_that_were_started_too_often_say_so_and_end(tmp_path: Path) -> None:
    pods = _pods(tmp_path, FAIL, 1, times=2)
    said = [pod.communicate(timeout=60)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [69, 69], said
    assert _record(said[0])["events"][-1]["message"] == "the only restart is used"


@pytest.mark.parametrize("code", [75, 137])
def test_a_run_that_was_given_up_does_not_ask_to_be_started_again_whatever_its_rank_ended_with(
    tmp_path: Path, code: int
) -> None:
    pods = _pods(tmp_path, FAIL.replace("(7)", f"({code})").replace("(60)", "(600)"), 1)
    said = pods[1].communicate(timeout=120)[0]
    pods[0].terminate()  # as the JobSet does
    pods[0].communicate(timeout=120)
    assert pods[1].returncode == 1, said
    assert _record(said)["exit_code"] == code


def _ended(state: str, *events: dict[str, Any], restarts: int = 3, told: bool = False, **retry: Any) -> bool:
    limits = {"max_restarts": restarts, "past": [], "retry": asdict(RetryPolicy(**retry))}
    last = [{"event": "result", "state": state, "message": ""}] if state else []
    return goes_on([*events, *last], limits, told=told)


def _decided(attempt: int = 0, *, again: bool, leaving: bool = False) -> dict[str, Any]:
    return {"event": "decided", "attempt": attempt, "again": again, "leaving": leaving}


def test_a_pod_asks_for_new_pods_only_where_agents_did_not_give_up() -> None:
    started = [{"event": "started", "attempt": attempt} for attempt in range(4)]
    assert not _ended("succeeded", started[0], told=True)
    assert not _ended("failed", started[0], _decided(again=False))
    assert not _ended("failed", *started[:2], _decided(again=True)), "of the attempt before"
    assert _ended("rendezvous_failed", started[0], _decided(again=True)), "others did not come"
    assert _ended("failed", started[0], _decided(again=False, leaving=True))
    assert not _ended("failed", started[0], _decided(again=False, leaving=True), no_retry_on=("preempt",))
    assert _ended("stopped", started[0], told=True)
    assert not _ended("stopped", started[0])
    assert not _ended("stopped", *started, told=True), "all restarts are used"
    assert not _ended("stopped", started[0], told=True, restarts=0)
    assert _ended("", started[0])
    assert not _ended("", started[0], no_retry_on=("node",))
    assert not _ended("setup_failed", restarts=3)


def test_an_agent_that_dies_without_a_word_is_a_failure() -> None:
    assert code_of([], -9) == 137
    assert code_of([], 0) == 70
    assert code_of([{"event": "result", "state": "rendezvous_failed", "message": ""}], 0) == 76


def test_nothing_that_pods_of_another_start_signed_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(index: int, times: int) -> str:
        node = {"name": "n", "ranks": [0]}
        plan = {"nodes": [node, node], "run_dir": str(tmp_path / "run"), "secrets": [], "limits": {}}
        told = {"MESHWRIGHT_PLAN": json.dumps(plan), "MESHWRIGHT_FILES": "{}", "MESHWRIGHT_KEY": "ab" * 32}
        told |= {"JOB_COMPLETION_INDEX": str(index), "MESHWRIGHT_RESTARTS": str(times)}
        for name, value in told.items():
            monkeypatch.setenv(name, value)
        return Given.taken().key

    keys = [[key(index, times) for index in (0, 1)] for times in (0, 1, 2)]
    assert [len(set(each)) for each in keys] == [1, 1, 1], "pods of one start have the same"
    assert len({each[0] for each in keys}) == 3
