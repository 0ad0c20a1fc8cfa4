"""Several runs as one job array of Slurm: one submission, whose tasks each take a start plan by their number. Pure."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from meshwright.clusters.base import StartPlan, Submission

__all__ = ["array_of", "as_tasks", "unlike"]

_OWN = ("--job-name=", "--output=")


def unlike(plans: Sequence[StartPlan]) -> tuple[int, str] | None:
    """The first plan that asks Slurm for something else than plan 0, and both words; None where all are alike.

    Args:
        plans: made by `plan_slurm`.
    """
    for index, plan in enumerate(plans):
        pairs = zip(_asked(plans[0]), _asked(plan), strict=False)
        found = [(first, other) for first, other in pairs if first != other]
        if found or len(_asked(plan)) != len(_asked(plans[0])):
            first, other = found[0] if found else ("fewer words", "more")
            return index, f"{other}, and run 0 for {first}"
    return None


def _asked(plan: StartPlan) -> list[str]:
    """What Slurm is asked for, without what every run has of its own."""
    assert plan.submission is not None, "made by plan_slurm"
    step = [word for word in plan.submission.step if word != plan.run_dir]
    return [*(word for word in plan.submission.argv if not word.startswith(_OWN)), *step]


def array_of(plans: Sequence[StartPlan], name: str, *, directory: Path, max_parallel: int) -> Submission:
    """The one submission of all plans; the script takes the run directory of its task.

    What the launcher of a task says goes to that run's launcher.log, what Slurm says to slurm-N.log of the sweep.

    Args:
        plans: made by `plan_slurm`, alike.
        name: of the array.
        directory: of the sweep.
        max_parallel: tasks that run at the same time.
    """
    assert unlike(plans) is None, "refused before"
    first = plans[0].submission
    assert first is not None, "made by plan_slurm"
    output = f"{str(directory).replace('%', '%%')}/slurm-%a.log"
    own = dict(zip(_OWN, (name, output), strict=True))
    argv = [_renamed(word, own) for word in first.argv]
    argv.insert(2, f"--array=0-{len(plans) - 1}%{max_parallel}")
    cases = [f"{index}) set -- {shlex.quote(plan.run_dir)} ;;" for index, plan in enumerate(plans)]
    launcher = shlex.join(_launcher(plans[0]))
    lines = ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac", f'exec {launcher} "$1" >>"$1/launcher.log" 2>&1']
    return Submission(tuple(argv), "\n".join(["#!/bin/sh", *lines, ""]), step=())


def _renamed(word: str, own: dict[str, str]) -> str:
    return next((f"{start}{value}" for start, value in own.items() if word.startswith(start)), word)


def _launcher(plan: StartPlan) -> list[str]:
    """The words of a plan's own script, without its run directory."""
    assert plan.submission is not None, "made by plan_slurm"
    words = shlex.split(plan.submission.script.partition("\n")[2])
    assert (words[0], words[-1]) == ("exec", plan.run_dir), words
    return words[1:-1]


def as_tasks(plans: Sequence[StartPlan], array: Submission) -> list[StartPlan]:
    """The plans as those of an array's tasks: its argv, and of the script nothing, since it is the array's."""
    found = []
    for plan in plans:
        assert plan.submission is not None, "made by plan_slurm"
        found.append(replace(plan, submission=Submission(array.argv, "", plan.submission.step)))
    return found
