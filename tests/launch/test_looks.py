"""A run in a queue is over by its record at once, and otherwise only if it stays away; then no secret stays."""

import json
from pathlib import Path

import pytest

from meshwright.clusters.files import step_folder
from meshwright.launch.looks import Looks
from meshwright.launch.runs import Known
from tests.clusters.test_slurm_commands import answering, slurm

__all__ = ["slurm"]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshwright.launch.looks._ASK_S", 0.0)


def told(folder: Path, *states: str) -> Known:
    """A run with secrets of which Slurm tells these states, one after the other; the last stays."""
    script = f"states = {[*states]!r}\nnumber = open(home + '/asked').read().count('squeue')\n"
    answering(folder, squeue=script + "print(states[min(number, len(states)) - 1])")
    step_folder(folder).mkdir(parents=True)
    for path in secrets(folder):
        path.write_text("{}")
    return Known("r1", "j", "slurm", str(folder), 1.0, job="42")


def secrets(folder: Path) -> list[Path]:
    return [folder / "private/secrets.json", step_folder(folder) / "start.json"]


def stay(folder: Path) -> list[bool]:
    return [path.exists() for path in secrets(folder)]


def test_a_job_that_is_nowhere_for_a_moment_is_not_over_and_keeps_its_secrets(slurm: Path) -> None:
    looks, seen = Looks(told(slurm, "RUNNING", "FAILED", "FAILED", "PENDING", "FAILED", "RUNNING")), []
    for _ in range(6):
        now = looks.news()
        assert now is not None
        seen.append((now.state, looks.over))
    assert [state for state, _ in seen] == ["running", "lost", "lost", "pending", "lost", "running"]
    assert not any(over for _, over in seen)
    assert stay(slurm) == [True, True]


def test_a_job_that_stays_away_is_over_and_leaves_no_secrets(slurm: Path) -> None:
    looks = Looks(told(slurm, "FAILED"))
    assert looks.wait().state == "lost"
    assert looks.over
    assert stay(slurm) == [False, False]


def test_a_record_is_believed_at_once(slurm: Path) -> None:
    known = told(slurm, "RUNNING")
    looks = Looks(known)
    assert looks.news() is not None
    (slurm / "exit.json").write_text(json.dumps({"state": "failed", "reason": "", "exit_code": 7}))
    now = looks.news()
    assert now is not None
    assert (now.exit_code, looks.over) == (7, True)


def test_slurm_is_not_asked_more_often_than_it_should_be(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshwright.launch.looks._ASK_S", 60.0)
    looks = Looks(told(slurm, "RUNNING"))
    assert looks.news() is not None
    assert looks.news() is None
