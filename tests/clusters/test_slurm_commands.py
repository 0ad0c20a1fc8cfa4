"""What is asked of Slurm about a job: that it starts again soon, on other nodes; and whether Slurm is there at all."""

import os
import sys
import time
from pathlib import Path

import pytest

from meshwright.clusters.slurm import SlurmQueue
from meshwright.clusters.slurm_commands import controller_answers, hasten, requeue, times_queued_again


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands that write down how they were called, and then do what a test wrote for them."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    answering(tmp_path, scontrol="", squeue="")
    return tmp_path


def answering(folder: Path, **scripts: str) -> None:
    for name, script in scripts.items():
        kept = f"import os, sys, time\nhome = {str(folder)!r}\n"
        kept += f"open(home + '/asked', 'a').write(' '.join(['{name}', *sys.argv[1:]]) + '\\n')\n"
        (folder / name).write_text(f"#!{sys.executable} -IS\n{kept}{script}\n")
        (folder / name).chmod(0o755)


def asked(folder: Path) -> list[str]:
    return (folder / "asked").read_text().splitlines()


def test_a_job_that_is_queued_again_starts_soon_and_without_nodes_that_are_left_out(slurm: Path) -> None:
    assert requeue("42", ["n7", "n1"])
    assert asked(slurm) == ["scontrol requeue 42", "scontrol update JobId=42 StartTime=now+15 ExcNodeList=n7,n1"]


def test_a_job_that_slurm_does_not_queue_again_is_not_touched(slurm: Path) -> None:
    answering(slurm, scontrol="sys.exit(1)")
    assert not requeue("42")
    assert asked(slurm) == ["scontrol requeue 42"]


def test_slurm_is_asked_again_until_the_job_is_in_its_queue(slurm: Path) -> None:
    answering(slurm, scontrol="sys.exit(len(open(home + '/asked').readlines()) < 3)")
    assert hasten("42")
    assert asked(slurm) == ["scontrol update JobId=42 StartTime=now+15"] * 3


@pytest.mark.parametrize(
    ("waiting", "restarts", "hastened"),
    [("PENDING|BeginTime", 1, True), ("PENDING|BeginTime", 0, False), ("PENDING|Resources", 1, False)],
)
def test_only_a_job_that_ran_before_and_waits_for_its_time_is_hastened(
    slurm: Path, waiting: str, restarts: int, hastened: bool
) -> None:
    answering(slurm, squeue=f"print('{waiting}')", scontrol=f"print('JobId=42 Restarts={restarts} Requeue=1')")
    assert SlurmQueue().start_again_soon("42") == hastened
    assert ("scontrol update JobId=42 StartTime=now+15" in asked(slurm)) == hastened


@pytest.mark.parametrize(
    ("script", "answers"),
    [
        ("print('Slurmctld(primary) at ctl is UP')", True),
        ("print('Slurmctld(primary) at ctl is DOWN'); sys.exit(1)", False),
        ("time.sleep(60)", False),
    ],
)
def test_a_controller_that_does_not_answer_soon_is_not_there(slurm: Path, script: str, answers: bool) -> None:
    answering(slurm, scontrol=script)
    began_s = time.monotonic()
    assert controller_answers() == answers
    assert time.monotonic() - began_s < 30


def test_how_often_a_job_was_queued_again_is_unknown_where_slurm_does_not_say(slurm: Path) -> None:
    answering(slurm, scontrol="sys.exit(1)")
    assert times_queued_again("42") is None
    answering(slurm, scontrol="print('JobId=42 Restarts=3')")
    assert times_queued_again("42") == 3
