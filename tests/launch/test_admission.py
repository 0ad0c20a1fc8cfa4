"""Nodes that Slurm or Ray has given are examined before ranks start: the run goes on, ends with 78, or gets others."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from meshwright.clusters.base import StartPlan
from meshwright.clusters.evidence import Reach
from meshwright.clusters.probe import PROBE_ARGV
from meshwright.clusters.reaching import Reached
from meshwright.clusters.slurm import plan_slurm
from meshwright.clusters.verdicts import Diagnosis, Verdict
from meshwright.launch.admission import admit, examined_at_start
from meshwright.launch.follow import Run
from meshwright.launch.load import load_job
from meshwright.launch.preflight import PreflightError, on_fit_nodes
from meshwright.launch.registry import cluster_of
from meshwright.launch.spec.job import Job
from tests.clusters.test_slurm import OPTIONS, REQUEST
from tests.lab.nvml import with_gpus
from tests.launch.own import own
from tests.launch.pretend_slurm import write_commands
from tests.launch.test_batch import end, start

PLAN: StartPlan = plan_slurm(REQUEST, OPTIONS)
SICK = Diagnosis(("n0", "n1"), (Verdict("disk", "n1", "bad", "it is full", "make room"),))
FIT = Diagnosis(("n0", "n1"), (Verdict("disk", None, "ok", "fine"),))


@dataclass
class Asked:
    """What a run asked of its queue."""

    takes: bool = True
    out: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, out: list[dict[str, Any]]) -> bool:
        self.out += out
        return self.takes


def _admit(found: Diagnosis, on_fail: str, asked: Asked, *, ended: bool = False, preflight: str = "disk") -> None:
    health = {"preflight": [preflight] if preflight else [], "on_fail": on_fail}
    job = Job.model_validate({"name": "j", "command": ["true"], "health": health, "cluster": {"type": "slurm"}})
    run = Run(job, PLAN, None, (), 0.0)
    admit(run, ended=lambda: ended, without=asked, examine=lambda run: found)


def test_fit_nodes_are_admitted_and_a_job_without_checks_has_none_made(capsys: pytest.CaptureFixture[str]) -> None:
    asked = Asked()
    _admit(FIT, "abort", asked)
    assert capsys.readouterr().err == "meshwright: disk checked; fit: 2 nodes\n"
    _admit(SICK, "abort", asked, preflight="")
    assert asked.out == []


def test_a_sick_node_ends_the_run_with_78_or_is_left_out_with_why(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PreflightError, match="n1 not fit") as raised:
        _admit(SICK, "abort", Asked())
    assert raised.value.exit_code == 78
    assert "it is full" in capsys.readouterr().err
    asked = Asked()
    _admit(SICK, "exclude_node", asked)
    assert [(each["node"], each["why"], each["attempt"]) for each in asked.out] == [("n1", "disk: it is full", -1)]
    with pytest.raises(PreflightError, match="n1 not fit, and the job cannot be queued again without"):
        _admit(SICK, "exclude_node", Asked(takes=False))
    _admit(SICK, "warn", Asked())


def test_a_run_that_is_being_ended_says_nothing_against_its_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    _admit(SICK, "abort", Asked(), ended=True)
    assert capsys.readouterr().err == ""


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_state: Path) -> Path:
    """Pretended commands of Slurm, of whose nodes n1 has a sick GPU."""
    folder = tmp_path / "bin"
    write_commands(folder)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name, value in with_gpus("gpus=1").items():
        monkeypatch.setenv(name, value)
    (folder / "env-n1").write_text(json.dumps(with_gpus("gpus=1 0.uncorrected=3")))
    del own_state
    return folder


@pytest.mark.slow
def test_nothing_starts_on_slurm_where_a_node_is_sick(tmp_path: Path, commands: Path) -> None:
    launcher = start(tmp_path, "print('up')", health={"preflight": ["gpu"]})
    output = end(launcher, tmp_path)
    run_dir = tmp_path / "runs/j" / own(tmp_path.name)
    assert launcher.returncode == 78, output
    assert "3 uncorrected memory errors" in output
    assert "up" not in (run_dir / "merged.log").read_text()
    told = json.loads((run_dir / "exit.json").read_text())
    assert (told["exit_code"], told["state"]) == (78, "failed")
    assert told["reason"].startswith("n1 not fit")
    assert not (commands / "updated").exists()
    assert not (run_dir / "private/secrets.json").exists()


@pytest.mark.slow
def test_a_sick_node_is_left_out_and_the_job_queued_again(tmp_path: Path, commands: Path) -> None:
    keys = {"health": {"preflight": ["gpu"], "on_fail": "exclude_node"}, "nodes": {"min": 1, "max": 2}}
    cluster = {"type": "slurm", "exclude": ["n7"]}
    launcher = start(tmp_path, "print('up')", parallel={"dp": 2}, nproc_per_node=1, cluster=cluster, **keys)
    output = end(launcher, tmp_path)
    assert launcher.returncode == 0, output
    assert "it goes on without n1; job 42 is queued again" in output
    assert (commands / "updated").read_text() == "JobId=42 StartTime=now+15 ExcNodeList=n7,n1\n"
    told = json.loads((tmp_path / "runs/j" / own(tmp_path.name) / "exit.json").read_text())
    assert [(each["node"], each["down_s"]) for each in told["excluded"]] == [("n1", 0.0)]
    assert "3 uncorrected memory errors" in told["excluded"][0]["why"]
    assert "n0:0 | up" in output


@pytest.mark.slow
def test_a_node_that_slurm_gives_again_all_the_same_ends_the_run(tmp_path: Path, commands: Path) -> None:
    launcher = start(tmp_path, "print('up')", health={"preflight": ["gpu"], "on_fail": "exclude_node"})
    output = end(launcher, tmp_path)
    assert launcher.returncode == 78, output
    assert output.count("is queued again") == 1
    assert "cannot be queued again without" in output
    del commands


class _Admits:
    admit: Callable[[Reached], list[dict[str, Any]]] | None = None


def test_a_cluster_that_gives_nodes_at_the_start_has_them_examined_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    text = "name: j\ncommand: ['true']\nhealth: {{preflight: [disk]}}\ncluster: {{type: ray}}\nlogs: {{dir: {0}/x/y}}\n"
    (tmp_path / "job.yaml").write_text(text.format("file"))
    loaded = load_job(tmp_path / "job.yaml")
    assert on_fit_nodes(loaded, tmp_path, examine=lambda *_: SICK) is loaded, "not before it starts"
    cluster = _Admits()
    examined_at_start(cast("Any", cluster), loaded, tmp_path)
    assert cluster.admit is not None
    with pytest.raises(PreflightError, match="gpu9 not fit"):
        cluster.admit(Reached((Reach("gpu9", PROBE_ARGV, by="ray"),)))
    assert "cannot be written" in capsys.readouterr().err


def test_a_sick_node_is_named_to_the_cluster_which_gives_another_but_not_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "job.yaml").write_text(
        "name: j\ncommand: ['true']\nhealth: {preflight: [disk], on_fail: exclude_node}\n"
        "cluster: {type: ray}\nlogs: {dir: file/x/y}\n"
    )
    cluster = _Admits()
    examined_at_start(cast("Any", cluster), load_job(tmp_path / "job.yaml"), tmp_path)
    reached = Reached((Reach("gpu9", PROBE_ARGV, by="ray"),))
    assert cluster.admit is not None
    (told,) = cluster.admit(reached) or [{}]
    assert (told["node"], told["lost"], told["why"][:6]) == ("gpu9", False, "disk: ")
    with pytest.raises(PreflightError, match="gpu9 not fit, and ray gives it again"):
        cluster.admit(reached)
    assert "left out: gpu9" in capsys.readouterr().err


def test_without_checks_nothing_is_set(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("name: j\ncommand: ['true']\ncluster: {type: ray}\n")
    loaded = load_job(tmp_path / "job.yaml")
    assert getattr(examined_at_start(cluster_of(loaded), loaded, tmp_path), "admit", 1) is None
