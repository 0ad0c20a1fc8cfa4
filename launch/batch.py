"""`python -m meshwright.launch.batch RUN_DIR`: the launcher of a run that a queue has started, on its first node.

What it prints is launcher.log; what it decides is exit.json. A run that was warned, saved and left with code 75 is
queued again, and then continues from its checkpoint.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from meshwright.clusters.base import StartPlan
from meshwright.clusters.contract import Handle
from meshwright.clusters.failure import Failure
from meshwright.clusters.files import StepHandle
from meshwright.clusters.retry import unwanted
from meshwright.clusters.saved import plan_from
from meshwright.clusters.slurm import SECRETS_FILE, named, on_first
from meshwright.clusters.slurm_commands import controller_answers, hasten, node_names, requeue, times_queued_again
from meshwright.launch.admission import admit
from meshwright.launch.exits import Exit
from meshwright.launch.follow import Run, follow, report
from meshwright.launch.losses import Losses
from meshwright.launch.notice import Notice
from meshwright.launch.relaunch import decision_on_end, history_of
from meshwright.launch.report import Outcome
from meshwright.launch.rundir import ASKED_FILE, EXCLUDED_FILE, RunDirError, write_json
from meshwright.launch.runs import read_run
from meshwright.launch.sizes import size_of
from meshwright.launch.supervise import RunState, now_unix_s
from meshwright.parallel.errors import MeshwrightError

__all__ = ["main"]


_END_S = 120.0
_ASK_S = 5.0
_LOOK_S = 0.1
_PREEMPTED = Failure("", "preempt", Exit.PREEMPTED)


def _read(run_dir: Path) -> tuple[StartPlan, dict[str, Any], dict[str, str]]:
    """Plan with the names of nodes, job, secrets."""
    names = node_names(os.environ["SLURM_JOB_NODELIST"])
    plan, job = plan_from(_json(run_dir / "plan.json")), _json(run_dir / "job.json")
    if (run_dir / ASKED_FILE).exists():
        plan, job = _sized(plan, _json(run_dir / ASKED_FILE), len(names))
        write_json(run_dir / "job.json", job)
        sys.stdout.write(f"meshwright: Slurm gave {len(names)} nodes; ranks run on {len(plan.nodes)}\n")
    plan = named(plan, names)
    write_json(run_dir / "plan.json", plan.as_dict())
    return plan, job, _secrets(run_dir / SECRETS_FILE, kept="--requeue" in _asked(plan))


def _asked(plan: StartPlan) -> tuple[str, ...]:
    assert plan.submission is not None, "a queue plans with one"
    return plan.submission.argv


def _secrets(path: Path, *, kept: bool) -> dict[str, str]:
    """Values of secrets; a job that may be queued again needs them again.

    Raises:
        RunDirError: when they were taken away.
    """
    try:
        found = _json(path)
    except FileNotFoundError:
        why = "the run is over, or its launch gave up before Slurm had said that it has the job"
        raise RunDirError(f"{path} was taken away: {why}; launch it again") from None
    if not kept:
        path.unlink()
    return found


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _sized(plan: StartPlan, asked: Mapping[str, Any], num_nodes: int) -> tuple[StartPlan, dict[str, Any]]:
    """Plan and job of an elastic run on as many nodes as Slurm gave, of which it may have had others before."""
    from meshwright.launch.spec.job import Job

    job = size_of(Job.model_validate(asked["job"]), num_nodes)
    whole = replace(plan_from(asked["plan"]), limits=plan.limits)
    return on_first(whole, job.num_nodes), job.as_dict()


def _put_aside(run_dir: Path, times: int) -> None:
    """What an earlier start of this run wrote as its end was not its end, and its logs are not those of this one."""
    if not times:
        return
    record = run_dir / "exit.json"
    if record.exists():
        record.rename(run_dir / f"exit-{times - 1}.json")
    for last in run_dir.glob("ranks/*/progress.json"):
        last.unlink(missing_ok=True)
    for log in run_dir.glob("logs/rank-*.log"):
        if ".start-" not in log.name:
            log.rename(log.with_name(f"{log.stem}.start-{times - 1}.log"))


def _again(outcome: Outcome, state: RunState, *, since_unix_s: float, times: int, preempted: bool) -> bool:
    """Queues a run again that was preempted, or goes on without some of its nodes, if it may be; tells whether."""
    plan, job = state.plan, os.environ.get("SLURM_JOB_ID", "")
    if not job or outcome.state != "failed" or "--no-requeue" in _asked(plan):
        return False
    saved = outcome.exit_code == Exit.PREEMPTED
    preempted = (saved or preempted) and not unwanted(plan.limits.retry, _PREEMPTED)
    without = _without(state, since_unix_s)
    if not (without or preempted):
        return False
    write_json(Path(plan.run_dir, f"exit-{times}.json"), outcome.as_dict())
    _say_again(job, without, saved=saved)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # that is how the queue ends us
    return _taken_meanwhile(job, state, times) or _requeued(job, _all_excluded(plan, without))


def _say_again(job: str, without: Sequence[str], *, saved: bool) -> None:
    why = "preempted after saving" if saved else "preempted before its ranks had saved"
    why = f"it goes on without {', '.join(without)}" if without else why
    sys.stdout.write(f"meshwright: {why}; job {job} is queued again\n")
    sys.stdout.flush()


def _requeued(job: str, without: Sequence[str]) -> bool:
    """Has Slurm end the job, and us with it, to start it again; comes back where it does not."""
    if not requeue(job, without):
        return False
    time.sleep(_END_S)  # a job that ends by itself meanwhile counts as failed
    return True


def _taken_meanwhile(job: str, state: RunState, times: int) -> bool:
    """Where this node is cut off, waits until Slurm is heard of again, and tells whether it was quicker."""
    if state.plan.nodes[0].name not in state.losses.out:
        return False
    while (found := times_queued_again(job)) is None:
        time.sleep(_ASK_S)  # it ends us, should it have given this node up
    return found > times


def _taken(outcome: Outcome, run_dir: Path, *, times: int) -> bool:
    """Whether Slurm ended the job to start it again, as after the loss of a node, and nobody cancelled it."""
    ended = outcome.state == "interrupted" or outcome.exit_code == Exit.PREEMPTED
    if not ended or not _starts_again(times):
        return False
    job = os.environ["SLURM_JOB_ID"]
    write_json(run_dir / f"exit-{times}.json", outcome.as_dict())
    sys.stdout.write(f"meshwright: Slurm ended job {job} to start it again\n")
    sys.stdout.flush()
    hasten(job)
    return True


def _without(state: RunState, since_unix_s: float) -> tuple[str, ...]:
    """Nodes that are to be left out, as the policy has it; the next start knows of them, and why it is one."""
    plan, run_dir = state.plan, Path(state.plan.run_dir)
    decision = decision_on_end(state, run_dir, since_unix_s)
    if decision is None or not decision.again or not decision.excludes:
        return ()
    past = (*history_of(state), decision)
    state.losses.exclude(decision, now_unix_s())
    write_json(run_dir / EXCLUDED_FILE, state.losses.excluded)
    write_json(run_dir / "plan.json", replace(plan, limits=replace(plan.limits, past=past)).as_dict())
    return decision.excludes


def _all_excluded(plan: StartPlan, without: Sequence[str]) -> list[str]:
    """What Slurm is to leave out, where that changes: it forgets what it was told before."""
    asked = [word.partition("=")[2] for word in _asked(plan) if word.startswith("--exclude=")]
    known = [*asked, *Losses.read(Path(plan.run_dir)).out, *without]
    return list(dict.fromkeys(known)) if without else []


def _queued_without(run: Run, out: list[dict[str, Any]], ended: Callable[[], bool]) -> bool:
    """Queues a run again without nodes that are not fit for it; comes back, with False, where it cannot be.

    Signals are still collected, so it is us who end when the queue's has come.
    """
    plan, job = run.plan, os.environ.get("SLURM_JOB_ID", "")
    if not job or "--no-requeue" in _asked(plan):
        return False
    names, kept = [each["node"] for each in out], Losses.read(run.directory)
    if set(names) & set(kept.out):  # Slurm gave a node again that it was to leave out
        return False
    write_json(run.directory / EXCLUDED_FILE, [*kept.excluded, *out])
    _say_again(job, names, saved=False)
    if not requeue(job, _all_excluded(plan, names)):
        write_json(run.directory / EXCLUDED_FILE, kept.excluded)
        return False
    end_s = time.monotonic() + _END_S
    while not ended() and time.monotonic() < end_s:  # a job that ends by itself meanwhile counts as failed
        time.sleep(_LOOK_S)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
    return True


def main(words: Sequence[str]) -> int:
    """Runs the run of a directory to its end; returns its exit code."""
    run_dir, times = Path(words[0]), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    queued: list[bool] = []
    try:
        return _run(run_dir, times, queued)
    except MeshwrightError as error:
        sys.stderr.write(f"meshwright: {error}\n")
        return int(getattr(error, "exit_code", Exit.INTERNAL))
    finally:
        if not any(queued) and not _may_start_again(times):
            (run_dir / SECRETS_FILE).unlink(missing_ok=True)


def _starts_again(times: int) -> bool:
    job = os.environ.get("SLURM_JOB_ID", "")
    return bool(job) and (times_queued_again(job) or 0) > times


def _may_start_again(times: int) -> bool:
    """Whether Slurm will start the job again, or does not say: whoever looks at the run takes secrets away later."""
    job = os.environ.get("SLURM_JOB_ID", "")
    found = times_queued_again(job) if job else 0
    return found is None or found > times


def _run(run_dir: Path, times: int, queued: list[bool]) -> int:
    """Runs it; `queued` takes whether it will start again, once that is known."""
    from meshwright.launch.spec.job import Job

    _put_aside(run_dir, times)
    plan, job, secrets = _read(run_dir)
    known = read_run(run_dir)
    assert plan.submission is not None, "a queue plans with one"
    step = plan.submission.step
    notice = Notice(job["checkpoint"]["signal"], os.environ.get("SLURM_JOB_ID", ""), times)
    run = Run(
        job=Job.model_validate(job),
        plan=plan,
        shown=None if known is None else known.shown,
        secrets=tuple(secrets.values()),
        started_unix_s=now_unix_s() if known is None or known.sweep else known.started_unix_s,
    )

    def start(*_: object) -> Handle:
        admit(run, ended=notice.heard, without=lambda out: _queued_without(run, out, notice.heard))
        return StepHandle(plan, secrets, words=step, warning=notice, reached=controller_answers)

    def keep(outcome: Outcome, state: RunState) -> bool:
        taken = _taken(outcome, run_dir, times=times)
        since_s, preempted = run.started_unix_s, notice.preempted
        queued.append(taken or _again(outcome, state, since_unix_s=since_s, times=times, preempted=preempted))
        return not queued[-1]

    outcome = follow(run, start, keep=keep, signals=notice)
    report(run, outcome)
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
