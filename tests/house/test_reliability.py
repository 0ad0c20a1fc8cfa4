"""The table of faults is what was measured, no more and no less."""

import json
from pathlib import Path

import pytest

from tests.lab.faults import ABSENT, BOTH, FAULTS
from tests.lab.kept import drop, still_due
from tests.lab.reliability_page import PAGE, RESULTS, is_good, page
from tests.lab.trial import lost_steps


def test_the_page_is_made_of_the_trials_that_were_run() -> None:
    assert PAGE.read_text() == page(RESULTS), "python -m tests.lab.reliability --write"


def test_every_trial_was_as_it_must_be() -> None:
    trials = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    bad = [each for each in trials if not is_good(each | {"detected_s": None})]  # the page says how late some were
    assert trials
    assert bad == []


def test_every_fault_is_tried_on_every_kind_of_cluster_or_cannot_be_there() -> None:
    tried = {(fault.name, kind) for fault in FAULTS for kind in fault.kinds}
    assert tried & set(ABSENT) == set()
    assert tried | set(ABSENT) == {(fault.name, kind) for fault in FAULTS for kind in BOTH}
    done = {(each["fault"], each["kind"]) for each in map(json.loads, RESULTS.read_text().splitlines())}
    assert done == tried


@pytest.mark.parametrize(
    "wrong",
    [{"detected_s": 2.1}, {"left": 1}, {"lost_steps": 6}, {"same": False}, {"named": False}, {"note": "it did not"}],
    ids=str,
)
def test_a_trial_that_was_not_as_it_must_be_is_counted_and_not_good(tmp_path: Path, wrong: dict[str, object]) -> None:
    trial = {"fault": "rank crashes", "kind": "ssh", "detected_s": 0.4, "limit_s": 2.0, "named": True, "version": "abc"}
    trial |= {"lost_steps": 0, "left": 0, "same": True, "note": "", "load": 3.2}
    (tmp_path / "results.jsonl").write_text(f"{json.dumps(trial)}\n{json.dumps(trial | wrong | {'version': ''})}\n")
    made = page(tmp_path / "results.jsonl")
    assert "| rank crashes | ssh | 1 of 2 |" in made
    assert "Trials by the commit that was tried: abc (1), an earlier one (1)." in made


def test_what_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    names = [fault.name for fault in FAULTS if "slurm" in fault.kinds]
    results = tmp_path / "results.jsonl"
    assert [fault.name for fault in still_due("slurm", 2, only="", results=results)] == names * 2
    lines = [
        {"fault": name, "kind": kind} for kind, name in (("ssh", names[1]), *(("slurm", each) for each in names[:3]))
    ]
    results.write_text("".join(f"{json.dumps(each)}\n" for each in lines))
    assert [fault.name for fault in still_due("slurm", 2, only="", results=results)] == names[3:] + names
    assert [fault.name for fault in still_due("slurm", 1, only="hangs", results=results)] == ["rank hangs"]
    results.write_text("".join(f'{{"fault": "{name}", "kind": "slurm"}}\n' for name in names))
    assert still_due("slurm", 1, only="", results=results) == []


def test_trials_of_what_is_not_tried_any_more_can_be_forgotten(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    tried = [
        ("rank hangs", "ssh", "a"),
        ("rank hangs", "slurm", "a"),
        ("disk is slow", "ssh", "a"),
        ("rank hangs", "ssh", "b"),
    ]
    lines = [{"fault": fault, "kind": kind, "version": version} for fault, kind, version in tried]
    lines.append({"fault": "rank hangs", "kind": "ssh"})
    results.write_text("".join(f"{json.dumps(each)}\n" for each in lines))
    assert drop(["a"], kinds=["ssh"], only="hangs", results=results) == 1
    assert [json.loads(line) for line in results.read_text().splitlines()] == lines[1:]
    assert drop(["", "c"], kinds=BOTH, only="", results=results) == 1
    assert [json.loads(line) for line in results.read_text().splitlines()] == lines[1:-1]


def test_ranks_that_began_anew_lost_every_saved_step() -> None:
    assert lost_steps([6, 12], [6], again=True) == 6
    assert lost_steps([6, 12], [], again=True) == 12
    assert lost_steps([6, 12], [], again=False) == 0
