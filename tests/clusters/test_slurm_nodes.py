"""Slurm's nodes are examined in an allocation that goes back whatever happens; its words follow from the job's plan."""

import os
import shlex
import time
from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.evidence import Wishes
from meshwright.clusters.examine import examine
from meshwright.clusters.reaching import Visit
from meshwright.clusters.slurm import SlurmOptions, SlurmQueue, plan_slurm
from meshwright.clusters.slurm_nodes import allocation_words, step_words
from tests.clusters.test_slurm import OPTIONS, REQUEST
from tests.launch.pretend_slurm import write_commands
from tests.launch.waiting import eventually

QUEUE = SlurmQueue()
WISHES = Wishes(checks=("clock", "ports"), write_bytes=0, timeout_s=60.0)


def test_the_words_are_those_of_the_job_without_what_only_a_run_needs() -> None:
    options = replace(OPTIONS, words={**OPTIONS.words, "mail-type": "FAIL"}, step={"cpu-bind": "none", "label": ""})
    submission = plan_slurm(REQUEST, options).submission
    assert submission is not None
    assert shlex.join(allocation_words(submission)) == (
        "salloc --job-name=tiny-doctor --nodes=2 --ntasks-per-node=1 --cpus-per-task=12 --gpus-per-node=8 "
        "--partition=gpu --exclude=n1,n2 --exclusive --time=15 "
        "sh -c 'echo \"$SLURM_JOB_ID $SLURM_JOB_NODELIST\" && exec cat'"
    )
    assert shlex.join(step_words(submission, "7", "gpu03")) == (
        "srun --jobid=7 --nodelist=gpu03 --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=12 --mpi=none "
        "--cpu-bind=none --overlap --chdir=/ /opt/py -u -m meshwright.clusters.probe"
    )


def test_a_short_limit_of_the_job_is_kept_and_secrets_and_exports_are_in_no_word() -> None:
    submission = plan_slurm(REQUEST, replace(OPTIONS, time_s=300.0)).submission
    assert submission is not None
    words = [*allocation_words(submission), *step_words(submission, "7", "n0")]
    assert "--time=5" in words
    assert not [word for word in words if "hunter22" in word or "export" in word]


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands, pretended."""
    folder = tmp_path / "bin"
    write_commands(folder)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_probes_run_in_steps_on_the_nodes_that_slurm_gives_and_those_go_back(commands: Path) -> None:
    with QUEUE.reached(REQUEST, Visit()) as reached:
        found = examine(reached, WISHES)
        assert not (commands / "given-back").exists()
    assert [(each.name, each.by) for each in reached.reaches] == [("n0", "slurm"), ("n1", "slurm")]
    assert found.silent == {}
    assert {(dial.source, dial.target) for dial in found.dials if dial.seconds} == {("n0", "n1"), ("n1", "n0")}
    assert (commands / "given-back").exists()


def test_an_error_and_ctrl_c_give_the_nodes_back_too(commands: Path) -> None:
    with pytest.raises(KeyboardInterrupt), QUEUE.reached(REQUEST, Visit()):
        raise KeyboardInterrupt
    assert (commands / "given-back").exists()


def test_what_is_waited_for_is_said_and_has_an_end(commands: Path) -> None:
    (commands / "busy").touch()
    told: list[str] = []
    start_s = time.monotonic()
    wait = Visit(most_s=3.0, tell=told.append)
    with (
        pytest.raises(UnavailableError, match=r"has not given the nodes within 3 s.*--wait"),
        QUEUE.reached(REQUEST, wait),
    ):
        pass
    assert 3.0 <= time.monotonic() - start_s < 60.0
    assert "the examination waits for nodes: job 7 is" in told[0]
    assert eventually((commands / "revoked").exists), "it is taken out of the queue"


def test_what_slurm_says_of_a_job_that_it_cannot_run_is_told(commands: Path) -> None:
    why = r"gives no nodes for an examination: .*Node count specification"
    with pytest.raises(UnavailableError, match=why), QUEUE.reached(replace(REQUEST, num_nodes=4), Visit()):
        pass
    del commands


def test_an_allocation_around_the_doctor_is_not_taken_for_its_own(commands: Path) -> None:
    around = {
        **os.environ,
        "SLURM_JOB_ID": "1",
        "SLURM_NTASKS": "9",
        "SLURM_CONF": "/etc/mine",
        "SLURM_JWT": "t",
        "SLURM_CLUSTERS": "c",
    }
    (commands / "srun").write_text("#!/bin/sh\nenv | grep ^SLURM_ | sort | tr '\\n' ' ' >&2; exit 3\n")
    with QUEUE.reached(replace(REQUEST, num_nodes=1), Visit(around)) as reached:
        found = examine(reached, WISHES)
    assert found.silent == {"n0": "SLURM_CLUSTERS=c SLURM_CONF=/etc/mine SLURM_JWT=t"}


def test_where_there_is_no_slurm_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with (
        pytest.raises(UnavailableError, match="no `salloc` on PATH"),
        SlurmQueue(SlurmOptions()).reached(REQUEST, Visit()),
    ):
        pass
