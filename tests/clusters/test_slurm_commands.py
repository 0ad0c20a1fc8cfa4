"""What is asked of Slurm about a job: that it starts again soon, on other nodes; and whether Slurm is there at all."""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.clusters.contract import Job
from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.slurm import SlurmQueue, plan_slurm
from meshwright.clusters.slurm_commands import (
    controller_answers,
    hasten,
    kill_wait_s,
    node_names,
    requeue,
    times_queued_again,
)
from tests.clusters.test_slurm import OPTIONS, REQUEST


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


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands have no time."""
    for name in ("_COMMAND_TIMEOUT_S", "_SHOW_S", "_UPDATE_S", "_FIND_S"):
        monkeypatch.setattr(f"meshwright.clusters.slurm_commands.{name}", 0.5)
    monkeypatch.setattr("meshwright.clusters.slurm._STATUS_S", 0.5)


STALLS = "time.sleep(60)"


@pytest.mark.usefixtures("hasty")
def test_a_command_that_stalls_is_an_answer_and_no_bug(slurm: Path) -> None:
    answering(slurm, squeue=STALLS, scontrol=STALLS, scancel=STALLS)
    assert SlurmQueue().status("42") == Job("unknown", "`squeue` did not answer in 0.5 s; is Slurm's controller up?")
    assert not SlurmQueue().start_again_soon("42")
    assert not hasten("42", patience_s=0.0)
    assert times_queued_again("42") is None
    assert kill_wait_s() == 30.0
    for ask in (lambda: SlurmQueue().cancel("42"), lambda: node_names("n[1-2]")):
        with pytest.raises(UnavailableError, match=r"did not answer in 0\.5 s"):
            ask()


def test_a_machine_without_slurm_does_not_know_how_a_job_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = SlurmQueue().status("42")
    assert found.state == "unknown"
    assert "there is no `squeue` on PATH" in found.detail
    assert not SlurmQueue().start_again_soon("42")


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("waits", [True, False])
def test_a_requeue_that_stalls_is_one_if_the_job_waits_after_it(slurm: Path, waits: bool) -> None:
    answering(slurm, scontrol=f"time.sleep(60 * (sys.argv[1] == 'requeue')); sys.exit({not waits})")
    assert requeue("42", ["n7"]) == waits


def handed_over(folder: Path) -> str:
    (folder / "private").mkdir()
    plan = plan_slurm(replace(REQUEST, run_dir=folder), OPTIONS)
    return SlurmQueue().submit(plan, {"TOKEN": "s3cr3t"})


@pytest.mark.usefixtures("hasty")
def test_a_job_that_sbatch_took_without_a_word_is_found_by_its_output(slurm: Path) -> None:
    rows = [f"41   {slurm}/other.log  ", f"42   {slurm}/launcher.log   ", "43   "]
    answering(slurm, sbatch=STALLS, squeue=f"print({chr(10).join(rows)!r} if '--states=all' in sys.argv else '')")
    assert handed_over(slurm) == "42"
    assert (slurm / "private/secrets.json").exists()


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("squeue", ["", STALLS])
def test_a_job_that_nobody_knows_of_gets_no_secrets_later(slurm: Path, squeue: str) -> None:
    answering(slurm, sbatch=STALLS, squeue=squeue)
    with pytest.raises(UnavailableError, match=r"no job of this run was found; should Slurm have one after all"):
        handed_over(slurm)
    assert not (slurm / "private/secrets.json").exists()


def test_how_often_a_job_was_queued_again_is_unknown_where_slurm_does_not_say(slurm: Path) -> None:
    answering(slurm, scontrol="sys.exit(1)")
    assert times_queued_again("42") is None
    answering(slurm, scontrol="print('JobId=42 Restarts=3')")
    assert times_queued_again("42") == 3
