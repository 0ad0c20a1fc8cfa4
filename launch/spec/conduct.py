"""How a job behaves: what it logs, how it fails and restarts, where it saves, what it waits for."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, Tag, WithJsonSchema, model_validator

from meshwright.launch.spec.block import BY_KIND, Block, Count, Directory, Duration, Line, Listed, Name, Prefix, Share
from meshwright.launch.spec.health import Health
from meshwright.parallel.errors import nearest

__all__ = ["After", "Backoff", "Checkpoint", "Conduct", "Failure", "Hang", "Logs", "Monitor", "Secret", "Sweep"]

CAUSES = ("node", "signal", "hang", "preempt", "exit", "config", "import_error", "exit:N")


def _cause(value: str) -> str:
    number = re.fullmatch(r"exit:([0-9]{1,3})", value)
    if value in CAUSES[:-1] or (number and 1 <= int(number[1]) <= 255):
        return value
    raise ValueError(f"expected a cause of failure or exit:N with N from 1 to 255; {nearest(value, CAUSES)}")


Cause = Annotated[
    str,
    AfterValidator(_cause),
    WithJsonSchema({"type": "string", "pattern": f"^({'|'.join(CAUSES[:-1])}|exit:[0-9]{{1,3}})$"}),
]


class Secret(Block):
    """Where a secret comes from; the value itself never stands in a job. Exactly one key."""

    from_env: Line | None = Field(default=None, description="Variable of the launcher's environment that holds it.")
    from_file: Line | None = Field(default=None, description="File that holds it; ~ is the home directory.")


class Logs(Block):
    """What is kept of the ranks' output."""

    dir: Directory = Field(
        default="runs/{name}/{run_id}", description="Run directory; may contain {name} and {run_id}."
    )
    per_rank: bool = Field(default=True, description="Keep one file per rank.")
    merge: bool = Field(default=True, description="Keep one file of all ranks.")
    prefix: Prefix = Field(
        default="{host}:{rank}", description="Start of each merged line; may contain {host} and {rank}."
    )
    show_ranks: Listed[Annotated[int, Field(ge=0)]] = Field(default=(0,), description="Ranks whose output is shown.")
    keep_attempts: Count = Field(default=10, description="Attempts whose logs are kept.")


class Monitor(Block):
    """How a run of the built-in program can be watched while it runs."""

    prometheus_port: Annotated[int, Field(ge=0, le=65535)] | None = Field(
        default=None,
        description="Port on 127.0.0.1 of rank 0's host where Prometheus reads the newest metrics, at /metrics; 0 "
        "takes a free one and says which; none unless given.",
    )


class Backoff(Block):
    """How long to wait before a restart: initial x factor^restarts, at most max, less a random part."""

    initial: Duration = Field(default=1.0, description="Wait before the first restart.")
    factor: Annotated[float, Field(ge=1, le=100)] = Field(
        default=2.0, description="Growth from one restart to the next."
    )
    max: Duration = Field(default=300.0, description="Longest wait.")
    jitter: Share = Field(default=0.2, description="Share of the wait that is left to chance, 0 to 1.")


class Hang(Block):
    """When a job counts as hanging, and what is done then."""

    no_progress_for: Duration = Field(
        description="Time in which no rank moves, not even by one micro-batch of one stage; at least 10m until every "
        "rank has finished a step, and while a checkpoint is written."
    )
    action: Literal["dump_and_restart", "dump_and_stop", "warn"] = Field(
        default="dump_and_restart",
        description="Write the stacks of all ranks and restart (as max_restarts allows) or stop, or only warn.",
    )


_RETRIED = ("node", "signal", "hang", "preempt", "exit")
_NOT_RETRIED = ("config", "import_error")


class Failure(Block):
    """What happens when a rank fails."""

    max_restarts: Annotated[int, Field(ge=0, le=10_000)] = Field(default=0, description="Restarts of the whole job.")
    backoff: Backoff = Field(default_factory=Backoff, description="Waits between restarts.")
    retry_on: Listed[Cause] = Field(
        default=_RETRIED,
        description="Failures after which ranks start again: node (faults of a machine, broken connections), signal, "
        'hang, preempt (exit code 75), exit (any other), or one exit code as "exit:N".',
    )
    no_retry_on: Listed[Cause] = Field(
        default=_NOT_RETRIED,
        description="Failures after which they never do, whatever retry_on says: config (exit codes 64, 65, 126, 127, "
        "usage errors), import_error (missing modules, syntax errors), or any of the others. exit:N outweighs kinds.",
    )
    hang: Hang | None = Field(default=None, description="When the job counts as hanging; never unless given.")
    stop_after_no_progress: Count | None = Field(
        default=None,
        description="Restarts in a row without a newer step (in metrics.jsonl or checkpoint.dir) after which the job "
        "is given up.",
    )
    exclude_bad_nodes: Count | None = Field(
        default=None,
        description="Faults of one machine (failures of kind node blamed on it) after which the job goes on without "
        "it, on a spare one; never unless given. A node that is lost is left out at once.",
    )
    shutdown_grace: Duration = Field(default=30.0, description="Time between SIGTERM and SIGKILL.")

    @model_validator(mode="before")
    @classmethod
    def _one_list_written(cls, found: Any) -> Any:
        """Takes what one list names out of the other's default."""
        if not isinstance(found, dict):
            return found
        lists = (("retry_on", "no_retry_on", _NOT_RETRIED), ("no_retry_on", "retry_on", _RETRIED))
        for written, other, default in lists:
            if isinstance(found.get(written), (list, tuple)) and other not in found:
                return {**found, other: tuple(each for each in default if each not in found[written])}
        return found


class Checkpoint(Block):
    """Where a job saves its state, and what it continues from."""

    dir: Directory = Field(
        default="runs/{name}/checkpoints", description="Directory of checkpoints; may contain {name} and {run_id}."
    )
    resume: Line = Field(default="auto", description="auto: the newest checkpoint of `dir`; never; or the path of one.")
    every_steps: Count | None = Field(default=None, description="Optimizer steps between saves; none unless given.")
    keep: Count = Field(default=2, description="Checkpoints that are kept, the newest ones.")
    signal: Literal["USR2", "TERM"] = Field(
        default="USR2",
        description="Signal that asks ranks to save (NCCL takes USR1; a preemption may come as TERM).",
    )
    lead: Duration = Field(default=180.0, description="How long before the end that signal comes.")


class Sweep(Block):
    """One run per combination of values, each as if launched by itself with `--set`."""

    grid: dict[Line, Listed[Any]] = Field(
        description="Dotted key -> values it takes; combinations in this order, the last key fastest.", min_length=1
    )
    max_parallel: Count = Field(default=1, description="Runs at the same time.")


class After(Block):
    """A run that must have ended before this one starts."""

    run: Name = Field(description="Its run id.")
    when: Literal["ok", "any"] = Field(default="ok", description="ok: it must have succeeded; any: it must be over.")


Earlier = Annotated[Annotated[Name, Tag("<text>")] | Annotated[After, Tag("<mapping>")], BY_KIND]


class Conduct(Block):
    """Keys of a job that say how it behaves."""

    logs: Logs = Field(default_factory=Logs, description="What is kept of the ranks' output.")
    monitor: Monitor = Field(
        default_factory=Monitor, description="How the built-in program can be watched while it runs."
    )
    health: Health = Field(default_factory=Health, description="Checks of machines before and while the job runs.")
    failure: Failure = Field(default_factory=Failure, description="What happens when a rank fails.")
    checkpoint: Checkpoint = Field(
        default_factory=Checkpoint, description="Where the job saves and what it continues from."
    )
    sweep: Sweep | None = Field(default=None, description="One run per combination of values.")
    after: Listed[Earlier] = Field(
        default=(), description="Runs by their ids that must have ended before: an id where it must have succeeded."
    )
