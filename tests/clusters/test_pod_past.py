"""What a run in pods had behind it is the same for all of them, whatever each could still write down."""

from pathlib import Path
from typing import Any

from meshwright.clusters.failure import Failure
from meshwright.clusters.pod_past import Journal
from meshwright.clusters.retry import Decision

FAILURE = Failure("node1", "preempt", 75, rank=1, evidence="it left", step=8)


def journal(folder: Path, node: int, times: int) -> Journal:
    (folder / "private").mkdir(exist_ok=True)
    return Journal(folder, node, times)


def decided(attempt: int, again: bool) -> dict[str, Any]:
    return {"event": "decided", **Decision(again, "why", 0.0, attempt, FAILURE, 8).as_dict()}


def started(attempt: int) -> dict[str, Any]:
    return {"event": "started", "attempt": attempt, "pids": {}, "time_unix_s": 1.0 + attempt}


def test_attempts_of_all_starts_count_and_one_that_nobody_explained_is_one_too(tmp_path: Path) -> None:
    first = journal(tmp_path, 0, 0)
    for event in (started(0), decided(0, True), started(1)):
        first.keep(event)
    other = journal(tmp_path, 1, 0)
    for event in (started(0), decided(0, True), started(1), decided(1, True), decided(1, False)):
        other.keep(event)
    for node in (0, 1):
        past = journal(tmp_path, node, 1).past()
        assert [(each.attempt, each.again, each.step, each.failure.kind) for each in past] == [
            (0, True, 8, "preempt"),
            (1, True, 8, "preempt"),
        ]
    journal(tmp_path, 0, 1).keep(started(2))  # and then all were killed
    past = journal(tmp_path, 1, 2).past()
    assert [(each.attempt, each.failure.kind) for each in past][2:] == [(2, "node")]
    assert (past[2].reason, past[2].failure.evidence[:17]) == ("the JobSet started its pods again", "a pod was killed,")


def test_what_pods_of_this_start_write_is_not_behind_them(tmp_path: Path) -> None:
    journal(tmp_path, 0, 0).keep(started(0))
    journal(tmp_path, 0, 1).keep(started(1))
    assert len(journal(tmp_path, 1, 1).past()) == 1


def test_without_a_claim_only_the_number_of_starts_is_known(tmp_path: Path) -> None:
    past = journal(tmp_path, 0, 2).past()
    assert [(each.attempt, each.again, each.failure.exit_code) for each in past] == [(0, True, 69), (1, True, 69)]
    told = journal(tmp_path, 0, 2).told(past)
    assert [(each["event"], each["attempt"]) for each in told] == [("decided", 0), ("decided", 1)]


def test_a_pod_tells_its_own_events_again_and_survives_a_torn_line(tmp_path: Path) -> None:
    found = journal(tmp_path, 0, 0)
    for event in (started(0), decided(0, False), decided(0, True)):
        found.keep(event)
    with (tmp_path / "private/events-0.jsonl").open("a") as file:
        file.write('{"times": 0, "to')
    found.keep(started(1))
    later = journal(tmp_path, 0, 1)
    told = later.told(later.past())
    assert [(each["event"], each.get("again")) for each in told] == [
        ("started", None),
        ("started", None),
        ("decided", True),
        ("decided", True),
    ]
