"""A sweep on Slurm is one array: one submission, whose script takes the run directory of its task."""

from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.clusters.base import Program, Secret, StartPlan, StartRequest
from meshwright.clusters.saved import plan_from
from meshwright.clusters.slurm import SlurmOptions, plan_slurm
from meshwright.clusters.slurm_array import array_of, as_tasks, unlike

OPTIONS = SlurmOptions(words={"partition": "gpu"}, time_s=5400.0, python="/opt/py")
GOLDEN_ARGV = (
    *("sbatch", "--parsable", "--array=0-2%2", "--job-name=tiny", "--nodes=2", "--ntasks-per-node=1"),
    *("--cpus-per-task=1", "--chdir=/", "--output=/runs/100%%/r1/slurm-%a.log", "--open-mode=append"),
    *("--signal=B:USR2@180", "--requeue", "--time=0-01:30:00", "--partition=gpu"),
)
GOLDEN_SCRIPT = """\
#!/bin/sh
case "$SLURM_ARRAY_TASK_ID" in
0) set -- /runs/tiny-lr-0.1/r1-0 ;;
1) set -- '/runs/tiny lr/$(rm -rf x)/r1-1' ;;
2) set -- '/runs/it'"'"'s 100%/r1-2' ;;
esac
exec /opt/py -u -m meshwright.launch.batch "$1" >>"$1/launcher.log" 2>&1
"""


def plans(**changes: object) -> list[StartPlan]:
    made = []
    for index, folder in enumerate(("tiny-lr-0.1", "tiny lr/$(rm -rf x)", "it's 100%")):
        program = Program(("./train",), Path("/work"), secrets=(Secret("T", "from_env T", "hunter22"),))
        run_dir = Path(f"/runs/{folder}/r1-{index}")
        request = StartRequest(f"tiny-{index}", f"r1-{index}", run_dir, program, num_nodes=2)
        made.append(plan_slurm(replace(request, **changes) if index == 2 else request, OPTIONS))  # type: ignore[arg-type]
    return made


def test_the_array_is_exactly_this() -> None:
    array = array_of(plans(), "tiny", directory=Path("/runs/100%/r1"), max_parallel=2)
    assert array.argv == GOLDEN_ARGV
    assert array.script == GOLDEN_SCRIPT
    assert "hunter22" not in f"{array}"


def test_a_task_keeps_its_own_step_and_comes_back_from_its_saved_form() -> None:
    alone = plans()
    array = array_of(alone, "tiny", directory=Path("/runs/100%/r1"), max_parallel=2)
    for before, task in zip(alone, as_tasks(alone, array), strict=True):
        assert before.submission is not None
        assert task.submission is not None
        assert (task.submission.argv, task.submission.step) == (array.argv, before.submission.step)
        assert plan_from(task.as_dict()) == task
        assert replace(task, submission=before.submission) == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_nodes": 3}, "--nodes=3, and run 0 for --nodes=2"),
        ({"gpus_per_node": 8}, "--gpus-per-node=8, and run 0 for"),
        ({"warning": ("TERM", 9.0)}, "--signal=B:TERM@9, and run 0 for --signal=B:USR2@180"),
    ],
)
def test_runs_that_ask_slurm_for_different_things_are_no_array(changes: dict[str, object], said: str) -> None:
    found = unlike(plans(**changes))
    assert found is not None
    assert found[0] == 2
    assert said in found[1]
    assert unlike(plans()) is None
