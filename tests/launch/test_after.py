"""A run that comes after others starts once they have ended as it wants, or says why it never will."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import yaml

from meshwright.clusters.request import Earlier
from meshwright.clusters.saved import plan_from
from meshwright.clusters.slurm import SlurmOptions, plan_slurm
from meshwright.launch.after import after_others, wait_for_others, why_not
from meshwright.launch.errors import JobError
from meshwright.launch.load import load_job
from meshwright.launch.request import request_of
from meshwright.launch.runs import Known, Standing, remember
from tests.launch.own import own
from tests.launch.test_runs import known
from tests.launch.typed import meshwright

pytestmark = pytest.mark.usefixtures("own_state")


def ended(made: Known, state: str = "succeeded", code: int = 0) -> None:
    told = {"state": state, "reason": "", "exit_code": code}
    Path(made.run_dir, "exit.json").write_text(json.dumps(told))


def asked(folder: Path, after: str, cluster: str = "{type: local}") -> tuple[Earlier, ...]:
    path = folder / "job.yaml"
    path.write_text(f"name: j\ncommand: ['true']\nafter: {after}\ncluster: {cluster}\n")
    loaded = load_job(path)
    return after_others(request_of(loaded, "r9", base=folder), loaded).limits.after


def test_a_run_is_known_by_its_id_and_one_that_is_not_is_refused_with_its_place(tmp_path: Path) -> None:
    made = known(tmp_path).of_this_process()
    remember(made)
    assert asked(tmp_path, "[r1]") == (Earlier("r1", made.run_dir, "ok"),)
    assert asked(tmp_path, "[{run: r1, when: any}]") == (Earlier("r1", made.run_dir, "any"),)
    assert asked(tmp_path, "[]") == ()
    with pytest.raises(JobError, match=r"job.yaml:3:13: after.1: no run 'r2' is known; choose from: r1"):
        asked(tmp_path, "[r1, r2]")


def test_what_has_failed_already_is_refused_unless_any_end_will_do(tmp_path: Path) -> None:
    made = known(tmp_path).of_this_process()
    remember(made)
    ended(made, "failed", 7)
    with pytest.raises(JobError, match=r"after.0: run r1 failed \(exit code 7\); launch that again first"):
        asked(tmp_path, "[r1]")
    assert asked(tmp_path, "[{run: r1, when: any}]")[0].when == "any"
    assert why_not("r1", "ok", Standing("running")) is None


def test_slurm_waits_for_runs_of_its_own_and_cannot_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho 'PENDING|Resources'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    queued = known(tmp_path, "q1", cluster="slurm", job="42").of_this_process()
    remember(queued)
    remember(known(tmp_path, "here").of_this_process())
    found = asked(tmp_path, "[q1, {run: q1, when: any}]", "{type: slurm}")
    assert [(each.when, each.job) for each in found] == [("ok", "42"), ("any", "42")]
    with pytest.raises(JobError, match=r"here goes on outside of Slurm \(launcher .*\), which cannot wait for it"):
        asked(tmp_path, "[here]", "{type: slurm}")
    ended(queued)
    assert asked(tmp_path, "[q1]", "{type: slurm}")[0].job is None, "it is over: there is nothing to wait for"


def test_sbatch_is_told_to_wait_and_to_give_up_what_cannot_come_true(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: j\ncommand: ['true']\ncluster: {type: slurm}\n")
    request = request_of(load_job(path), "r9", base=tmp_path)
    after = (Earlier("a", "/a", "ok", "41"), Earlier("b", "/b", "any", "42"), Earlier("c", "/c", "ok"))
    limits = request.limits.__class__(**{**request.limits.__dict__, "after": after})
    plan = plan_slurm(request.__class__(**{**request.__dict__, "limits": limits}), SlurmOptions())
    assert plan.submission is not None
    assert {"--dependency=afterok:41,afterany:42", "--kill-on-invalid-dep=yes"} <= set(plan.submission.argv)
    assert "after      run a has succeeded (job 41)\n" in str(plan)
    assert plan_from(plan.as_dict()) == plan


def waited(made: Known, when: str, then: Any) -> tuple[Any, list[str]]:
    said: list[str] = []
    timer = Timer(0.4, then)
    timer.start()
    found = wait_for_others(made, [Earlier(made.run_id, made.run_dir, when)], said.append)
    timer.join()
    return found, said


@pytest.mark.parametrize(
    ("when", "state", "code", "starts"),
    [("ok", "succeeded", 0, True), ("any", "failed", 3, True), ("ok", "failed", 3, False)],
)
def test_the_launcher_waits_and_looks_how_it_ended(
    tmp_path: Path, when: str, state: str, code: int, starts: bool
) -> None:
    made = known(tmp_path).of_this_process()
    remember(made)
    began_s = time.monotonic()
    found, said = waited(made, when, lambda: ended(made, state, code))
    assert time.monotonic() - began_s > 0.3
    assert said == [f"meshwright: waiting for the end of run r1 (running: launcher {os.getpid()})\n"]
    assert (found is None) is starts
    if found is not None:
        assert (found.state, found.exit_code) == ("failed", 69)
        assert found.reason == "after: run r1 failed (exit code 3); not started"


def test_a_signal_ends_the_wait_and_a_run_directory_that_is_gone_does_too(tmp_path: Path) -> None:
    made = known(tmp_path).of_this_process()
    remember(made)
    found, _ = waited(made, "ok", lambda: os.kill(os.getpid(), signal.SIGINT))
    assert (found.state, found.exit_code) == ("interrupted", 130)
    gone = wait_for_others(made, [Earlier("r2", str(tmp_path / "gone"))], lambda line: None)
    assert gone is not None
    assert "is gone; not started" in gone.reason


@pytest.mark.slow
def test_a_detached_run_starts_when_the_one_before_has_succeeded(tmp_path: Path) -> None:
    job = {"name": "j", "command": [sys.executable, "-c", "import os, time; time.sleep(2); print('did', os.getpid())"]}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    ids = [own(f"{name}-{tmp_path.name}") for name in ("one", "two")]
    for run_id, more in zip(ids, ([], ["--set", f"after=[{ids[0]}]"]), strict=True):
        done = meshwright(tmp_path, "launch", "job.yaml", "--run-id", run_id, "--detach", *more)
        assert done.returncode == 0, done.stderr
    assert meshwright(tmp_path, "attach", ids[1]).returncode == 0
    first, second = (json.loads((tmp_path / "runs/j" / each / "exit.json").read_text()) for each in ids)
    assert (first["state"], second["state"]) == ("succeeded", "succeeded")
    log = (tmp_path / "runs/j" / ids[1] / "launcher.log").read_text()
    assert f"waiting for the end of run {ids[0]}" in log
    merged = [tmp_path / "runs/j" / each / "merged.log" for each in ids]
    assert merged[1].stat().st_mtime > first["ended_unix_s"] - 0.5
