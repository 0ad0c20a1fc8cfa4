"""A launch from the job file to the exit code: load, plan, then the one place that executes the plan."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any

from meshwright.clusters.base import StartPlan
from meshwright.launch.capabilities import check_capabilities
from meshwright.launch.follow import Run, follow, report
from meshwright.launch.load import LoadedJob, load_job
from meshwright.launch.logs import Mask
from meshwright.launch.registry import cluster_of
from meshwright.launch.request import request_of, resolved_job
from meshwright.launch.rundir import create_run_dir, make_run_id, write_json, write_text

__all__ = ["LaunchOptions", "launch"]


@dataclass(frozen=True)
class LaunchOptions:
    """What the command line asks for.

    Args:
        path: the job file.
        overrides: dotted.key=value.
        run_id: None makes one.
        dry_run: only print the plan.
        as_json: one JSON object on standard output; the ranks' lines go to standard error.
    """

    path: Path
    overrides: tuple[str, ...] = ()
    run_id: str | None = None
    dry_run: bool = False
    as_json: bool = False


def launch(options: LaunchOptions, warm: "Popen[bytes] | None" = None) -> int:
    """Runs a job to its end, or prints what it would start; returns the exit code.

    Args:
        options: what to launch.
        warm: an agent that was started already.

    Raises:
        MeshwrightError: for what the user can mend, before anything has been started.
    """
    started_unix_s, base = round(time.time(), 3), Path.cwd()
    loaded = load_job(options.path, options.overrides)
    check_capabilities(loaded)
    run_id = options.run_id or make_run_id()
    request = request_of(loaded, run_id, base=base, reveal=not options.dry_run)
    cluster = cluster_of(loaded, warm)
    plan = cluster.plan(request)
    if options.dry_run:
        sys.stdout.write(json.dumps(plan.as_dict(), indent=2) + "\n" if options.as_json else str(plan))
        return 0
    cluster.check(plan)
    secrets = {secret.name: secret.value for secret in request.program.secrets}
    _write_inputs(loaded, plan, resolved_job(loaded, run_id, base))
    mask = Mask(secrets.values())
    run = Run(loaded.job, plan, shown_ranks(loaded), mask, started_unix_s, options.as_json)
    outcome = follow(run, lambda: cluster.start(plan, secrets))
    report(run, outcome)
    return outcome.exit_code


def shown_ranks(loaded: LoadedJob) -> tuple[int, ...] | None:
    """Ranks whose lines are shown; all of a program of the user that does not say which."""
    job = loaded.job
    return None if job.command is not None and "logs.show_ranks" not in loaded.keys else job.logs.show_ranks


def _write_inputs(loaded: LoadedJob, plan: StartPlan, resolved: dict[str, Any]) -> None:
    run_dir = Path(plan.run_dir)
    create_run_dir(run_dir)
    write_text(run_dir / "job.yaml", loaded.text)
    write_json(run_dir / "job.json", resolved)
    write_json(run_dir / "plan.json", plan.as_dict())
