"""Nodes whose ranks fail take one decision together, also where they know different things or one keeps silent."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from torch.distributed import FileStore

from meshwright.clusters.base import Limits, Program, StartPlan, StartRequest
from meshwright.clusters.deaths import Death
from meshwright.clusters.failure import Failure
from meshwright.clusters.local import LocalCluster, Machine, plan_local
from meshwright.clusters.retry import Decision, RetryPolicy
from meshwright.clusters.rounds import Rounds, _Talk
from meshwright.parallel.keyed import Keyed
from tests.launch.own import own

KEY = bytes(range(32))
QUICK = RetryPolicy(initial_s=0.2, jitter=0.0)
WORDS = "import os, signal, sys, time\nrank, attempt = os.environ['RANK'], int(os.environ['MESHWRIGHT_ATTEMPT'])\n"


def plan(folder: Path, script: str = "", *, nodes: int = 2, restarts: int = 3, retry: RetryPolicy = QUICK) -> StartPlan:
    for name in ("logs", "private", "ranks", "errors"):
        (folder / name).mkdir()
    request = StartRequest(
        name="j",
        run_id=own(f"rounds-{folder.name}"),
        run_dir=folder,
        program=Program((sys.executable, "-c", WORDS + script), folder),
        num_nodes=nodes,
        limits=Limits(max_restarts=restarts, shutdown_grace_s=0.5, retry=retry),
    )
    return plan_local(request, Machine("box", 2))


def nodes_of(folder: Path, **keys: Any) -> list[Rounds]:
    """The two nodes of a run that share a store."""
    found = plan(folder, **keys)
    made = [Rounds(json.loads(json.dumps(asdict(found))), node, key=KEY) for node in (0, 1)]
    for each in made:
        each.begin(FileStore(str(folder / "store"), -1), 0)
    return made


def together(*calls: Callable[[], Decision]) -> list[Decision]:
    found: dict[int, Decision] = {}

    def run(index: int, call: Callable[[], Decision]) -> None:
        found[index] = call()

    threads = [Thread(target=run, args=each) for each in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return [found[index] for index in range(len(calls))]


def test_nodes_hear_of_a_failure_and_take_the_decision_of_the_rank_that_failed_first(tmp_path: Path) -> None:
    first, second = nodes_of(tmp_path, retry=RetryPolicy(retry_on=("signal",)))
    assert not second.called
    first.call()
    assert second.called
    late, early = [Death(0, 3, 2.0, False)], [Death(1, -9, 1.0, False)]
    found = together(lambda: first.decide(late), lambda: second.decide(early))
    assert found[0] == found[1], "an exit would not be retried, the signal before it is"
    assert (found[0].again, found[0].failure.kind, found[0].failure.node) == (True, "signal", "node1")
    assert first.history == second.history


def test_a_node_whose_ranks_did_not_fail_still_tells_how_far_they_came(tmp_path: Path) -> None:
    first, second = nodes_of(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 8}')
    found = together(lambda: first.decide([Death(0, 3, 2.0, False)]), lambda: second.decide([Death(1, -15, 3.0, True)]))
    assert found[0] == found[1]
    assert (found[0].failure.rank, found[0].step) == (0, 8)


def test_a_silent_node_is_not_waited_for_for_ever_and_takes_what_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshwright.clusters.rounds._LATE_S", 0.1)
    first, second = nodes_of(tmp_path, retry=RetryPolicy(retry_on=("exit",)))
    alone = first.decide([Death(0, 3, 2.0, False)])
    assert second.decide([Death(1, -9, 1.0, False)]) == alone


def test_a_stranger_who_writes_into_the_store_changes_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = nodes_of(tmp_path, retry=RetryPolicy(retry_on=("signal",)))
    store = FileStore(str(tmp_path / "store"), -1)
    end = Decision(False, "", 0.0, 0, Failure("node1", "config", 64))
    other = Keyed(KEY, f"{first._plan['run_id']}, attempt 7")
    store.set("meshwright/failed", "1")
    store.set("meshwright/failure/0", json.dumps(asdict(end.failure)))
    store.set("meshwright/failure/1", other.signed("meshwright/failure/1", json.dumps(asdict(end.failure))))
    store.set("meshwright/decided", json.dumps(end.as_saved()))
    assert not first.called
    assert not second.called
    first.call()
    assert second.called
    late, early = [Death(0, 3, 2.0, False)], [Death(1, -9, 1.0, False)]
    found = together(lambda: first.decide(late), lambda: second.decide(early))
    assert found[0] == found[1]
    assert (found[0].again, found[0].failure.kind, found[0].failure.node) == (True, "signal", "node1")
    said = capfd.readouterr().err
    for name in ("meshwright/failed", "meshwright/decided"):
        assert 1 <= said.count(f"{name} in the store was not written by this run") <= 2, "once on each node"


def test_the_first_decision_of_a_node_stands_whatever_a_stranger_wrote_before(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path / "store"), -1)
    store.set("decided", "stranger")
    one, other = (_Talk(store, Keyed(KEY, "r1, attempt 0")) for _ in range(2))
    assert one.settle("decided", "first") == "first"
    assert other.settle("decided", "second") == "first"
    assert other.read("decided") == "first"


def test_ranks_do_not_start_again_beside_a_node_whose_ranks_have_ended(tmp_path: Path) -> None:
    first, second = nodes_of(tmp_path)
    second.leave()
    assert not first.decide([Death(0, 3, 2.0, False)]).again


def test_what_a_rank_was_last_at_and_what_the_kernel_says_of_its_death_is_told(tmp_path: Path) -> None:
    found = Rounds(json.loads(json.dumps(asdict(plan(tmp_path, nodes=1)))), 0)
    found.begin(None, 0)
    (tmp_path / "ranks/0").mkdir()
    words = {"life": "0", "words": "all_reduce over dp (number 41)", "step": 7}
    (tmp_path / "ranks/0/progress.json").write_text(json.dumps(words))
    told = found.decide([Death(0, -9, 1.0, False, "the kernel killed it for want of memory")]).failure
    assert told.kind == "signal"
    assert told.evidence.endswith(
        "; the kernel killed it for want of memory; last: all_reduce over dp (number 41) in step 7"
    )


def test_a_node_that_is_taken_away_starts_nothing_again(tmp_path: Path) -> None:
    first, second = nodes_of(tmp_path)
    found = together(
        lambda: first.decide([Death(0, 75, 2.0, False)], leaving=True),
        lambda: second.decide([Death(1, -15, 3.0, True)]),
    )
    assert [each.again for each in found] == [False, False]


def test_nodes_without_a_store_decide_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshwright.clusters.rounds._LATE_S", 0.1)
    found = Rounds(json.loads(json.dumps(asdict(plan(tmp_path)))), 0)
    found.begin(None, 1)
    assert found.decide([Death(0, 3, 2.0, False)]).attempt == 1
    assert not found.called


def followed(started: StartPlan) -> list[dict[str, Any]]:
    """Events of a really started run, with nobody telling its agents anything."""
    handle = LocalCluster().start(started, {})
    events: list[dict[str, Any]] = []
    end_s = time.monotonic() + 60
    try:
        while not handle.done and time.monotonic() < end_s:
            events += handle.poll(1.0)
    finally:
        handle.kill()
    return events


def decided(events: list[dict[str, Any]], node: str) -> list[tuple[str, bool]]:
    return [(each["kind"], each["again"]) for each in events if each["event"] == "decided" and each["node"] == node]


@pytest.mark.slow
def test_all_nodes_follow_the_one_whose_rank_was_killed_then_the_one_that_failed_for_good(tmp_path: Path) -> None:
    script = (
        "if rank == '1' and attempt == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "if rank == '0' and attempt == 1: sys.exit(64)\n"
        "time.sleep(60)\n"
    )
    keyed = "assert len(os.environ['MESHWRIGHT_BOARD_KEY']) == 64, 'ranks have a key'\n"
    events = followed(plan(tmp_path, keyed + script))
    expected = [("signal", True), ("config", False)]
    assert decided(events, "node0") == decided(events, "node1") == expected
    assert [each["event"] for each in events].count("started") == 4
    results = {each["node"]: each["state"] for each in events if each["event"] == "result"}
    assert results == {"node0": "failed", "node1": "stopped"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "retry", "expected"),
    [
        ("import no_such_module", QUICK, [("import_error", False)]),
        ("sys.exit(9)", RetryPolicy(0.1, no_retry_on=("exit:9",)), [("exit", False)]),
        ("os.kill(os.getpid(), signal.SIGKILL if attempt == 0 else signal.SIGCONT)", QUICK, [("signal", True)]),
        ("sys.exit(5)", RetryPolicy(0.1, stop_after_no_progress=2), [("exit", True), ("exit", True), ("exit", False)]),
        (
            "open(os.environ['MESHWRIGHT_RUN_DIR'] + '/metrics.jsonl', 'a').write('{\"step\": %d}\\n' % attempt)\n"
            "sys.exit(5 if attempt < 3 else 0)",
            RetryPolicy(0.1, stop_after_no_progress=1),
            [("exit", True)] * 3,
        ),
    ],
    ids=["import_error", "no_retry_on", "signal", "no progress", "progress"],
)
def test_ranks_start_again_as_the_policy_says(
    tmp_path: Path, script: str, retry: RetryPolicy, expected: list[tuple[str, bool]]
) -> None:
    events = followed(plan(tmp_path, script, nodes=1, restarts=4, retry=retry))
    assert decided(events, "box") == expected
    result = next(each for each in events if each["event"] == "result")
    assert result["state"] == ("succeeded" if expected[-1][1] else "failed")


@pytest.mark.slow
def test_ranks_start_after_the_wait_and_not_before(tmp_path: Path) -> None:
    started = plan(tmp_path, "sys.exit(7 if attempt < 2 else 0)", nodes=1, retry=RetryPolicy(0.8, 2.0, jitter=0.0))
    events = followed(started)
    begun = [each["time_unix_s"] for each in events if each["event"] == "started"]
    ended = [each["time_unix_s"] for each in events if each["event"] == "exit"]
    waits = [after - before for after, before in zip(begun[1:], ended, strict=False)]
    assert len(waits) == 2
    assert waits[0] >= 0.8
    assert waits[1] >= 1.6
    assert [each["wait_s"] for each in events if each["event"] == "decided"] == [0.8, 1.6]
