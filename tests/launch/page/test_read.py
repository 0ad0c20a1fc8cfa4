"""A run is read from whatever its directory holds: complete, unfinished, torn, or nothing at all."""

import json
from pathlib import Path

import pytest

from meshwright.launch.page.read import Mark, points, read_view
from tests.launch.page.made import ID, START_S, record, write, write_run

CAUSE = "rank 5 on node1 was killed by SIGKILL"


def test_everything_of_a_run_is_found(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "r", state="succeeded", reason="")
    view = read_view(run_dir)
    assert (view.name, view.run_id, view.state, view.steps) == ("llama", ID, "succeeded", 250)
    assert view.facts == ("dp=2 x tp=2", "2 nodes", "on slurm")
    assert (view.started_unix_s, view.ended_unix_s) == (START_S - 20, START_S + 340)
    assert points(view.records, "loss")[-1][0] == 200
    assert points(view.records, "experts.worst_expert_ratio")[0] == (1, 1.3)


def test_an_empty_directory_is_a_run_of_which_nothing_is_known(tmp_path: Path) -> None:
    view = read_view(tmp_path / "never")
    assert (view.name, view.state, view.records, view.marks, view.ended_unix_s) == ("never", "unknown", (), (), None)


def test_without_an_exit_record_the_state_is_what_the_caller_knows(tmp_path: Path) -> None:
    view = read_view(write_run(tmp_path / "r"), "running")
    assert (view.state, view.ended_unix_s) == ("running", START_S + 201)


def test_a_torn_line_and_lines_that_are_no_records_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(
        b'[1]\nnull\n{"step":1,"loss":NaN}\n\xff\xfe\n{"step":2,"loss":3}\n{"step":3,"lo'
    )
    losses = points(read_view(tmp_path).records, "loss")
    assert [step for step, _ in losses] == [1, 2]


@pytest.mark.parametrize("name", ["job.json", "exit.json", "plan.json", "launch.json"])
@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"parallel":3,"train":[],"nodes":{},"restarts":7,"first_failure":""}']
)
def test_a_broken_file_costs_only_what_it_would_have_told(tmp_path: Path, name: str, text: str) -> None:
    run_dir = write_run(tmp_path / "r", state="failed", reason="why", first_failure={"traceback": 3})
    (run_dir / name).write_text(text)
    assert len(read_view(run_dir).records) == 203


def test_a_restart_has_the_launchers_cause_and_the_step_that_it_went_on_from(tmp_path: Path) -> None:
    restarts = [{"next_attempt": 1, "time_unix_s": START_S + 99.5, "cause": CAUSE}]
    view = read_view(write_run(tmp_path / "r", state="succeeded", restarts=restarts))
    assert view.marks == (Mark(100, START_S + 99.5, f"attempt 1: {CAUSE}"),)


def test_a_restart_that_left_no_record_stands_where_the_time_says(tmp_path: Path) -> None:
    restarts = [
        {"next_attempt": 1, "time_unix_s": START_S + 99.5, "cause": CAUSE},
        {"next_attempt": 2, "time_unix_s": START_S + 150.5, "cause": ""},
    ]
    view = read_view(write_run(tmp_path / "r", state="succeeded", restarts=restarts))
    assert [mark.step for mark in view.marks] == [100, 150]
    assert view.marks[1].text == "attempt 2: cause unknown"


def test_a_launch_that_went_on_with_an_older_run_is_marked_too(tmp_path: Path) -> None:
    run_dir = write_run(
        tmp_path / "r", state="succeeded", restarts=[{"next_attempt": 1, "time_unix_s": 1.0, "cause": CAUSE}]
    )
    with (run_dir / "metrics.jsonl").open("a") as file:
        event = {"event": "restart", "step": 150, "run_id": "other", "attempt": 0, "time_unix_s": START_S + 151}
        file.write(json.dumps(event) + "\n")
    assert [mark.text for mark in read_view(run_dir).marks] == [f"attempt 1: {CAUSE}", "launched again as other"]


def test_only_the_end_of_a_long_traceback_is_kept(tmp_path: Path) -> None:
    text = "\n".join(f"line {number}" for number in range(100))
    write(tmp_path / "exit.json", {"state": "failed", "first_failure": {"traceback": text}})
    lines = read_view(tmp_path).failure.splitlines()
    assert (len(lines), lines[-1]) == (30, "line 99")


def test_values_that_are_no_numbers_are_no_points() -> None:
    rows = [record(1), record(2, loss=None), record(3, loss="x"), record(4, loss=True), {"loss": 1.0}, {"step": "5"}]
    assert [step for step, _ in points(rows, "loss")] == [1]
