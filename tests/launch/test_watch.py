"""Whoever looks at a run in a queue stands in for a launcher that is gone with its node."""

import io
import json
from pathlib import Path

import pytest

from meshwright.clusters.files import alive_file
from meshwright.launch.runs import Known
from meshwright.launch.watch import watch
from tests.clusters.test_slurm_commands import answering, asked, slurm

__all__ = ["slurm"]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshwright.launch.looks._ASK_S", 0.1)
    monkeypatch.setattr("meshwright.launch.watch._LOOK_S", 0.05)


def told(folder: Path, *states: str) -> Known:
    """A run of which Slurm tells these states, one after the other, and then that it is over."""
    script = f"states = {[*states]!r}\nnumber = open(home + '/asked').read().count('squeue')\n"
    answering(
        folder,
        squeue=script + "print(states[number - 1] if number <= len(states) else 'FAILED|NodeFail')",
        scontrol="print('JobId=42 Restarts=1')",
    )
    return Known("r1", "j", "slurm", str(folder), 1.0, job="42")


def test_a_run_that_its_queue_took_up_again_is_asked_once_to_start_soon(
    slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = watch(told(slurm, "RUNNING|None", *["PENDING|BeginTime"] * 6), screen=io.StringIO())
    assert now.state == "lost"
    assert asked(slurm).count("scontrol update JobId=42 StartTime=now+15") == 1
    assert capsys.readouterr().err == "meshwright: job 42 is queued again, and was asked to start soon\n"


def test_a_queue_that_does_not_say_yet_why_a_run_waits_is_asked_again(slurm: Path) -> None:
    watch(told(slurm, "RUNNING|None", *["PENDING|None"] * 6, *["PENDING|BeginTime"] * 6), screen=io.StringIO())
    assert asked(slurm).count("scontrol update JobId=42 StartTime=now+15") == 1


def test_a_queue_is_not_asked_for_longer_than_it_would_hold_a_run(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshwright.launch.watch._HELD_S", 0.0)
    watch(told(slurm, *["PENDING|BeginTime"] * 6), screen=io.StringIO())
    assert [each for each in asked(slurm) if each.startswith("scontrol")] == []


def test_a_run_that_is_queued_again_twice_is_asked_twice(slurm: Path) -> None:
    waits = ["PENDING|BeginTime"] * 3
    watch(told(slurm, *waits, "RUNNING|None", *waits), screen=io.StringIO())
    assert asked(slurm).count("scontrol update JobId=42 StartTime=now+15") == 2


@pytest.mark.parametrize(("state", "heard_of"), [("RUNNING|None", 1), ("PENDING|Resources", 0)])
def test_a_silent_launcher_is_said_while_its_run_is_said_to_go_on(
    slurm: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, state: str, heard_of: int
) -> None:
    monkeypatch.setattr("meshwright.launch.beats.LOST_AFTER_S", 0.5)
    monkeypatch.setattr("meshwright.launch.beats._LOOK_S", 0.1)
    alive_file(slurm).parent.mkdir(parents=True)
    alive_file(slurm).touch()
    (slurm / "plan.json").write_text(json.dumps({"nodes": [{"name": "gpu7"}]}))
    watch(told(slurm, *[state] * 20), screen=io.StringIO())
    assert capsys.readouterr().err.count("meshwright: node gpu7: the launcher there was not heard of") == heard_of
