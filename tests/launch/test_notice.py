"""A signal is a warning or an end, as Slurm says; only an end counts as an interrupt."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshwright.launch.notice import Notice
from tests.clusters.test_slurm_commands import answering, asked, slurm

__all__ = ["slurm"]

GOES_ON = "JobState=RUNNING Restarts=0 PreemptTime=None"
PREEMPTED = "JobState=RUNNING Restarts=0 PreemptTime=2026-11-27T20:20:33"
STARTS_AGAIN = "JobState=COMPLETING Restarts=1 PreemptTime=None"
ENDS = "JobState=COMPLETING Restarts=0 PreemptTime=None"
LIKE = "JobState=COMPLETING Restarts=0 PreemptTime=None Comment=Restarts=1"


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Those of signals that a test takes."""
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def saying(folder: Path, job: str, kill_wait_s: int = 30) -> None:
    answering(folder, scontrol=f"print('KillWait = {kill_wait_s} sec' if sys.argv[2] == 'config' else {job!r})")


@pytest.mark.parametrize(
    ("name", "to_us", "job", "given", "ended"),
    [
        ("USR2", False, PREEMPTED, "SIGUSR2", []),
        ("TERM", False, PREEMPTED, "SIGTERM", []),
        ("USR2", True, PREEMPTED, "SIGUSR2", []),
        ("TERM", True, GOES_ON, "SIGTERM", []),
        ("USR2", True, GOES_ON, None, [15]),
        ("TERM", False, GOES_ON, "", []),
        ("USR2", False, ENDS, None, [15]),
        ("USR2", True, STARTS_AGAIN, "SIGUSR2", []),
        ("TERM", False, STARTS_AGAIN, "SIGTERM", []),
        ("TERM", True, ENDS, None, [15]),
        ("USR2", False, LIKE, None, [15]),
        ("TERM", True, "", None, [15]),
    ],
)
def test_a_sigterm_is_what_slurm_says_it_is(
    slurm: Path, name: str, to_us: bool, job: str, given: str | None, ended: list[int]
) -> None:
    saying(slurm, job)
    with Notice(name, "42", 0) as notice:
        assert notice(False) is None
        if to_us:
            signal.raise_signal(signal.SIGTERM)
        assert notice(not to_us) == given
        assert notice.numbers == ended
        assert notice.preempted == (job == PREEMPTED)


def test_the_own_signal_warns_without_a_question(slurm: Path) -> None:
    with Notice("USR2", "42", 0) as notice:
        signal.raise_signal(signal.SIGUSR2)
        assert notice(False) == notice(False) == "SIGUSR2"
    assert not (slurm / "asked").exists()


def test_ctrl_c_is_an_end_without_a_question_and_a_second_signal_is_impatient(slurm: Path) -> None:
    with Notice("TERM", "42", 0) as notice:
        signal.raise_signal(signal.SIGINT)
        notice(False)
        signal.raise_signal(signal.SIGTERM)
        notice(True)
        assert notice.numbers == [2, 15]
    assert not (slurm / "asked").exists()


def test_half_of_the_time_until_slurm_kills_is_left_to_end_ranks_that_do_not_leave(slurm: Path) -> None:
    saying(slurm, STARTS_AGAIN, kill_wait_s=1)
    with Notice("USR2", "42", 0) as notice:
        signal.raise_signal(signal.SIGTERM)
        assert (notice(False), notice.numbers) == ("SIGUSR2", [])
        time.sleep(0.6)
        assert (notice(False), notice.numbers) == ("SIGUSR2", [15])
        assert (notice(True), notice.numbers) == ("SIGUSR2", [15])


def test_many_agents_that_say_the_same_are_one_question_and_the_end_of_the_grace_another(slurm: Path) -> None:
    saying(slurm, PREEMPTED)
    with Notice("USR2", "42", 0) as notice:
        for _ in range(4):
            notice(True)
        assert asked(slurm) == ["scontrol show job 42"]
        saying(slurm, STARTS_AGAIN)
        signal.raise_signal(signal.SIGTERM)
        assert (notice(False), notice.numbers) == ("SIGUSR2", [])
        assert asked(slurm)[1:] == ["scontrol show job 42", "scontrol show config"]
