"""`meshwright ps`: runs of this user, and how they stand."""

import json
import sys
import time
from dataclasses import asdict
from typing import Annotated

import typer

from meshwright.launch.runs import all_runs, standing

__all__ = ["ps"]

_ROW = "{:<26} {:<20} {:<8} {:<12} {:<20} {}"


def ps(
    *,
    everything: Annotated[bool, typer.Option("--all", help="Also runs that are over.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """List runs that are not over."""
    found = [(known, now) for known in all_runs() if not (now := standing(known)).over or everything]
    if as_json:
        told = [{**asdict(known), **asdict(now)} for known, now in found]
        sys.stdout.write(json.dumps({"runs": told}) + "\n")
        return
    rows = [_ROW.format("RUN", "JOB", "CLUSTER", "STATE", "LAUNCHED", "DETAIL")]
    for known, now in found:
        launched = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(known.started_unix_s))
        rows.append(_ROW.format(known.run_id, known.name, known.cluster, now.state, launched, now.detail))
    sys.stdout.write("\n".join(row.rstrip() for row in rows) + "\n")
