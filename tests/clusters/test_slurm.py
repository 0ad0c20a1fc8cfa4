"""The plan on Slurm is a pure, printable value; what Slurm reads as words of its own cannot come in by a job."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.clusters.base import Limits, Program, Secret, StartRequest
from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.saved import plan_from
from meshwright.clusters.slurm import SlurmOptions, SlurmQueue, named, on_first, plan_slurm

REQUEST = StartRequest(
    name="tiny",
    run_id="r1",
    run_dir=Path("/runs/100%/r 1"),
    program=Program(
        argv=(sys.executable, "-c", "print('a b')"),
        workdir=Path("/work dir"),
        env=(("NOTE", "a,b c"),),
        inherit=("*",),
        secrets=(Secret("TOKEN", "from_env MY_TOKEN", "hunter22"),),
    ),
    num_nodes=2,
    ranks_per_node=2,
    gpus_per_node=8,
    warning=("USR2", 90.5),
    limits=Limits(max_restarts=1),
)
OPTIONS = SlurmOptions(
    words={"partition": "gpu", "exclude": "n1,n2", "exclusive": ""},
    step={"cpu-bind": "none"},
    time_s=5400.0,
    cores_per_rank=6,
    python="/opt/py",
)
AGENT = "/opt/py -u -m meshwright.clusters.agent '/runs/100%/r 1' SLURM_NODEID"
NODE = """\
  cwd      /work dir
  env      'NOTE=a,b c'
  env      MESHWRIGHT_HOST={name}
  env      MESHWRIGHT_NODE={index}
  env      'MESHWRIGHT_RUN_DIR=/runs/100%/r 1'
  env      MESHWRIGHT_RUN_ID=r1
  env      MESHWRIGHT_SAVE_SIGNAL=USR2
  agent    {agent}
  argv     /opt/py -c 'print('"'"'a b'"'"')'
"""
GOLDEN = f"""\
run tiny/r1 on slurm: 4 ranks on 2 nodes
directory  /runs/100%/r 1
writes     job.yaml job.json plan.json merged.log exit.json
restarts   at most 1; TERM, then KILL after 30 s
           on node, signal, hang, preempt, exit; never on config, import_error; wait 1 s x 2 each, at most 300 s
store      a free port of 29400-29999 on the first node, the interface with that address
inherits   *
secret     TOKEN=*** (from_env MY_TOKEN)
submit     sbatch --parsable --job-name=tiny --nodes=2 --ntasks-per-node=1 --cpus-per-task=12 --chdir=/ \
'--output=/runs/100%%/r 1/launcher.log' --open-mode=append --signal=B:USR2@91 --requeue --time=0-01:30:00 \
--gpus-per-node=8 --partition=gpu --exclude=n1,n2 --exclusive
script     on its standard input:
           | #!/bin/sh
           | exec /opt/py -u -m meshwright.launch.batch '/runs/100%/r 1'
step       srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=12 --kill-on-bad-exit=1 --mpi=none \
--cpu-bind=none {AGENT}
node node0: ranks 0, 1
{NODE.format(name="node0", index=0, agent=AGENT)}  log      logs/rank-0.log
  log      logs/rank-1.log
node node1: ranks 2, 3
{NODE.format(name="node1", index=1, agent=AGENT)}  log      logs/rank-2.log
  log      logs/rank-3.log
"""


def test_the_plan_prints_all_that_is_submitted_and_started() -> None:
    assert str(plan_slurm(REQUEST, OPTIONS)) == GOLDEN


def test_a_plan_has_no_room_for_a_secrets_value_and_exports_nothing() -> None:
    plan = plan_slurm(REQUEST, OPTIONS)
    assert "hunter22" not in f"{plan} {plan!r} {plan.as_dict()}"
    assert "--export" not in str(plan)


def test_a_plan_comes_back_from_its_saved_form_as_it_was() -> None:
    plan = plan_slurm(REQUEST, OPTIONS)
    assert plan_from(plan.as_dict()) == plan


def test_slurm_names_the_nodes_later() -> None:
    plan = named(plan_slurm(REQUEST, OPTIONS), ["gpu7", "gpu9"])
    assert [node.name for node in plan.nodes] == ["gpu7", "gpu9"]
    assert [dict(node.env)["MESHWRIGHT_HOST"] for node in plan.nodes] == ["gpu7", "gpu9"]
    assert plan.meeting.host == "gpu7"
    with pytest.raises(UnavailableError, match=r"Slurm gave 1 nodes \(gpu7\), the job needs 2"):
        named(plan, ["gpu7"])


def test_ranks_are_shared_evenly_and_only_nodes_could_tell_more() -> None:
    dealt = plan_slurm(replace(REQUEST, ranks_per_node=None, num_ranks=6), OPTIONS)
    assert [node.ranks for node in dealt.nodes] == [(0, 1, 2), (3, 4, 5)]
    with pytest.raises(UnavailableError, match="nobody knows the nodes before Slurm has chosen them"):
        plan_slurm(replace(REQUEST, ranks_per_node="gpu"), OPTIONS)


def test_an_elastic_job_asks_for_a_range_and_starts_agents_on_what_it_got() -> None:
    plan = plan_slurm(
        replace(REQUEST, limits=replace(REQUEST.limits, fewest_nodes=1, sizes=("1 to 2", "1: x"))), OPTIONS
    )
    assert plan_from(plan.as_dict()) == plan
    assert "\nnodes      1 to 2\n           1: x\n" in str(plan)
    assert plan.submission is not None
    assert "--nodes=1-2" in plan.submission.argv
    assert not [word for word in plan.submission.argv if word.startswith("--ntasks")], "Slurm would give the fewest"
    got = named(on_first(plan, 1), ["gpu9"])
    assert [(node.name, node.ranks) for node in got.nodes] == [("gpu9", (0, 1))]
    assert got.submission is not None
    assert got.submission.step[1:3] == ("--nodes=1", "--ntasks=1")
    assert got.submission.argv == plan.submission.argv


def test_a_job_that_is_not_to_be_queued_again_says_so() -> None:
    plan = plan_slurm(REQUEST, replace(OPTIONS, requeue=False))
    assert plan.submission is not None
    assert "--no-requeue" in plan.submission.argv
    assert "--requeue" not in plan.submission.argv


def test_a_machine_without_slurm_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="no `sbatch` on PATH") as caught:
        SlurmQueue().check(plan_slurm(REQUEST, OPTIONS))
    assert caught.value.exit_code == 69
