"""Slurm as a queue: one batch job per run, whose first node has the launcher and whose step starts an agent per node.

Nothing goes through `--export`: commas split its values. The script on sbatch's standard input holds two lines, and
neither it nor any argv nor the environment of the job holds a secret; those lie in a file for this user only.
"""

import json
import math
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

from meshwright.clusters.base import NodePlan, StartPlan, StartRequest, Submission, identity, log_name, under_names
from meshwright.clusters.contract import Job
from meshwright.clusters.dealing import ranks_per_node
from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.reaching import Reached, Visit
from meshwright.clusters.slurm_commands import hasten, run_command, said, submitted, times_queued_again
from meshwright.clusters.slurm_nodes import reached_by_slurm
from meshwright.clusters.spawn import AGENT_WORDS, words_for

__all__ = ["SECRETS_FILE", "SlurmOptions", "SlurmQueue", "named", "on_first", "plan_slurm"]

SECRETS_FILE = "private/secrets.json"
"""Values of secrets between submission and end, relative to the run directory."""

_STATUS_S = 20.0
_LIVE = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT"}
_ORDER = ("running", "pending", "gone")  # an array is what the liveliest of its tasks is
_WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"}

_READ_OTHERWISE = re.compile(r"[\x00-\x1f\x7f\\]")
"""In a file's name a backslash makes sbatch leave every `%` alone, and a newline ends a line of its records."""


@dataclass(frozen=True)
class SlurmOptions:
    """What is asked of Slurm.

    Args:
        words: further options of sbatch, long name -> value, empty for none.
        step: further options of srun.
        time_s: limit; None is the partition's.
        cores_per_rank: cores of every rank.
        cores_per_node: cores of every node; None follows from the ranks.
        requeue: queue again after a preemption.
        python: interpreter on the nodes.
    """

    words: Mapping[str, str] = field(default_factory=dict)
    step: Mapping[str, str] = field(default_factory=dict)
    time_s: float | None = None
    cores_per_rank: int = 1
    cores_per_node: int | None = None
    requeue: bool = True
    python: str = sys.executable


def plan_slurm(request: StartRequest, options: SlurmOptions) -> StartPlan:
    """The exact start plan on Slurm; pure. Slurm names the nodes when they are there.

    Raises:
        UnavailableError: for ranks that only the nodes could count, or a directory that Slurm would read otherwise.
    """
    if _READ_OTHERWISE.search(str(request.run_dir)):
        raise UnavailableError(
            f"Slurm would read {str(request.run_dir)!r} otherwise; set logs.dir to a directory without backslashes "
            "and control characters"
        )
    ranks = ranks_per_node(request, "nobody knows the nodes before Slurm has chosen them")
    agent = (options.python, *AGENT_WORDS, str(request.run_dir), "SLURM_NODEID")
    argv = words_for(options.python, request.program.argv)
    nodes = [_node(request, index, ranks, words=(agent, argv)) for index in range(request.num_nodes)]
    cores = options.cores_per_node or ranks * options.cores_per_rank
    plan = StartPlan.of(request, "slurm", nodes=nodes, meeting=replace(request.meeting, host="first"))
    submission = Submission(
        argv=_sbatch(request, options, cores),
        script=f"#!/bin/sh\nexec {shlex.join(_launcher(request, options))}\n",
        step=_srun(request, options, cores) + agent,
    )
    return replace(plan, submission=submission)


def _node(request: StartRequest, index: int, ranks: int, *, words: tuple[tuple[str, ...], tuple[str, ...]]) -> NodePlan:
    """One node, by the words of its agent and of its ranks."""
    name, mine = f"node{index}", tuple(range(index * ranks, (index + 1) * ranks))
    warned = ("MESHWRIGHT_SAVE_SIGNAL", request.warning[0])
    return NodePlan(
        name=name,
        index=index,
        ranks=mine,
        cwd=str(request.program.workdir),
        env=(*request.program.env, *identity(request, name, index), warned),
        agent=words[0],
        argv=words[1],
        logs=tuple(log_name(rank) for rank in mine),
    )


def _launcher(request: StartRequest, options: SlurmOptions) -> tuple[str, ...]:
    return (options.python, "-u", "-m", "meshwright.launch.batch", str(request.run_dir))


def _sbatch(request: StartRequest, options: SlurmOptions, cores: int) -> tuple[str, ...]:
    run_dir = str(request.run_dir).replace("%", "%%")  # sbatch has a use for it in names of files
    name, lead_s = request.warning
    words = {
        "job-name": request.name,
        **_size(request),
        "cpus-per-task": str(cores),
        "chdir": "/",
        "output": f"{run_dir}/launcher.log",
        "open-mode": "append",
        "signal": f"B:{name}@{min(65535, math.ceil(lead_s))}",
        "requeue" if options.requeue else "no-requeue": "",
    }
    waits = [f"after{each.when}:{each.job}" for each in request.limits.after if each.job is not None]
    if waits:  # one that cannot come true any more would wait for ever
        words |= {"dependency": ",".join(waits), "kill-on-invalid-dep": "yes"}
    if options.time_s is not None:
        words["time"] = _time(options.time_s)
    if request.gpus_per_node is not None:
        words["gpus-per-node"] = str(request.gpus_per_node)
    return ("sbatch", "--parsable", *_flags(words | dict(options.words)))


def _size(request: StartRequest) -> dict[str, str]:
    """Nodes; of a range Slurm gives the fewest, however many are free, where it is told of tasks per node."""
    most, fewest = request.num_nodes, request.limits.fewest_nodes
    return {"nodes": str(most), "ntasks-per-node": "1"} if fewest in (None, most) else {"nodes": f"{fewest}-{most}"}


def _srun(request: StartRequest, options: SlurmOptions, cores: int) -> tuple[str, ...]:
    words = {
        "nodes": str(request.num_nodes),
        "ntasks": str(request.num_nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(cores),  # which steps do not take over from the job since 22.05
        "kill-on-bad-exit": "1",
        "mpi": "none",
    }
    return ("srun", *_flags(words | dict(options.step)))


def _flags(words: Mapping[str, str]) -> list[str]:
    return [f"--{name}={value}" if value else f"--{name}" for name, value in words.items()]


def _time(seconds: float) -> str:
    """Days-hours:minutes:seconds.

    >>> _time(90000.0), _time(59.5)
    ('1-01:00:00', '0-00:01:00')
    """
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours // 24}-{hours % 24:02d}:{minutes:02d}:{rest:02d}"


class SlurmQueue:
    """Slurm, through the commands of this machine.

    Args:
        options: what is asked of it.
    """

    def __init__(self, options: SlurmOptions | None = None) -> None:
        self._options = options or SlurmOptions()

    def plan(self, request: StartRequest) -> StartPlan:
        """The exact start plan of a request; submits nothing."""
        return plan_slurm(request, self._options)

    def reached(self, request: StartRequest, visit: Visit) -> AbstractContextManager[Reached]:
        """Nodes that Slurm gives for an examination."""
        submission = self.plan(request).submission
        assert submission is not None, "made by plan"
        return reached_by_slurm(submission, request.num_nodes, visit)

    def check(self, plan: StartPlan) -> None:
        """Lets Slurm look at the job without taking it.

        Raises:
            UnavailableError: when there is no Slurm here, or it could never run the job.
        """
        assert plan.submission is not None, "made by plan"
        first, *rest = plan.submission.argv
        kept = [word for word in rest if word != "--parsable"]
        done = run_command([first, "--test-only", *kept], text=plan.submission.script)
        if done.returncode:
            raise UnavailableError(f"Slurm does not take this job: {said(done)}; see `cluster`, `nodes`, `resources`")

    def submit(self, plan: StartPlan, secrets: Mapping[str, str]) -> str:
        """Hands a plan over; returns Slurm's id of the job.

        Raises:
            UnavailableError: when Slurm does not take it.
        """
        assert plan.submission is not None, "made by plan"
        return self.submit_all(plan.submission, [(Path(plan.run_dir), secrets)])

    def submit_all(self, submission: Submission, runs: Sequence[tuple[Path, Mapping[str, str]]]) -> str:
        """Hands over what starts one run, or an array of them; returns Slurm's id of it.

        Args:
            submission: of all runs.
            runs: directory and secrets of each.

        Raises:
            UnavailableError: when Slurm does not take it.
        """
        given = [run_dir / SECRETS_FILE for run_dir, _ in runs]
        try:
            for path, (_, secrets) in zip(given, runs, strict=True):
                with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                    json.dump(dict(secrets), file)
            hidden = {value for _, secrets in runs for value in secrets.values()}
            env = {name: value for name, value in os.environ.items() if value not in hidden}
            return submitted(submission.argv, submission.script, env)
        except BaseException:
            for path in given:  # a job that is there all the same cannot run without
                path.unlink(missing_ok=True)
            raise

    def status(self, job: str) -> Job:
        """What Slurm says of a job, of a task `42_3`, or of all tasks of an array; it needs no accounting."""
        words = ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T|%r"]
        try:
            done = run_command(words, timeout_s=_STATUS_S)
        except UnavailableError as error:
            return Job("unknown", str(error))
        if done.returncode and "Invalid job id" not in done.stderr:
            return Job("unknown", said(done))
        jobs = [_job(line) for line in done.stdout.split("\n") if line.strip()] or [_job("")]
        return min(jobs, key=lambda each: _ORDER.index(each.state))

    def start_again_soon(self, job: str) -> bool:
        """Does not let a job wait that Slurm holds only since it was queued again; tells whether it did."""
        held = "BeginTime" in self.status(job).detail and (times_queued_again(job) or 0) > 0
        return held and hasten(job, patience_s=0.0)

    def cancel(self, job: str) -> None:
        """Ends a job, or takes it out of the queue.

        Raises:
            UnavailableError: when Slurm cannot.
        """
        done = run_command(["scancel", job])
        if done.returncode:
            raise UnavailableError(f"scancel {job}: {said(done)}")


def _job(line: str) -> Job:
    """What one line of squeue says.

    >>> _job("PENDING|Resources")
    Job(state='pending', detail='PENDING (Resources)', exit_code=None)
    """
    state, _, reason = line.strip().partition("|")
    detail = f"{state} ({reason})" if reason not in ("", "None") else state
    return Job("running" if state in _LIVE else "pending" if state in _WAITING else "gone", detail)


def on_first(plan: StartPlan, num_nodes: int) -> StartPlan:
    """A plan that was made for more nodes, on the first of them."""
    assert plan.submission is not None, "made by plan_slurm"
    size = {f"--{name}={len(plan.nodes)}": f"--{name}={num_nodes}" for name in ("nodes", "ntasks")}
    step = tuple(size.get(word, word) for word in plan.submission.step)
    return replace(plan, nodes=plan.nodes[:num_nodes], submission=replace(plan.submission, step=step))


def named(plan: StartPlan, names: Sequence[str]) -> StartPlan:
    """A plan with the real names of its nodes.

    Raises:
        UnavailableError: when there are too few.
    """
    if len(names) < len(plan.nodes):
        raise UnavailableError(f"Slurm gave {len(names)} nodes ({', '.join(names)}), the job needs {len(plan.nodes)}")
    nodes = under_names(plan.nodes, names)
    return replace(plan, nodes=nodes, meeting=replace(plan.meeting, host=names[0]))
