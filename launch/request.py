"""A loaded job to a request for a cluster: which program, with which environment, on how many ranks."""

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from meshwright.clusters.base import Limits, Meeting, Program, Secret, StartRequest
from meshwright.clusters.environment import BASE
from meshwright.clusters.imports import IMPORTS
from meshwright.clusters.retry import RetryPolicy
from meshwright.clusters.watching import Watch
from meshwright.launch.errors import JobError, Problem
from meshwright.launch.load import LoadedJob
from meshwright.launch.sizes import size_lines, sized
from meshwright.launch.spares import NAMED, can_shrink, fewest_of, range_of
from meshwright.launch.spec.conduct import Secret as SecretSource
from meshwright.launch.spec.job import Job
from meshwright.launch.values import fill

__all__ = ["WORKER_ARGV", "imports_of", "job_argv", "limits_of", "request_of", "resolved_job", "run_dir_of"]

WORKER_ARGV = (sys.executable, "-u", "-m", "meshwright.launch.worker")
"""The built-in training program, which a job without `command` runs."""

_SHORTEST_SECRET = 4


def run_dir_of(loaded: LoadedJob, run_id: str, base: Path) -> Path:
    """The absolute run directory; a relative `logs.dir` starts at the directory the launch is typed in."""
    return (base / fill(loaded.job.logs.dir, name=loaded.job.name, run_id=run_id)).absolute()


def resolved_job(loaded: LoadedJob, run_id: str, base: Path) -> dict[str, object]:
    """The job as ranks read it, on as many nodes as there are.

    Templates are filled and directories absolute, since ranks run in another directory.
    """
    resolved = sized(loaded).job.as_dict()
    checkpoints = fill(loaded.job.checkpoint.dir, name=loaded.job.name, run_id=run_id)
    resolved["logs"]["dir"] = str(run_dir_of(loaded, run_id, base))
    resolved["checkpoint"]["dir"] = str((base / checkpoints).absolute())
    return resolved


def job_argv(loaded: LoadedJob, run_id: str) -> tuple[str, ...]:
    """The words of every rank's command.

    `python` means the interpreter that runs this, unless a setup script may put another one on PATH.
    """
    job = loaded.job
    if job.command is None:
        return WORKER_ARGV
    words = ("/bin/sh", "-c", job.command) if isinstance(job.command, str) else tuple(job.command)
    filled = tuple(fill(word, name=job.name, run_id=run_id) for word in words)
    if filled[0] in {"python", "python3"} and job.setup is None:
        return (sys.executable, *filled[1:])
    return filled


def imports_of(job: Job) -> dict[str, str]:
    """The variable that names what ranks of the built-in program import, as far as it is known before."""
    if job.command is not None or job.model is None:
        return {}
    names = ["meshwright.launch.spec.job", "meshwright.launch.worker.train", "torch._dynamo"]  # of torch's optimizers
    if job.model.architecture is not None:
        module = job.model.architecture.replace("-", "_")
        names += ["transformers.models.auto", f"transformers.models.{module}.modeling_{module}"]
    return {IMPORTS: " ".join(names)}


def request_of(
    loaded: LoadedJob, run_id: str, *, base: Path, environment: Mapping[str, str] = os.environ, reveal: bool = True
) -> StartRequest:
    """What this job asks of its cluster.

    Args:
        loaded: the job and where its keys stand.
        run_id: of this run.
        base: directory the launch is typed in.
        environment: of the launcher, where secrets may lie.
        reveal: read the values of secrets; a dry run does not.

    Raises:
        JobError: for a secret that is not there, or a working directory that does not exist.
    """
    job = sized(loaded).job
    return StartRequest(
        name=job.name,
        run_id=run_id,
        run_dir=run_dir_of(loaded, run_id, base),
        program=_program(loaded, run_id, environment if reveal else None),
        num_nodes=job.num_nodes,
        ranks_per_node=job.nproc_per_node,
        num_ranks=job.num_ranks,
        gpus_per_node=_gpus_per_node(loaded),
        meeting=_meeting(loaded),
        limits=limits_of(loaded),
        warning=(job.checkpoint.signal, job.checkpoint.lead),
    )


def _gpus_per_node(loaded: LoadedJob) -> int | None:
    cluster, asked = loaded.job.cluster, loaded.job.resources.gpus_per_node
    if cluster.type == "ssh" or (cluster.type != "local" and asked is not None):
        return asked
    return cluster.gpus_per_node


def _meeting(loaded: LoadedJob) -> Meeting:
    asked = loaded.job.rendezvous
    port = asked.port if isinstance(asked.port, int) else None
    return Meeting("first", asked.interface, port, asked.port_range, asked.bind == "any")


def limits_of(loaded: LoadedJob) -> Limits:
    """How long things may take, and how often they are tried; a node is only left out while there is another."""
    failure, join_timeout_s = loaded.job.failure, loaded.job.rendezvous.join_timeout
    limits = Limits(failure.max_restarts, failure.shutdown_grace, join_timeout_s, retry=_retries(loaded))
    if range_of(loaded.job) is not None:
        limits = replace(limits, fewest_nodes=fewest_of(loaded.job), sizes=size_lines(loaded))
    watch = loaded.job.health.watch
    if watch is not None:
        seen = Watch(watch.interval, watch.max_temp_c, watch.xid, watch.on_fault == "restart")
        limits = replace(limits, watch=seen)
    if failure.hang is None:
        return limits
    return replace(limits, hang_s=failure.hang.no_progress_for, hang_action=failure.hang.action)


def _retries(loaded: LoadedJob) -> RetryPolicy:
    failure, named = loaded.job.failure, loaded.job.cluster.type in NAMED
    wait = failure.backoff
    return RetryPolicy(
        initial_s=wait.initial,
        factor=wait.factor,
        max_s=wait.max,
        jitter=wait.jitter,
        retry_on=failure.retry_on,
        no_retry_on=failure.no_retry_on,
        stop_after_no_progress=failure.stop_after_no_progress,
        exclude_after=failure.exclude_bad_nodes if can_shrink(loaded.job) or not named else None,
    )


def _program(loaded: LoadedJob, run_id: str, environment: Mapping[str, str] | None) -> Program:
    job = loaded.job
    workdir = Path(os.path.normpath((loaded.path.parent / job.workdir).absolute()))
    if not workdir.is_dir():
        raise _problem(loaded, "workdir", f"{workdir} is no directory; ranks start there")
    sources = sorted(job.secrets.items(), key=lambda item: item[0])
    return Program(
        argv=job_argv(loaded, run_id),
        workdir=workdir,
        setup=job.setup,
        env=tuple(sorted((imports_of(job) | job.env).items())),
        inherit=("*",) if "env_pass" not in loaded.keys else tuple(sorted({*BASE, *job.env_pass})),
        secrets=tuple(_secret(loaded, name, source, environment=environment) for name, source in sources),
    )


def _problem(loaded: LoadedJob, key: str, message: str) -> JobError:
    return JobError([Problem(loaded.where(key), key, message)])


def _secret(loaded: LoadedJob, name: str, source: SecretSource, *, environment: Mapping[str, str] | None) -> Secret:
    shown = f"from_env {source.from_env}" if source.from_env is not None else f"from_file {source.from_file}"
    if environment is None:
        return Secret(name, shown, "")
    key = f"secrets.{name}"
    if source.from_env is None:
        value = _read_secret(loaded, key, Path(os.path.expanduser(source.from_file or "")))
    elif source.from_env in environment:
        value = environment[source.from_env]
    else:
        raise _problem(loaded, key, f"the variable {source.from_env} is not set; export it before launching")
    if len(value) < _SHORTEST_SECRET:
        why = (
            f"the value is shorter than {_SHORTEST_SECRET} characters, so it cannot be masked in logs; put it in `env`"
        )
        raise _problem(loaded, key, why)
    return Secret(name, shown, value)


def _read_secret(loaded: LoadedJob, key: str, path: Path) -> str:
    path = loaded.path.parent / path
    try:
        return path.read_text().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise _problem(loaded, key, f"the file {path} cannot be read: {reason}") from error
