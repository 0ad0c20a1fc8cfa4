"""Runs are found again from any terminal: listed, looked at, ended; what they left on disk outlives their launcher."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from meshwright.launch.runs import Known, RunError, all_runs, cancel, find_run, remember, standing
from tests.launch.aside import SLEEP, check_left_alone
from tests.launch.own import own
from tests.launch.pretend_slurm import write_commands
from tests.launch.waiting import kill_all

pytestmark = pytest.mark.usefixtures("own_state")


def known(folder: Path, run_id: str = "r1", **fields: object) -> Known:
    run_dir = folder / "runs/j" / run_id
    run_dir.mkdir(parents=True)
    found = Known(run_id, "j", "local", str(run_dir), 1.0)
    return Known(**{**found.__dict__, **fields})  # type: ignore[arg-type]


def test_a_launch_that_was_written_down_is_found_by_id_and_by_directory(tmp_path: Path) -> None:
    made = known(tmp_path, shown=(0, 2)).of_this_process()
    remember(made)
    assert find_run("r1") == find_run(made.run_dir) == made
    assert all_runs() == [made]
    with pytest.raises(RunError, match="no run 'r2' is known; choose from: r1"):
        find_run("r2")


def test_two_runs_of_one_id_are_told_apart_by_their_directories(tmp_path: Path) -> None:
    for name in ("a", "b"):
        remember(known(tmp_path / name))
    with pytest.raises(RunError, match=r"several runs have this id; name the run directory: .*/a/.*/b/"):
        find_run("r1")
    assert find_run(str(tmp_path / "a/runs/j/r1")).run_dir == str(tmp_path / "a/runs/j/r1")


def test_a_run_that_goes_on_without_a_node_says_which_and_why(tmp_path: Path) -> None:
    made = known(tmp_path).of_this_process()
    told = [{"node": "h2", "why": "the connection was lost", "attempt": 0, "step": 4, "time_unix_s": 1.0}]
    Path(made.run_dir, "excluded.json").write_text(json.dumps(told))
    assert standing(made).detail == f"launcher {os.getpid()}; goes on without h2 (the connection was lost)"


def test_a_run_stands_as_its_record_says_or_its_launcher(tmp_path: Path) -> None:
    made = known(tmp_path).of_this_process()
    remember(made)
    assert standing(made).state == "running"
    other = Known(**{**made.__dict__, "began": "1"})
    assert (standing(other).state, standing(other).exit_code) == ("lost", 69), "the number was given again"
    elsewhere = Known(**{**made.__dict__, "host": "login7"})
    assert standing(elsewhere).detail == "its launcher runs on login7"
    with pytest.raises(RunError, match="login7; cancel it there"):
        cancel(elsewhere)
    record = {"state": "failed", "exit_code": 7, "reason": "rank 1 failed"}
    (tmp_path / "runs/j/r1/exit.json").write_text(json.dumps(record))
    assert (standing(made).state, standing(made).exit_code, standing(made).over) == ("failed", 7, True)
    with pytest.raises(RunError, match="run r1 is over: failed"):
        cancel(made)


def test_a_directory_that_is_gone_is_forgotten(tmp_path: Path) -> None:
    made = known(tmp_path)
    remember(made)
    for path in sorted(Path(made.run_dir).rglob("*"), reverse=True):
        path.unlink()
    Path(made.run_dir).rmdir()
    assert all_runs() == []
    assert list((tmp_path / "state/meshwright/runs").iterdir()) == []


@pytest.mark.parametrize(
    ("standings", "kept"),
    [({"": "PENDING"}, []), ({"": "RUNNING"}, ["began"]), ({"_0": "RUNNING", "_1": "PENDING"}, ["began"])],
)
def test_cancel_takes_the_secrets_away_that_no_start_of_a_run_will(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, standings: dict[str, str], kept: list[str]
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    write_commands(tmp_path / "bin")
    ranks = subprocess.Popen(["sleep", "60"])
    for task, state in standings.items():
        (tmp_path / f"bin/state{task}").write_text(state)
        (tmp_path / f"bin/batch{task}").write_text(str(ranks.pid))
    runs = [known(tmp_path, name, cluster="slurm", job="42") for name in ("began", "waits")]
    for run in runs:
        Path(run.run_dir, "private").mkdir()
        Path(run.run_dir, "private/secrets.json").touch()
    Path(runs[0].run_dir, "launcher.log").touch()
    try:
        whole = replace(runs[0], run_dir=str(tmp_path), runs=tuple(run.run_dir for run in runs))
        assert cancel(whole if len(standings) > 1 else runs[0]) == "job 42 was cancelled"
        assert ranks.wait(20) == -15 if "began" in kept else ranks.poll() is None
    finally:
        kill_all([ranks.pid])
        ranks.wait()
    left = [run.run_id for run in runs if Path(run.run_dir, "private/secrets.json").exists()]
    assert left == (kept if len(standings) > 1 else [*kept, "waits"])


@pytest.mark.slow
def test_a_run_is_left_alone_listed_looked_at_and_ended(tmp_path: Path) -> None:
    job = {"name": "j", "command": ["python", "-c", SLEEP], "nproc_per_node": 2, "failure": {"shutdown_grace": "2s"}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    check_left_alone(tmp_path / "runs/j" / own("detached"), os.environ, "job.yaml", ranks=2)
