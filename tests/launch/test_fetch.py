"""Runs in Kubernetes from any terminal: pods are processes here, kubectl and its controllers are pretended."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from meshwright.clusters.contract import Job, Lost, Said
from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.sweep import carriers
from meshwright.launch.cli import main
from meshwright.launch.fetch import end_of, fetch, note_cancelled
from meshwright.launch.runs import Known
from tests.launch.own import own
from tests.launch.pods import clusters_at
from tests.launch.pods import pod_job as job
from tests.launch.typed import begin, meshwright
from tests.launch.waiting import eventually, kill_all

pytestmark = pytest.mark.usefixtures("own_state")

SLEEP = "import os, time; print('up', os.environ['RANK'], os.environ['TOKEN'], flush=True); time.sleep(600)"
FAIL = """\
import os, sys, time
print('here is', os.environ['RANK'], flush=True)
if os.environ['RANK'] == '0':
    open('SPOKE', 'w').close()
while not os.path.exists('GO'):
    time.sleep(0.05)
if os.environ['RANK'] == '1':
    raise SystemExit(7) from ValueError('bad token ' + os.environ['TOKEN'])
time.sleep(60)
"""
RAISE = FAIL.replace("raise SystemExit(7) from ", "raise ")


@pytest.fixture
def clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kubectl with two clusters, of which the job names the one that is not current."""
    return clusters_at(tmp_path, monkeypatch)


def lines(run_id: str, *said: str) -> list[str]:
    return [f"j-{run_id}-node-0-{index}:{index} | {text}" for index, text in enumerate(said)]


def here(folder: Path, run_id: str) -> set[str]:
    """Lines that somebody who looks has fetched."""
    merged = folder / "runs/j" / run_id / "merged.log"
    return set(merged.read_text().splitlines()) if merged.exists() else set()


@pytest.mark.slow
def test_a_run_in_another_than_the_current_context_is_found_looked_at_and_ended(tmp_path: Path, clusters: Path) -> None:
    run_id = own("k8s")
    try:
        done = meshwright(tmp_path, "launch", str(job(tmp_path, SLEEP)), "--run-id", run_id, "--detach")
        assert done.returncode == 0, done.stderr
        wanted = set(lines(run_id, "up 0 ***", "up 1 ***"))
        followed = begin(tmp_path, "logs", "-f", run_id)
        assert eventually(lambda: wanted <= here(tmp_path, run_id), 60)
        (run,) = json.loads(meshwright(tmp_path, "ps", "--json").stdout)["runs"]
        assert (run["run_id"], run["state"]) == (run_id, "running")
        assert run["job"] == f"arn:aws:eks:eu:1:cluster/prod/train/jobset/j-{run_id}"
        only = meshwright(tmp_path, "logs", run_id, "--rank", "1").stdout.splitlines()
        assert only == lines(run_id, "", "up 1 ***")[1:]
        attached = begin(tmp_path, "attach", run_id)
        cancelled = meshwright(tmp_path, "cancel", run_id)
        assert (cancelled.returncode, "was cancelled" in cancelled.stdout) == (0, True), cancelled.stderr
        assert eventually(lambda: not list(carriers(run_id)), 60), "pods go on"
        assert wanted <= set(attached.communicate(timeout=60)[0].splitlines())
        assert attached.returncode == 130
        assert wanted <= set(followed.communicate(timeout=60)[0].splitlines())
        again = meshwright(tmp_path, "cancel", run_id)
        assert (again.returncode, f"run {run_id} is over: cancelled" in again.stderr) == (64, True)
    finally:
        kill_all(carriers(run_id))
    asked = (clusters / "asked").read_text().splitlines()
    assert [
        line for line in asked if not line.startswith("--context arn:aws:eks:eu:1:cluster/prod --namespace train")
    ] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jobset", "trainjob"])
def test_a_launch_shows_lines_of_pods_and_ends_with_code_and_reason_of_the_rank_that_failed_first(
    tmp_path: Path, clusters: Path, kind: str
) -> None:
    run_id = own(f"k8s-{kind}")
    path = job(tmp_path, FAIL.replace("GO", str(tmp_path / "go")).replace("SPOKE", str(tmp_path / "spoke")))
    try:
        watching = begin(tmp_path, "launch", str(path), "--run-id", run_id, "--set", f"cluster.kind={kind}")
        wanted = set(lines(run_id, "here is 0", "here is 1"))
        assert eventually(lambda: wanted <= here(tmp_path, run_id), 60), "lines come while the run goes on"
        (tmp_path / "go").touch()
        out, err = watching.communicate(timeout=120)
    finally:
        kill_all(carriers(run_id))
    assert watching.returncode == 7, err
    assert wanted <= set(out.splitlines())
    run_dir = tmp_path / "runs/j" / run_id
    assert out.endswith(f"run directory: {run_dir}\n")
    record = json.loads((run_dir / "exit.json").read_text())
    assert (record["state"], record["exit_code"], record["first_failure"]["rank"]) == ("failed", 7, 1)
    assert record["reason"] == f"rank 1 on j-{run_id}-node-0-1 failed first"
    attached = meshwright(tmp_path, "attach", run_id)
    assert (attached.returncode, attached.stdout.splitlines()) == (7, out.splitlines())
    assert record["reason"] in attached.stdout + attached.stderr


@pytest.mark.slow
def test_the_end_of_a_run_that_nobody_watched_is_found_by_whoever_asks_with_its_traceback(
    tmp_path: Path, clusters: Path
) -> None:
    run_id = own("k8s-alone")
    try:
        both = str(tmp_path / "spoke")  # rank 1 fails when rank 0 has spoken
        told = job(tmp_path, RAISE.replace("GO", both).replace("SPOKE", both))
        meshwright(tmp_path, "launch", str(told), "--run-id", run_id, "--detach")
        status = clusters / f"arn:aws:eks:eu:1:cluster/prod/train/status-j-{run_id}"
        assert eventually(lambda: status.exists() and "Failed" in status.read_text(), 60)
    finally:
        kill_all(carriers(run_id))
    (run,) = json.loads(meshwright(tmp_path, "ps", "--all", "--json").stdout)["runs"]
    assert (run["state"], run["exit_code"], run["detail"]) == (
        "failed",
        1,
        f"rank 1 on j-{run_id}-node-0-1 failed first",
    )
    told = (tmp_path / "runs/j" / run_id / "exit.json").read_text()
    assert "ValueError: bad token ***" in json.loads(told)["first_failure"]["traceback"]
    followed = meshwright(tmp_path, "logs", "-f", run_id)
    assert lines(run_id, "", "here is 1")[1] in followed.stdout.splitlines(), "what pod 0 said went with it"
    assert "tok-123" not in told + followed.stdout


class Cluster:
    """A queue that says what a test wants, and writes down for how long back it is asked."""

    def __init__(self, *said: Said, lost: dict[str, Lost] | None = None) -> None:
        self.lines, self.gone, self.asked = list(said), lost or {}, list[float | None]()
        self.answers = True

    def said(self, job: str, since_s: float | None = None) -> list[Said]:
        assert job == "train/jobset/j-r1"
        if not self.answers:
            raise UnavailableError("no answer")
        self.asked.append(since_s)
        return self.lines

    def lost(self, job: str) -> dict[str, Lost]:
        return self.gone


def told(queue: Cluster) -> Any:
    return queue


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Known:
    """A run of two pods, as a launch leaves it, of which everybody looks at once."""
    monkeypatch.setattr("meshwright.launch.fetch._EVERY_S", 0.0)
    folder = tmp_path / "run"
    for name in ("logs", "errors", "ranks", "private"):
        (folder / name).mkdir(parents=True)
    path = job(tmp_path, "", secrets={})
    assert main(["launch", str(path), "--dry-run", "--run-id", "r1", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    (folder / "plan.json").write_text(json.dumps({**plan, "run_dir": str(folder)}))
    files = next(iter(yaml.safe_load_all(plan["submission"]["script"])))["data"]["files"]
    (folder / "job.json").write_text(json.loads(files)["job.json"])
    return Known("r1", "j", "kubernetes", str(folder), 1.0, shown=(0,), job="train/jobset/j-r1")


def from_rank(rank: int, at: int, text: str) -> Said:
    return Said(f"j-r1-node-0-{rank}", at, f"j-r1-node-0-{rank}:{rank} {text}")


def record(rank: int, at: int, *events: dict[str, Any], files: dict[str, Any] | None = None) -> Said:
    stamped = [{"told_unix_s": float(index), **each} for index, each in enumerate(events)]
    text = json.dumps({"meshwright": {"node": "x", "exit_code": 1, "events": stamped, "files": files or {}}})
    return Said(f"j-r1-node-0-{rank}", at, text)


def died(rank: int, code: int, at_s: float, **more: Any) -> dict[str, Any]:
    return {
        "event": "exit",
        "attempt": 0,
        "rank": rank,
        "code": code,
        "time_unix_s": at_s,
        "ended_by_us": False,
        **more,
    }


def result(state: str) -> dict[str, Any]:
    return {"event": "result", "state": state, "message": ""}


def text_of(run: Known, name: str) -> str:
    return Path(run.run_dir, name).read_text()


def ended(run: Known, queue: Cluster, code: int, detail: str = "Failed: m") -> dict[str, Any]:
    end_of(run, told(queue), Job("gone", detail, code))
    found: dict[str, Any] = json.loads(text_of(run, "exit.json"))
    return found


def test_lines_come_in_the_order_of_their_times_each_once_whoever_looks(run: Known) -> None:
    queue = Cluster(from_rank(1, 30, "b"), from_rank(0, 20, "a"), from_rank(0, 40, "\x1b[31mc"))
    fetch(run, told(queue))
    queue.lines += [from_rank(0, 50, "d"), from_rank(1, 35, "e")]
    queue.answers = False
    fetch(run, told(queue))  # nothing is lost by that
    queue.answers = True
    fetch(run, told(queue))
    fetch(run, told(queue))
    assert [line.partition(" | ")[2] for line in text_of(run, "merged.log").splitlines()] == ["a", "b", "c", "e", "d"]
    assert text_of(run, "logs/rank-1.log") == "b\ne\n"
    assert [line.partition(" | ")[2] for line in text_of(run, "launcher.log").splitlines()] == ["a", "c", "d"]
    assert queue.asked[0] is None
    assert all(since_s is not None and 10 <= since_s < 60 for since_s in queue.asked[1:])


def test_lines_that_an_earlier_pod_left_are_found_where_nobody_had_fetched_them(run: Known) -> None:
    def left(rank: int, at: int, *lines: str) -> Said:
        told = {"meshwright": {"node": f"j-r1-node-0-{rank}", "rank": rank, "left": lines}}
        return Said(f"j-r1-node-0-{rank}", at, json.dumps(told))

    queue = Cluster(from_rank(1, 10, "a"), from_rank(1, 20, "b"))
    fetch(run, told(queue))
    queue.lines += [from_rank(1, 30, "c"), left(1, 40, "a", "b", "c", "d"), from_rank(1, 50, "e"), left(0, 60, "f")]
    queue.lines += [left(7, 70, "of no rank"), left(1, 80, "c", "d", "e")]
    fetch(run, told(queue))
    assert text_of(run, "logs/rank-1.log") == "a\nb\nc\nd\ne\n"
    assert text_of(run, "logs/rank-0.log") == "f\n"
    merged = [line.partition(" | ")[2] for line in text_of(run, "merged.log").splitlines()]
    assert merged == ["a", "b", "c", "d", "e", "f"]


def test_words_of_a_pod_itself_are_shown_too_such_as_that_its_image_has_no_meshwright(run: Known) -> None:
    fetch(run, told(Cluster(Said("j-r1-node-0-1", 1, "python3: No module named meshwright"))))
    assert text_of(run, "launcher.log") == "j-r1-node-0-1 | python3: No module named meshwright\n"


def test_a_pod_of_a_later_start_that_died_without_a_word_is_not_taken_for_the_one_before_it(run: Known) -> None:
    before = {"event": "decided", "attempt": 0, "again": True}
    queue = Cluster(record(1, 1, died(1, 75, 1.0), result("failed")))
    fetch(run, told(queue))
    queue.lines += [record(1, 2, before), record(0, 3, before)]  # what pods print as they begin
    queue.gone = {"j-r1-node-0-1": Lost(137, "j-r1-node-0-1 was killed: OOMKilled")}
    found = ended(run, queue, 137)
    assert (found["exit_code"], found["reason"]) == (137, "j-r1-node-0-1 was killed: OOMKilled")


def test_a_pod_that_was_deleted_since_the_run_was_over_is_not_taken_for_lost(run: Known) -> None:
    first = {"kind": "node", "rank": None, "host": "", "exit_code": 69, "evidence": "a pod was killed", "step": None}
    decided = {"event": "decided", "attempt": 2, "again": False, "reason": "all 2 restarts are used", **first}
    queue = Cluster(record(0, 1, decided, result("stopped")), lost={"j-r1-node-0-0": Lost(69, "pod 0 ended with 69")})
    found = ended(run, queue, 1)
    assert (found["exit_code"], found["reason"]) == (69, "a pod was killed; not started again: all 2 restarts are used")


def test_the_rank_whose_error_record_is_the_earliest_is_blamed_not_the_one_that_died_first(run: Known) -> None:
    lost = "RuntimeError: Connection closed by peer [10.0.0.1]"
    why = {"rank": 1, "time_unix_s": 1.5, "traceback": "ValueError: no", "exit_code": 1}
    files = {"errors/rank-1.json": why, "../outside.json": 1, "job.json": {}, "nodes/n1.jsonl": [{"a": 1}, {"a": 2}]}
    late = {"ended_by_us": True}
    queue = Cluster(
        from_rank(0, 1, "Traceback (most recent call last):"),
        from_rank(0, 2, lost),
        record(
            0, 3, {"event": "started", "attempt": 0, "pids": {}, "time_unix_s": 1.0}, died(0, 1, 1.7), result("failed")
        ),
        record(1, 4, died(1, -15, 9.0, **late), result("failed"), files=files),
    )
    found = ended(run, queue, 1)
    assert (found["state"], found["exit_code"], found["reason"]) == (
        "failed",
        1,
        "rank 1 on j-r1-node-0-1 failed first",
    )
    assert found["first_failure"]["traceback"] == "ValueError: no"
    assert text_of(run, "nodes/n1.jsonl") == '{"a": 1}\n{"a": 2}\n'
    assert not Path(run.run_dir, "../outside.json").exists()
    assert json.loads(text_of(run, "job.json"))["name"] == "j"


def test_a_pod_that_was_evicted_is_why_the_run_ended_whatever_its_ranks_said_last(run: Known) -> None:
    why = "pod j-r1-node-0-1-x on node gpu7: it was evicted"
    queue = Cluster(
        record(1, 1, died(1, -15, 1.0, ended_by_us=True), result("stopped")),
        lost={"j-r1-node-0-1": Lost(69, why, disrupted=True)},
    )
    found = ended(run, queue, 69)
    assert (found["exit_code"], found["first_failure"]) == (69, None)
    assert found["reason"] == f"{why}; launch again to go on from the newest checkpoint"


def test_a_traceback_of_a_later_attempt_is_found_in_the_one_log_that_a_rank_has_here(run: Known) -> None:
    second = {"event": "started", "attempt": 1, "pids": {}, "time_unix_s": 5.0}
    queue = Cluster(
        from_rank(0, 1, "Traceback (most recent call last):"),
        from_rank(0, 2, "KeyError: 'late'"),
        record(0, 3, second, died(0, 1, 6.0, attempt=1), result("failed")),
        record(1, 4, second, died(1, -15, 7.0, attempt=1, ended_by_us=True), result("failed")),
    )
    found = ended(run, queue, 1)
    assert (found["attempts"], found["first_failure"]["traceback"][-16:]) == (2, "KeyError: 'late'")


def test_a_container_that_was_killed_says_so_and_one_of_which_nothing_is_known_does_too(run: Known) -> None:
    why = "pod j-r1-node-0-1-x on node gpu7 ended with code 137 (OOMKilled)"
    found = ended(run, Cluster(lost={"j-r1-node-0-1": Lost(137, why)}), 1)
    assert (found["exit_code"], found["reason"].partition(";")[0]) == (137, why)
    Path(run.run_dir, "exit.json").unlink()
    found = ended(run, Cluster(), 1, "Failed: DeadlineExceeded")
    assert (found["exit_code"], "ended without a word; Failed: DeadlineExceeded" in found["reason"]) == (1, True)


def test_a_run_that_completed_has_succeeded_though_its_lines_are_gone_and_its_end_is_written_once(run: Known) -> None:
    queue = Cluster()
    queue.answers = False
    assert (ended(run, queue, 0, "Completed")["state"], text_of(run, "launcher.log")) == (
        "succeeded",
        f"run directory: {run.run_dir}\n",
    )
    assert ended(run, Cluster(), 1)["state"] == "succeeded"


def test_a_run_that_ended_while_it_was_cancelled_keeps_its_end(run: Known) -> None:
    record = Path(run.run_dir, "exit.json")
    record.write_text('{"state": "succeeded"}')
    note_cancelled(run)
    assert json.loads(record.read_text()) == {"state": "succeeded"}
    record.unlink()
    note_cancelled(run)
    assert json.loads(record.read_text())["state"] == "cancelled"
