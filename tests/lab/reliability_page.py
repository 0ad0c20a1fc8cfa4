"""The page of reliability, made of the trials that were run."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from tests.lab.faults import ABSENT
from tests.lab.launches import ROOT

__all__ = ["PAGE", "RESULTS", "page"]

RESULTS = ROOT / "benchmarks/results/reliability.jsonl"
PAGE = ROOT / "docs/reliability.md"

_HEAD = """\
# What faults do to a training

<!-- Made by `python -m tests.lab.reliability --write` from benchmarks/results/reliability.jsonl; do not edit. -->

Each row is a fault that was made to happen to a small training on two hosts, with a third one to spare, at a random
moment after its first checkpoint. The hosts are pretended: each has its own network, processes and sshd, on
one machine with two cores; Slurm is real. Seconds are from the blow to the line of the launcher that names who and why.

- **named**: trials in which that line came, of all trials.
- **in time**: the slowest trial, and the limit.
- **lost**: most steps that were done again though a whole checkpoint had them.
- **left**: most processes that were still there ten seconds after the end.
- **same**: trials whose every loss is, bit for bit, that of an undisturbed run; refused launches start nothing.

**Does not hold, or was not tried:** on Slurm, a run that loses a node goes on only after about two minutes, which is
how long Slurm holds whatever is queued again, and the loss of the first node, with the launcher on it, is only seen by
Slurm itself.

"""


def page(results: Path) -> str:
    """The page as text."""
    trials = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for each in trials:
        groups.setdefault((each["fault"], each["kind"]), []).append(each)
    lines = [
        "| fault | cluster | trials | named | median s | slowest s | limit s | lost | left | same |",
        "|---" * 10 + "|",
    ]
    rows = {key: _row(*key, found) for key, found in groups.items()}
    rows |= {key: f"| {' | '.join(key)} | {' | '.join(['-'] * 8)} |" for key in ABSENT}
    lines += [row for _, row in sorted(rows.items())]
    absent = [f"- {fault}, on {kind}: {why}." for (fault, kind), why in sorted(ABSENT.items())]
    return _HEAD + "\n".join(
        [*lines, "", "Rows without numbers are faults that a cluster cannot have:", "", *absent, ""]
    )


def _row(fault: str, kind: str, trials: list[Mapping[str, Any]]) -> str:
    times_s = [each["detected_s"] for each in trials if each["detected_s"] is not None]
    cells = [
        fault,
        kind,
        str(len(trials)),
        f"{sum(each['named'] for each in trials)} of {len(trials)}",
        f"{median(times_s):.1f}" if times_s else "-",
        f"{max(times_s):.1f}" if times_s else "-",
        f"{trials[-1]['limit_s']:g}",
        str(max(each["lost_steps"] for each in trials)),
        str(max(each["left"] for each in trials)),
        f"{sum(each['same'] for each in trials)} of {len(trials)}",
    ]
    return f"| {' | '.join(cells)} |"
